"""The three ways to install: SGLang and this project from wheels, and either one editable."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path

import pytest
from environments import ROOT, Environment, build_wheel, copy_sglang

# The modules' files, imported cold, and that SGLang's loader hooks the gate.
IMPORT = """
import json
import sglang.srt.models.deepseek_v2_gate as gate
import sglang.srt.layers.moe_router.plan as plan
import sglang, sglang.srt.models.deepseek_v2 as model
from sglang.srt.plugins import load_plugins
load_plugins()
assert hasattr(model.MoEGate.forward, "__wrapped__")
modules = dict(sglang=sglang, gate=gate, plan=plan, model=model)
print(json.dumps({name: module.__file__ for name, module in modules.items()}))
"""


def import_in_tree(environment: Environment, cwd: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads(environment.run(IMPORT, cwd).splitlines()[-1])
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def sglang_from_wheel(tmp_path: Path) -> Environment:
    environment = Environment(tmp_path / "venv")
    copy_sglang(environment.site, metadata=True)
    return environment


@pytest.fixture
def sglang_editable(tmp_path: Path) -> tuple[Environment, Path]:
    """SGLang's sources laid out as in its repository, installed with `pip install -e`."""
    checkout = tmp_path / "checkout" / "python"
    copy_sglang(checkout)
    (checkout / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "sglang"\nversion = "{distribution("sglang").version}"\n'
        '[tool.setuptools.packages.find]\nexclude = ["assets*"]\n'
    )
    environment = Environment(tmp_path / "venv")
    environment.install("-e", checkout)
    return environment, checkout


def test_both_from_wheels(sglang_from_wheel: Environment, wheel: Path, tmp_path: Path) -> None:
    sglang_from_wheel.install(wheel)
    files = import_in_tree(sglang_from_wheel, tmp_path)
    site = sglang_from_wheel.site
    ours = site / "sglang_router_gemm" / "sglang" / "srt"
    assert files == {
        "sglang": str(site / "sglang" / "__init__.py"),
        "model": str(site / "sglang" / "srt" / "models" / "deepseek_v2.py"),
        "gate": str(ours / "models" / "deepseek_v2_gate.py"),
        "plan": str(ours / "layers" / "moe_router" / "plan.py"),
    }
    assert (ours / "layers/moe_router/csrc/cluster_router_gemm.cu").is_file()
    # What `bench` measures with.
    assert (site / "sglang_router_gemm/router_gemm_benchmark/timing.py").is_file()


def test_sglang_from_a_wheel_and_this_editable(
    sglang_from_wheel: Environment, tmp_path: Path
) -> None:
    sglang_from_wheel.install("-e", ROOT)
    files = import_in_tree(sglang_from_wheel, tmp_path)
    ours = ROOT / "python" / "sglang" / "srt"
    assert files["sglang"] == str(sglang_from_wheel.site / "sglang" / "__init__.py")
    assert files["gate"] == str(ours / "models" / "deepseek_v2_gate.py")
    assert files["plan"] == str(ours / "layers" / "moe_router" / "plan.py")
    assert not (sglang_from_wheel.site / "sglang_router_gemm").exists()


def test_sglang_editable_and_this_from_a_wheel(
    sglang_editable: tuple[Environment, Path], wheel: Path, tmp_path: Path
) -> None:
    environment, checkout = sglang_editable
    environment.install(wheel)
    files = import_in_tree(environment, tmp_path)
    ours = environment.site / "sglang_router_gemm" / "sglang" / "srt"
    assert files["sglang"] == str(checkout / "sglang" / "__init__.py")
    assert files["model"] == str(checkout / "sglang" / "srt" / "models" / "deepseek_v2.py")
    assert files["gate"] == str(ours / "models" / "deepseek_v2_gate.py")
    assert files["plan"] == str(ours / "layers" / "moe_router" / "plan.py")
