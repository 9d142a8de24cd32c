"""What .ci/audit.py makes of pip-audit's answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / ".ci" / "audit.py"
SAFE = {"name": "filelock", "version": "3.20.0", "vulns": []}
VULNERABLE = {
    "name": "torch",
    "version": "2.5.0",
    "vulns": [{"id": "PYSEC-2025-41", "fix_versions": ["2.6.0"], "aliases": [], "description": ""}],
}
UNKNOWN = {"name": "sglang", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "said", "code"),
    [
        ([SAFE, UNKNOWN], "1 of 2 packages audited", 0),
        ([SAFE, VULNERABLE], "torch 2.5.0: PYSEC-2025-41", 1),
        ([UNKNOWN, UNKNOWN], "nothing was audited", 0),
    ],
)
def test_the_report(audit: Any, packages: list[dict[str, Any]], said: str, code: int) -> None:
    text, exit_code = audit.report(json.dumps({"dependencies": packages, "fixes": []}))
    assert said in text
    assert exit_code == code


def test_a_pip_audit_that_fails_audited_nothing(audit: Any, capsys: Any) -> None:
    assert audit.main(["--no-such-option"]) == 0
    assert "nothing was audited" in capsys.readouterr().out
