"""What the patch leans on in SGLang, and the plugin where SGLang is not like that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from sglang_router_gemm.contract import MODEL, Contract, examine
from sglang_router_gemm.pull_requests.gate import edit_model, edit_utils

SGLANG = Path(str(distribution("sglang").locate_file("sglang")))


def changed(folder: Path, file: str, *change: tuple[str, str]) -> Path:
    """The installed `sglang` in `folder`, by links, with `change` made in one of its files."""
    package, text = folder / "sglang", (SGLANG / file).read_text()
    for old, new in change:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    below = Path(file)
    for inner in reversed(below.parents):
        (package / inner).mkdir(parents=True)
        for entry in (SGLANG / inner).iterdir():
            if entry.name != below.parts[len(inner.parts)]:
                (package / inner / entry.name).symlink_to(entry)
    (package / file).write_text(text)
    return package


def test_the_installed_sglang_fits() -> None:
    assert examine(SGLANG) == Contract()


ASKED = "get_exec().deterministic.enable_deterministic_inference"
ENVIRON, OP = "srt/environ.py", "srt/utils/custom_op.py"


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (MODEL, "class MoEGate(", "class Gate(", "models/deepseek_v2.py has no class MoEGate"),
        (MODEL, "self.weight = nn.P", "self.w = nn.P", "must set self.weight"),
        (
            MODEL,
            "gemm_output_zero_allocator: B",
            "zeros: B",
            "forward takes (self, hidden_states, z",
        ),
        (MODEL, ASKED, "is_deterministic()", "forward asks nothing for deterministic inference"),
        (MODEL, ASKED, f"x.{ASKED}", "asks x.get_exec().deterministic"),
        (MODEL, "class MoEGate(", "class MoEGate((", "models/deepseek_v2.py does not parse"),
        ("srt/runtime_context.py", "def get_exec(", "def exec_(", "has no function get_exec"),
        (OP, "mutates_args", "mutated", "register_custom_op does not take mutates_args"),
        (ENVIRON, "class EnvBool(", "class Bool(", "environ.py has no class EnvBool"),
        (ENVIRON, "__set_name__", "__name_it__", "EnvField has no __set_name__"),
        (ENVIRON, "def parse(", "def read(", "EnvField has no parse"),
    ],
)
def test_each_broken_promise_is_named(
    file: str, old: str, new: str, problem: str, tmp_path: Path
) -> None:
    found = examine(changed(tmp_path, file, (old, new))).problem
    assert found is not None
    assert problem in found
    assert "\n" not in found


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert examine(tmp_path).problem == "there is no sglang/srt/models/deepseek_v2.py"


# The plugin ------------------------------------------------------------------------------

LOAD = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.models import deepseek_v2
print("HOOKED", hasattr(deepseek_v2.MoEGate.forward, "__wrapped__"))
print("FROM", deepseek_v2.__file__)
"""


def _load(package: Path, run_python: Callable[..., str]) -> list[str]:
    output = run_python(LOAD, PYTHONPATH=str(package.parent))
    assert f"FROM {package}" in output
    assert "HOOKED False" in output
    assert "ERROR" not in output
    return [line for line in output.splitlines() if "Router GEMM" in line]


def test_an_sglang_that_does_not_fit_is_left_alone_with_one_warning(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    renamed = ("gemm_output_zero_allocator: B", "zeros: B")
    (said,) = _load(changed(tmp_path, MODEL, renamed), run_python)
    assert said.startswith("WARNING Router GEMM: this SGLang does not fit, its own gate serves")
    assert "MoEGate.forward takes (self, hidden_states, zeros=None" in said


def test_an_sglang_with_the_fast_path_keeps_its_own(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """One that has merged `export --pr gate`."""
    package = changed(tmp_path, MODEL)
    common = package / "srt/models/deepseek_common"
    common.unlink()  # a link to the installed one
    shutil.copytree(SGLANG / "srt/models/deepseek_common", common)
    for file, edit in ((package / MODEL, edit_model), (common / "utils.py", edit_utils)):
        file.write_text(edit(file.read_text()))
    assert examine(package).in_tree
    (said,) = _load(package, run_python)
    assert said == "INFO Router GEMM: SGLang's MoEGate has the fast path, the plugin rests."
