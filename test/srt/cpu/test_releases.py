"""Every SGLang release with plugins: what the patch leans on is there, and the export applies.

`make test-releases`. The releases' wheels are downloaded without their dependencies, once,
and read as text; nothing of them is imported.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cpu.test_export import ISORT, lint
from sglang_router_gemm.cli import main
from sglang_router_gemm.contract import GATE_MODULE, MODEL, OP, Contract, examine

pytestmark = pytest.mark.releases

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sglang-router-gemm"

SERVER_ARGS = "get_global_server_args().enable_deterministic_inference"
CONTEXT = "get_server_args().enable_deterministic_inference"
EXECUTION = "get_exec().deterministic.enable_deterministic_inference"

# How the gate asks for deterministic inference, and whether the model registers an op of its
# own for FlashInfer's kernel.
RELEASES = {
    **{f"0.5.{patch}": (SERVER_ARGS, True) for patch in range(11, 15)},
    "0.5.15": (SERVER_ARGS, False),
    "0.5.16": (CONTEXT, False),
    **{f"0.5.{patch}": (EXECUTION, False) for patch in range(17, 24)},
}


def wheel(release: str) -> Path:
    """The release's wheel, downloaded once."""
    folder = CACHE / "wheels" / release
    found = list(folder.glob("*.whl"))
    if not found:
        waiting = folder.with_name(f"{release}.waiting")
        download = ["download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        what = ["--no-deps", "--only-binary", ":all:", f"sglang=={release}"]
        subprocess.run(
            [sys.executable, "-m", "pip", *download, *what, "--dest", waiting], check=True
        )
        shutil.rmtree(folder, ignore_errors=True)
        waiting.rename(folder)
        found = list(folder.glob("*.whl"))
    return found[0]


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def checkout(release: str, tmp_path: Path) -> Path:
    """The Python files of SGLang's runtime, laid out as in its repository."""
    with zipfile.ZipFile(wheel(release)) as archive:
        members = [n for n in archive.namelist() if re.match(r"sglang/srt/.*\.py$", n)]
        archive.extractall(tmp_path / "python", members)
    return tmp_path


def test_the_release_has_what_the_patch_leans_on(release: str, checkout: Path) -> None:
    asked, defines_op = RELEASES[release]
    package = checkout / "python" / "sglang"
    assert examine(package) == Contract(deterministic_inference=asked, defines_op=defines_op)
    naming = [f for f in package.rglob("*.py") if OP in f.read_text(encoding="utf-8")]
    assert naming == ([package / MODEL] if defines_op else [])


def test_the_export_applies(
    release: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkout / "python/sglang" / MODEL).read_text()
    assert main(["export", str(checkout), "--check"]) == 0
    assert main(["export", str(checkout), "--diff"]) == 0
    assert (checkout / "python/sglang" / MODEL).read_text() == before
    assert main(["export", str(checkout)]) == 0
    capsys.readouterr()
    after = (checkout / "python/sglang" / MODEL).read_text()
    added = [line for line in after.splitlines() if line not in set(before.splitlines())]
    assert len(added) < 25
    (checkout / ".isort.cfg").write_text(ISORT)
    edited = [f"python/sglang/{MODEL}", "python/sglang/srt/environ.py"]
    lint(checkout, edited, "F821")
    assert _unused_imports(after) <= _unused_imports(before)
    # Our op alone is left, and the gate asks the fast path first.
    contract = examine(checkout / "python" / "sglang")
    assert contract.in_tree
    assert not contract.defines_op
    assert (f"import {OP}\n" in after) == RELEASES[release][1]
    assert f"from {GATE_MODULE} import plan_gate, router_logits\n" in after
    (gate,) = (
        node
        for node in ast.parse(after).body
        if isinstance(node, ast.ClassDef) and node.name == "MoEGate"
    )
    bodies = {node.name: node.body for node in gate.body if isinstance(node, ast.FunctionDef)}
    assert ast.unparse(bodies["__init__"][-1]) == "plan_gate(self)"
    assert ast.unparse(bodies["forward"][0]) == (
        "logits = router_logits(self, hidden_states, forward_batch)"
    )
    assert ast.unparse(bodies["forward"][1]) == "if logits is not None:\n    return logits"


def _unused_imports(text: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F401", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    return set(re.findall(r"`(\S+)` imported but unused", done.stdout))
