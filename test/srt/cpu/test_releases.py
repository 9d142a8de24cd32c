"""Every SGLang release with plugins: what the patch leans on is there.

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

from sglang_router_gemm.contract import MODEL, Contract, examine

pytestmark = pytest.mark.releases

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sglang-router-gemm"

OP = "flashinfer_dsv3_router_gemm"
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
    assert examine(package) == Contract()
    assert asked in (package / MODEL).read_text(encoding="utf-8")
    naming = [f for f in package.rglob("*.py") if OP in f.read_text(encoding="utf-8")]
    assert naming == ([package / MODEL] if defines_op else [])
    # A gate that is a linear layer keeps its own forward where that takes anything else.
    for file, name in (("layers/linear.py", "ReplicatedLinear"), ("models/gpt_oss.py", "TinyGemm")):
        tree = ast.parse((package / "srt" / file).read_text(encoding="utf-8"))
        (layer,) = [e for e in tree.body if isinstance(e, ast.ClassDef) and name in e.name]
        (forward,) = [e for e in layer.body if getattr(e, "name", "") == "forward"]
        assert isinstance(forward, ast.FunctionDef)
        assert [each.arg for each in forward.args.args] == ["self", "x"]
        assert forward.decorator_list == []
