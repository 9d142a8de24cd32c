"""What a process pays for the plugin: at Python's start, in SGLang's loader, and in a call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import ROOT, Environment, build_wheel

# SGLang's loader ---------------------------------------------------------------------------

LOAD = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
print("LOADED", "sglang_router_gemm.hooks" in sys.modules)
print("MODELS", *(name for name in sys.modules if name.startswith("sglang.srt.models")))
from sglang.srt.models.deepseek_v2 import MoEGate
print("HOOKED", hasattr(MoEGate.forward, "__wrapped__"))
"""


def test_a_process_that_loads_plugins_imports_no_model(run_python: Callable[..., str]) -> None:
    said = run_python(LOAD).splitlines()
    assert "LOADED True" in said
    assert [line.split() for line in said if line.startswith("MODELS")] == [["MODELS"]]
    assert "HOOKED True" in said


# Python's start ----------------------------------------------------------------------------

MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"
META_PATH = "import sys; print([finder.__name__ for finder in sys.meta_path if "
META_PATH += "getattr(finder, '__name__', '').startswith('SGLang')])"
# As the import system asks, for a module that SGLang's folders do not have.
FIND = """
import sys
for finder in sys.meta_path:
    assert finder.find_spec("sglang.srt.models.deepseek_v2_gate", []) is None
"""
COST = """
import time
line = {line!r}
started = time.perf_counter()
exec(line)
print(time.perf_counter() - started)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """It has this project's wheel, and no SGLang."""
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(build_wheel(tmp_path_factory.mktemp("wheel")))
    return environment


def test_the_pth_file_imports_nothing(environment: Environment, tmp_path: Path) -> None:
    # Once, although Python reads the file twice in a virtual environment.
    assert environment.run(META_PATH, tmp_path) == "['SGLangRouterGemm']\n"
    modules = json.loads(environment.run(MODULES, tmp_path))
    assert "sglang_router_gemm" not in modules
    ours, aside = environment.site / "sglang_router_gemm.pth", environment.site / "aside"
    ours.rename(aside)
    try:
        assert environment.run(META_PATH, tmp_path) == "[]\n"
        assert json.loads(environment.run(MODULES, tmp_path)) == modules
    finally:
        aside.rename(ours)


def test_the_pth_file_takes_less_than_2_ms(environment: Environment, tmp_path: Path) -> None:
    line = (ROOT / "plugin" / "sglang_router_gemm.pth").read_text()
    seconds = [float(environment.run(COST.format(line=line), tmp_path)) for _ in range(5)]
    assert min(seconds) < 2e-3


def test_a_package_that_is_half_removed_is_silent(environment: Environment, tmp_path: Path) -> None:
    package, aside = environment.site / "sglang_router_gemm", tmp_path / "aside"
    assert package.is_dir()
    shutil.move(package, aside)
    try:
        assert environment.run("", tmp_path) == ""
        assert environment.run(META_PATH, tmp_path) == "['SGLangRouterGemm']\n"
        assert environment.run(FIND, tmp_path) == ""
    finally:
        shutil.move(aside, package)


# A call ------------------------------------------------------------------------------------

CALLS = """
import sys, torch
from gates import build_gate

def calls(forward, *arguments):
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        forward(*arguments)
    finally:
        sys.setprofile(None)
    return count

gate, hidden_states = build_gate(), torch.randn(4, 7168, dtype=torch.bfloat16)
hooked, own = type(gate).forward, type(gate).forward.__wrapped__
with torch.no_grad():
    for forward in (hooked, own):
        forward(gate, hidden_states)  # what a first call does is not what each one does
    print(calls(hooked, gate, hidden_states) - calls(own, gate, hidden_states))
"""


def test_where_sglang_serves_a_call_makes_at_most_8_more(fork_python: Callable[..., str]) -> None:
    assert 0 < int(fork_python(CALLS).splitlines()[-1]) <= 8
