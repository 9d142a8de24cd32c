"""The plugin in SGLang's own loader, the console script, and the three ways to install."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from sglang.srt.layers.moe_router.policy import Decision
from sglang_router_gemm import doctor
from sglang_router_gemm.cli import main

ROOT = Path(__file__).parents[2]

LOAD = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.models.deepseek_v2 import MoEGate
hooked = [hasattr(getattr(MoEGate, name), "__wrapped__") for name in ("__init__", "forward")]
print("HOOKED", *hooked)
"""


@pytest.mark.parametrize("backend", ["auto", "flashinfer", "sgl_kernel", "torch"])
def test_load_plugins_hooks_the_gate(backend: str, run_python: Callable[..., str]) -> None:
    output = run_python(LOAD, SGLANG_ROUTER_GEMM_BACKEND=backend)
    assert "HOOKED True True" in output
    assert "INFO Executed general plugin: dsv3_router_gemm" in output
    assert "ERROR" not in output


def test_off_leaves_sglang_untouched(run_python: Callable[..., str]) -> None:
    output = run_python(LOAD, SGLANG_ROUTER_GEMM_BACKEND="off")
    assert "HOOKED False False" in output
    assert "SGLang's gate is untouched" in output


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        (
            {"SGLANG_ROUTER_GEMM_BACKEND": "cutlass"},
            "one of auto, cluster, flashinfer, sgl_kernel, torch, off",
        ),
        ({"SGLANG_ROUTER_GEMM_PDL": "maybe"}, "true, 1, yes or y, or false, 0, no or n"),
    ],
)
def test_an_unknown_value_is_an_error_at_load_and_sglang_goes_on(
    setting: dict[str, str], values: str, run_python: Callable[..., str]
) -> None:
    output = run_python(LOAD, **setting)
    assert "HOOKED False False" in output
    assert "ERROR Failed to execute general plugin: dsv3_router_gemm" in output
    assert f"must be {values}" in output


# The console script ----------------------------------------------------------------------


def _has_hopper() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["versions"]["sglang"] == distribution("sglang").version
    assert findings["settings"] == {
        "SGLANG_ROUTER_GEMM_BACKEND": "auto",
        "SGLANG_ROUTER_GEMM_PDL": True,
    }
    shapes = [(m["model"], m["num_experts"], m["hidden_size"]) for m in findings["models"]]
    assert shapes == [
        ("DeepSeek-V3", 256, 7168),
        ("Kimi-K2", 384, 7168),
        ("Mistral Large 3", 128, 7168),
        ("GLM-5", 256, 6144),
        ("DeepSeek-V2", 160, 5120),
    ]
    for model in findings["models"]:
        for path in model["paths"]:
            assert (path["path"] == "sglang") == bool(path["reason"])


@pytest.mark.parametrize(("sm", "said"), [(90, None), (120, "cluster was not measured on SM 120")])
def test_doctor_marks_what_was_not_measured(sm: int, said: str | None) -> None:
    assert doctor._reason(Decision("cluster"), sm) == said


def test_doctor_table_shows_the_settings_and_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", "0")
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "SGLANG_ROUTER_GEMM_PDL      False" in output
    assert "DeepSeek-V3" in output
    if not _has_hopper():
        assert "device is cpu, must be cuda" in output


@pytest.mark.parametrize(
    ("backend", "status"),
    [("auto", 0), ("off", 0), ("torch", 0), ("flashinfer", 1), ("sgl_kernel", 1)],
)
@pytest.mark.skipif(_has_hopper(), reason="these exit statuses are those of a CPU")
def test_doctor_fails_where_a_forced_backend_cannot_serve(
    backend: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", backend)
    assert main(["doctor"]) == status


@pytest.mark.parametrize("name", ["SGLANG_ROUTER_GEMM_BACKEND", "SGLANG_ROUTER_GEMM_PDL"])
def test_a_bad_setting_is_one_line_and_exit_2(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "cutlass")
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"sglang-router-gemm: {name} is 'cutlass'")


@pytest.mark.parametrize("arguments", [[], ["cure"], ["doctor", "--yaml"]])
def test_bad_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_check_compares_both_gates_with_fp64(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert capsys.readouterr().out.count(" ok\n") == 2


def test_check_fails_on_a_wrong_gate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from sglang.srt.models.deepseek_v2_gate import DeepseekV2Gate

    right = DeepseekV2Gate.forward

    def last_row_unwritten(gate: DeepseekV2Gate, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = right(gate, hidden_states)
        logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(DeepseekV2Gate, "forward", last_row_unwritten)
    assert main(["check"]) == 1
    assert "WRONG" in capsys.readouterr().out


# The three ways to install ---------------------------------------------------------------


class Environment:
    """A virtual environment that finds everything but SGLang and this project outside."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python3.*/site-packages")
        outside = folder / "outside"
        outside.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not re.match(r"sglang([-_.](?!kernel)|$)|_editable|.*\.pth$", entry.name):
                (outside / entry.name).symlink_to(entry)
        (self.site / "outside.pth").write_text(f"{outside}\n")

    def install(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q"]
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
        pip += ["--disable-pip-version-check", *offline]
        subprocess.run([*pip, *arguments], check=True)

    def import_in_tree(self, tmp_path: Path) -> dict[str, str]:
        """Files of the modules, imported cold, and that SGLang's loader hooks the gate."""
        code = (
            "import json\n"
            "import sglang.srt.models.deepseek_v2_gate as gate\n"
            "import sglang.srt.layers.moe_router.policy as policy\n"
            "import sglang, sglang.srt.models.deepseek_v2 as model\n"
            "from sglang.srt.plugins import load_plugins\n"
            "load_plugins()\n"
            "assert hasattr(model.MoEGate.forward, '__wrapped__')\n"
            "modules = dict(sglang=sglang, gate=gate, policy=policy, model=model)\n"
            "print(json.dumps({name: m.__file__ for name, m in modules.items()}))\n"
        )
        done = subprocess.run(
            [self.python, "-W", "ignore", "-c", code],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        files: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project, built as it would be for PyPI."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def _installed_sglang() -> tuple[Path, Path]:
    """The package and the metadata that SGLang's wheel has put into this environment."""
    dist = distribution("sglang")
    return Path(str(dist.locate_file("sglang"))), Path(str(dist.locate_file(""))) / (
        f"sglang-{dist.version}.dist-info"
    )


_TO_COPY = shutil.ignore_patterns("__pycache__", "multimodal_gen")


@pytest.fixture
def sglang_from_wheel(tmp_path: Path) -> Environment:
    environment = Environment(tmp_path / "venv")
    for folder in _installed_sglang():
        shutil.copytree(folder, environment.site / folder.name, ignore=_TO_COPY)
    return environment


@pytest.fixture
def sglang_editable(tmp_path: Path) -> tuple[Environment, Path]:
    """SGLang's sources laid out as in its repository, installed with `pip install -e`."""
    package, _ = _installed_sglang()
    checkout = tmp_path / "checkout" / "python"
    shutil.copytree(package, checkout / "sglang", ignore=_TO_COPY)
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
    files = sglang_from_wheel.import_in_tree(tmp_path)
    site = sglang_from_wheel.site
    ours = site / "sglang_router_gemm" / "sglang" / "srt"
    assert files == {
        "sglang": str(site / "sglang" / "__init__.py"),
        "model": str(site / "sglang" / "srt" / "models" / "deepseek_v2.py"),
        "gate": str(ours / "models" / "deepseek_v2_gate.py"),
        "policy": str(ours / "utils" / "router_gemm" / "policy.py"),
    }


def test_sglang_from_a_wheel_and_this_editable(
    sglang_from_wheel: Environment, tmp_path: Path
) -> None:
    sglang_from_wheel.install("-e", ROOT)
    files = sglang_from_wheel.import_in_tree(tmp_path)
    ours = ROOT / "python" / "sglang" / "srt"
    assert files["sglang"] == str(sglang_from_wheel.site / "sglang" / "__init__.py")
    assert files["gate"] == str(ours / "models" / "deepseek_v2_gate.py")
    assert files["policy"] == str(ours / "utils" / "router_gemm" / "policy.py")
    assert not (sglang_from_wheel.site / "sglang_router_gemm").exists()


def test_sglang_editable_and_this_from_a_wheel(
    sglang_editable: tuple[Environment, Path], wheel: Path, tmp_path: Path
) -> None:
    environment, checkout = sglang_editable
    environment.install(wheel)
    files = environment.import_in_tree(tmp_path)
    ours = environment.site / "sglang_router_gemm" / "sglang" / "srt"
    assert files["sglang"] == str(checkout / "sglang" / "__init__.py")
    assert files["model"] == str(checkout / "sglang" / "srt" / "models" / "deepseek_v2.py")
    assert files["gate"] == str(ours / "models" / "deepseek_v2_gate.py")
    assert files["policy"] == str(ours / "utils" / "router_gemm" / "policy.py")
