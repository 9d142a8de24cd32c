"""`sglang-router-gemm export`: turns an SGLang source checkout into one of the pull requests.

Everything is computed first, from the committed text; then either all files are put into
place or none. A checkout that already has the result, and nothing else, counts as clean.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sglang_router_gemm.contract import MODEL
from sglang_router_gemm.pull_requests.flashinfer import FLASHINFER
from sglang_router_gemm.pull_requests.fp32 import FP32
from sglang_router_gemm.pull_requests.gate import GATE
from sglang_router_gemm.pull_requests.pull_request import PullRequest, RuleError
from sglang_router_gemm.pull_requests.routing import ROUTING

PULL_REQUESTS = {each.name: each for each in (GATE, FLASHINFER, FP32, ROUTING)}

# The release that the edits were written for; newer sources are taken as long as the edits fit.
RELEASE = "0.5.23"


class ExportError(Exception):
    """Why a checkout is refused, in one line."""


def run(checkout: Path, pull_request: str, check: bool = False, diff: bool = False) -> int:
    """Exports into `checkout`; 1 where that does not apply, else 0.

    Args:
        checkout: the root of SGLang's repository, or of an unpacked sdist.
        pull_request: its name, one of `PULL_REQUESTS`.
        check: only say whether the export applies.
        diff: only print it.
    """
    try:
        before, after = plan(checkout, PULL_REQUESTS[pull_request])
        if diff:
            sys.stdout.writelines(_unified_diff(before, after))
        elif check:
            print(f"{checkout}: the export applies")
        else:
            _write(checkout, {path: text for path, text in after.items() if text != before[path]})
            print(_diffstat(before, after))
    except (ExportError, OSError) as error:
        print(f"sglang-router-gemm export: {error}", file=sys.stderr)
        return 1
    return 0


def plan(checkout: Path, pull_request: PullRequest) -> tuple[dict[str, str], dict[str, str]]:
    """The text of every file of the PR, before (empty: a new file) and after, by path.

    Raises:
        ExportError: `checkout` is no SGLang, not clean, not known how to edit, or lacks the pull
            request that this one needs.
    """
    package = _package(checkout)
    _check_needed(checkout, package, pull_request)
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    try:
        for path, edit in pull_request.edits.items():
            there = _in_package(path, package)
            before[there] = _committed(checkout, there)
            after[there] = edit(before[there])
        for path, text in _new_files(pull_request).items():
            there = _in_package(path, package)
            before[there], after[there] = _committed(checkout, there), text
            if before[there] not in ("", text) and path not in pull_request.replaces:
                raise RuleError("it is there already, with another text")
    except RuleError as error:
        raise ExportError(
            f"{checkout} is not SGLang {RELEASE}, which the pull request is for: {there}: {error}"
        ) from error
    for path in _dirty(checkout):
        if path not in after or (checkout / path).read_text(encoding="utf-8") != after[path]:
            raise ExportError(f"{checkout} is dirty ({path}), must be a clean checkout")
    return before, after


def _check_needed(checkout: Path, package: str, pull_request: PullRequest) -> None:
    needed = pull_request.needs
    if needed is None:
        return
    for path in _new_files(needed):
        there = _in_package(path, package)
        if not _committed(checkout, there):
            raise ExportError(
                f"{checkout} has no {there}, must have --pr {needed.name} committed, which "
                f"--pr {pull_request.name} edits"
            )


def _in_package(path: str, package: str) -> str:
    """Where a file of the repository lies in a tree whose package `sglang` lies there."""
    of_repository = "python/sglang/"
    return (
        f"{package}/{path.removeprefix(of_repository)}" if path.startswith(of_repository) else path
    )


def _new_files(pull_request: PullRequest) -> dict[str, str]:
    if not pull_request.folder.parent.is_dir():
        raise ExportError(
            f"sglang-router-gemm runs from {Path(__file__).parent}, must run from a checkout of "
            "its sources, which has what the pull requests add"
        )
    return pull_request.new_files()


def _package(checkout: Path) -> str:
    for package in ("python/sglang", "sglang"):  # the repository's layout, and the sdist's
        if (checkout / package / MODEL).is_file():
            _check_root(checkout, f"{package}/{MODEL}")
            return package
    raise ExportError(f"{checkout} is not SGLang's source tree: it has no python/sglang/{MODEL}")


def _check_root(checkout: Path, file: str) -> None:
    """What can be put back: the root of a repository, or of an unpacked sdist."""
    if any(checkout.glob("sglang-*.dist-info")):
        raise ExportError(f"{checkout} is where SGLang is installed, must be a source checkout")
    if not _is_git(checkout):
        try:
            _git(checkout, "ls-files", "--error-unmatch", file)
        except (ExportError, OSError):
            return  # no repository has it
        root = _git(checkout, "rev-parse", "--show-toplevel").strip()
        raise ExportError(f"{checkout} is a folder of a checkout, must be its root {root}")


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise ExportError(f"git cannot read {checkout}: {done.stderr.strip()}")
    return done.stdout


def _is_git(checkout: Path) -> bool:
    return (checkout / ".git").exists()


def _committed(checkout: Path, path: str) -> str:
    if not _is_git(checkout):
        file = checkout / path
        return file.read_text(encoding="utf-8") if file.exists() else ""
    if not _git(checkout, "ls-tree", "--name-only", "HEAD", path):
        return ""
    return _git(checkout, "show", f"HEAD:{path}")


def _dirty(checkout: Path) -> list[str]:
    """Paths that differ from the last commit; an unpacked sdist has none to differ from."""
    if not _is_git(checkout):
        return []
    status = _git(checkout, "status", "--porcelain", "--untracked-files=all", "-z", "--no-renames")
    return [entry[3:] for entry in status.split("\0") if entry]


def _write(checkout: Path, files: Mapping[str, str]) -> None:
    """Writes all of `files` or, where one cannot be written, none."""
    ready: list[tuple[Path, Path]] = []
    try:
        for path, text in files.items():
            file = checkout / path
            file.parent.mkdir(parents=True, exist_ok=True)
            waiting = file.with_name(f".{file.name}.router-gemm")
            ready.append((waiting, file))
            waiting.write_text(text, encoding="utf-8")
            if file.exists():
                waiting.chmod(file.stat().st_mode)
    except OSError:
        for waiting, _ in ready:
            waiting.unlink(missing_ok=True)
        raise
    for waiting, file in ready:
        waiting.replace(file)


def _unified_diff(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for path, text in after.items():
        old = before[path]
        lines += difflib.unified_diff(
            old.splitlines(keepends=True),
            text.splitlines(keepends=True),
            f"a/{path}" if old else "/dev/null",
            f"b/{path}",
        )
    return lines


def _diffstat(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    changed = [path for path, text in after.items() if text != before[path]]
    if not changed:
        return "nothing to do: the checkout has it all"
    rows, sums = [], [0, 0]
    for path in changed:
        lines = _unified_diff({path: before[path]}, {path: after[path]})[2:]
        counts = [sum(line.startswith(sign) for line in lines) for sign in "+-"]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        rows.append((path, *counts))
    width = max(len(path) for path in changed)
    stat = [f"{path:{width}}  +{added} -{removed}" for path, added, removed in rows]
    return "\n".join((*stat, f"{len(changed)} files, {sums[0]} added, {sums[1]} removed"))
