"""Audits what the tests have installed with pip-audit, and says how much of it that was.

    python .ci/audit.py [options of pip-audit]

pip-audit alone is content with a package that its database does not have, and with all of them
behind a mirror. Exits with 1 where a package has a known vulnerability; where the database cannot
be reached, says so and exits with 0, since that is no property of the code.
"""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = ["-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
TIMEOUT_S = 600


def report(found: str) -> tuple[str, int]:
    """What pip-audit's JSON says, for a person, and the exit code."""
    packages = json.loads(found)["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    vulnerable = [
        f"{package['name']} {package['version']}: "
        + ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
        for package in audited
        if package["vulns"]
    ]
    text = f"pip-audit: {len(audited)} of {len(packages)} packages audited"
    if not audited:
        text += ": its database has none of them, as behind a mirror; nothing was audited"
    return "\n".join([text, *vulnerable]), int(bool(vulnerable))


def main(options: list[str]) -> int:
    command = [sys.executable, *COMMAND, *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        text, code = report(done.stdout)
    except subprocess.TimeoutExpired as late:
        text, code = f"pip-audit: nothing was audited: {late}", 0
    except ValueError:  # no JSON: the network, or pip-audit itself
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        text, code = f"pip-audit: nothing was audited: {last}", 0
    print(text)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
