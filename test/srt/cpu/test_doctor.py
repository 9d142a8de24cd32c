"""The console script: what `doctor` says is what a server gets; `check`; one line for a mistake.

A GPU is an SM that `examine_gate` is told of. The compilers, caches and packages are real.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_nvcc

from sglang.srt.layers.moe_router import cluster_router_gemm, jit
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3, MODELS
from sglang.srt.models.deepseek_v2_gate import DeepseekV2Gate
from sglang_router_gemm import doctor
from sglang_router_gemm.cli import main

GPU = torch.device("cuda", 0)
BACKEND = "SGLANG_ROUTER_GEMM_BACKEND"


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


on_a_cpu = pytest.mark.skipif(_has_gpu(), reason="this is what a CPU gets")


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the first nvcc of the search: it writes a file, which nobody loads."""
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    write_nvcc(tmp_path / "cuda", 'while [ "$1" != -o ]; do shift; done; echo built > "$2"')
    return tmp_path / "cuda/bin/nvcc"


def _deepseek_v3(sm: int = 90) -> dict[str, Any]:
    return doctor.examine_gate(DEEPSEEK_V3, GPU, sm)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert findings["versions"]["sglang"] == distribution("sglang").version
    assert findings["settings"] == {BACKEND: "auto", "SGLANG_ROUTER_GEMM_PDL": True}
    assert findings["plugin"] is None
    shapes = [(m["model"], m["num_experts"], m["hidden_size"]) for m in findings["models"]]
    assert shapes == [model[:3] for model in MODELS]
    for model in findings["models"]:
        for path in model["paths"]:
            assert (path["path"] == "sglang") == (path["kernel"] is None)
            assert path["path"] != "sglang" or path["reason"]


def test_a_kernel_builds_and_then_is_cached(nvcc: Path) -> None:
    served, rest = _deepseek_v3()["paths"]
    assert served == {
        "num_tokens": "1-128",
        "path": "cluster",
        "reason": None,
        "kernel": f"builds with {nvcc}",
        "measured": "2026-11-27",
    }
    assert rest["num_tokens"] == "129+"
    assert rest["measured"] is None
    assert rest["path"] == "sglang"
    jit.build(cluster_router_gemm.spec(256, 7168, 90))
    assert _deepseek_v3()["paths"][0]["kernel"] == "cached"
    nvcc.unlink()
    assert _deepseek_v3()["as_asked"]


@pytest.mark.parametrize("backend", ["auto", "cluster"])
def test_a_kernel_that_nothing_can_build(
    backend: str, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "nvcc_candidates", lambda: iter([tmp_path / "nvcc"]))
    monkeypatch.setenv(BACKEND, backend)
    found = _deepseek_v3()
    assert not found["as_asked"]
    (path,) = found["paths"]
    assert path["path"] == "sglang"
    assert path["reason"] == (
        f"cluster_router_gemm cannot be had: no nvcc for SM 90 ({tmp_path}/nvcc is missing); "
        "install the CUDA toolkit and set CUDA_HOME, or pip install nvidia-cuda-nvcc"
    )


def test_a_cache_that_others_may_write(nvcc: Path, tmp_path: Path) -> None:
    jit.build(cluster_router_gemm.spec(256, 7168, 90))
    (tmp_path / "cache").chmod(0o777)
    found = _deepseek_v3()
    assert not found["as_asked"]
    assert "cache is writable by others (mode 777, group 0)" in found["paths"][0]["reason"]


def test_flashinfers_kernel(nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.jit import cpp_ext, env

    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path / "cached_ops")
    monkeypatch.setenv(BACKEND, "flashinfer")
    cpp_ext.get_cuda_path.cache_clear()
    linker = tmp_path / "linker"
    linker.write_text("#!/bin/sh\necho ld: cannot find -lcuda >&2; exit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("CXX", str(linker))
    found = _deepseek_v3()
    assert not found["as_asked"]
    assert "the linker finds no libcuda.so; install" in found["paths"][0]["reason"]
    linker.write_text("#!/bin/sh\n")
    assert _deepseek_v3()["paths"][0]["kernel"] == f"builds with {nvcc}"
    library = tmp_path / "cached_ops/dsv3_router_gemm/dsv3_router_gemm.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert _deepseek_v3()["paths"][0]["kernel"] == "cached"
    monkeypatch.setenv("PATH", "")
    assert "ninja is missing; pip install ninja" in _deepseek_v3()["paths"][0]["reason"]
    cpp_ext.get_cuda_path.cache_clear()


def test_what_the_packages_do_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND, "flashinfer")
    (path,) = _deepseek_v3(120)["paths"]
    assert "does not declare SM 120" in path["reason"]


def test_what_was_not_measured_has_a_remark(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND, "cluster")
    assert _deepseek_v3(120)["paths"][0]["reason"] == (
        "cluster was not measured on SM 120: `sglang-router-gemm bench` does that"
    )
    assert _deepseek_v3(90)["paths"][0]["reason"] is None


@pytest.mark.parametrize("backend", ["auto", "off", "torch"])
def test_an_sm_that_auto_leaves_to_sglang_gets_what_is_shown(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BACKEND, backend)
    assert _deepseek_v3(80)["as_asked"]


def test_a_plugin_that_sglang_does_not_load(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another, dsv3_router_gemm")
    assert _deepseek_v3()["as_asked"]
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    found = _deepseek_v3()
    assert not found["as_asked"]
    (path,) = found["paths"]
    assert path["reason"].startswith("SGLANG_PLUGINS is 'another', must have dsv3_router_gemm")


def test_the_text_fits_a_terminal(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", "0")
    findings = doctor.examine() | {"nvcc": "/usr/local/cuda/bin/nvcc"}
    for backend in ("auto", "cluster", "flashinfer"):
        monkeypatch.setenv(BACKEND, backend)
        for sm in (90, 103, 120):
            models = [doctor.examine_gate(model, GPU, sm) for model in MODELS]
            text = doctor.as_text(findings | {"models": models})
            # A path is not broken.
            assert [line for line in text.splitlines() if len(line) > 80 and " " in line[4:]] == []
    assert "SGLANG_ROUTER_GEMM_PDL      False" in text
    assert "Ray actors and in `python -m" in text


def test_fp32_logits(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND, "auto,fp32")
    assert doctor.examine()["settings"][BACKEND] == "auto,fp32"
    found = {model.name: doctor.examine_gate(model, GPU, 90) for model in MODELS}
    qwen, gpt_oss = found["Qwen3-235B"], found["gpt-oss-120b"]
    assert qwen["gate"] == "[128, 4096]"
    assert [each["path"] for each in qwen["paths"]] == ["cluster", "torch"]
    assert gpt_oss["gate"] == "[128, 2880] with a bias, bfloat16 logits"
    assert [each["path"] for each in gpt_oss["paths"]] == ["cluster", "sglang"]


def test_fp32_logits_where_the_kernel_cannot_be_had(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BACKEND, "auto,fp32")
    (qwen,) = [model for model in MODELS if model.name == "Qwen3-235B"]
    monkeypatch.setattr(jit, "nvcc_candidates", lambda: iter([tmp_path / "nvcc"]))
    found = doctor.examine_gate(qwen, GPU, 90)
    assert [each["path"] for each in found["paths"]] == ["torch"]
    assert "no nvcc" in found["paths"][0]["reason"]
    assert not found["as_asked"]
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    found = doctor.examine_gate(qwen, GPU, 90)
    assert [each["path"] for each in found["paths"]] == ["sglang"]
    assert "SGLANG_PLUGINS is 'another'" in found["paths"][0]["reason"]


def test_a_reason_stands_under_its_row(nvcc: Path) -> None:
    text = doctor.as_text(doctor.examine() | {"models": [_deepseek_v3()]})
    lines = text.splitlines()
    row = next(index for index, line in enumerate(lines) if line.startswith("DeepSeek-V3"))
    assert lines[row].split() == ["DeepSeek-V3", "[256,", "7168]", "1-128", "cluster"]
    assert lines[row + 1].startswith("    builds with")
    assert str(nvcc) in "".join(lines[row + 1 : row + 3])
    assert "    auto takes cluster for M = 1 to 128" in lines


@on_a_cpu
@pytest.mark.parametrize(
    ("backend", "status"),
    [("auto", 0), ("off", 0), ("torch", 0), ("cluster", 1), ("flashinfer", 1), ("sgl_kernel", 1)],
)
def test_the_exit_status_without_a_gpu(
    backend: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(BACKEND, backend)
    assert main(["doctor"]) == status
    assert ("device is cpu, must be cuda" in capsys.readouterr().out) == (
        backend not in ("off", "torch")
    )


# ---- The rest of the console script ------------------------------------------------------------


@pytest.mark.parametrize("name", [BACKEND, "SGLANG_ROUTER_GEMM_PDL"])
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


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [["doctor"], ["check"], ["prebuild", "--arch", "9.0a"], ["export", "sglang", "--pr", "gate"]],
)
def test_without_sglang_every_command_says_so(
    arguments: list[str], leftover: bool, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """`-S`, so that no package is found but this one; an uninstall may leave SGLang's folder."""
    if leftover:
        (tmp_path / "sglang").mkdir()
    package = importlib.util.find_spec("sglang_router_gemm")
    assert package is not None
    assert package.origin is not None
    code = (
        f"import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]; "
        f"sys.path += {[str(Path(package.origin).parents[1]), str(tmp_path)]}; "
        f"sys.meta_path[:] = [each for each in sys.meta_path if 'ditable' not in repr(each)]; "
        f"from sglang_router_gemm.cli import main; print('status', main({arguments}))"
    )
    assert run_python(code, cwd=os.fspath(tmp_path)) == (
        "sglang-router-gemm: SGLang is not installed; pip install sglang\nstatus 1\n"
    )


def test_check_compares_both_gates_with_fp64(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert said.count(" ok\n") == 2
    assert max(map(len, said.splitlines())) <= 80


def test_check_fails_on_a_wrong_gate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DeepseekV2Gate.forward

    def last_row_unwritten(gate: DeepseekV2Gate, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = right(gate, hidden_states)
        logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(DeepseekV2Gate, "forward", last_row_unwritten)
    assert main(["check"]) == 1
