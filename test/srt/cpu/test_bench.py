"""`sglang-router-gemm bench`, as far as it goes without a GPU: the table, and the advice."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.srt.layers.moe_router.kernel import Target
from sglang_router_gemm import bench, model_config
from sglang_router_gemm.cli import main
from sglang_router_gemm.model_config import GateConfig, read_gate

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = Target(torch.device("cuda", 0), 90, 256, 7168)
BLACKWELL = HOPPER._replace(sm=100)
OWN = dict.fromkeys(bench.NUM_TOKENS, 4.0)
OWN_NAME = "SGLang MoEGate"


def _scaled(factor: float, *num_tokens: int) -> dict[int, float]:
    return {m: factor * OWN[m] for m in num_tokens or OWN}


@pytest.mark.parametrize(
    ("us", "target", "setting"),
    [
        ({"cluster": _scaled(0.6)}, HOPPER, "auto"),  # which takes cluster there
        ({"cluster": _scaled(0.6)}, BLACKWELL, "cluster"),
        ({"cluster": _scaled(1.3), "flashinfer": _scaled(0.9, 1, 8, 16)}, BLACKWELL, "auto"),
        ({"cluster": _scaled(1.3), "flashinfer": _scaled(1.2, 1, 8, 16)}, BLACKWELL, "off"),
        ({"cluster": _scaled(1.01)}, BLACKWELL._replace(sm=120), "auto"),  # no worse than off
        ({"flashinfer": _scaled(0.5, 1)}, BLACKWELL._replace(sm=120), "flashinfer"),
    ],
)
def test_the_setting_is_the_fastest_over_all_m(
    us: dict[str, dict[int, float]], target: Target, setting: str
) -> None:
    for own in (OWN_NAME, "F.linear"):
        assert bench.recommend({own: OWN} | us, target, own) == setting


def test_without_sglangs_own_time_there_is_nothing_to_compare_with() -> None:
    assert bench.recommend({"cluster": _scaled(0.1)}, BLACKWELL, OWN_NAME) == "auto"


def test_the_table_fits_a_terminal_and_counts_the_layers() -> None:
    us = {OWN_NAME: OWN, "cluster": _scaled(0.5), "flashinfer": _scaled(0.75, 1, 8, 16)}
    us["torch"] = _scaled(2.0)
    findings = {
        "gpu": "NVIDIA B300",
        "sm": 103,
        "num_experts": 256,
        "hidden_size": 7168,
        "gate": str(BLACKWELL),
        "own": OWN_NAME,
        "layers": 58,
        "us": us,
        "skipped": {"sgl_kernel": "sglang-kernel 0.4.10 has no dsv3_router_gemm"},
        "setting": "cluster",
    }
    lines = bench.as_text(findings).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("16 ")]
    assert row.split() == ["16", "4.00", "2.00", "3.00", "8.00", "+116", "µs", "a", "step"]
    (row,) = [line for line in lines if line.startswith("32 ")]
    assert "3.00" not in row
    assert lines[-2] == "Use SGLANG_ROUTER_GEMM_BACKEND=cluster"
    assert "SM 103: please send what --json prints" in lines[-1]
    assert "please send" not in bench.as_text(findings | {"sm": 90})
    assert lines[0] == "NVIDIA B300 (SM 103), gate [256, 7168]"
    assert lines[1] == "µs of one call. SGLang's own is SGLang MoEGate."


def test_the_table_of_another_gate_says_which_and_what_sglang_runs() -> None:
    target = Target(torch.device("cuda", 0), 90, 128, 2880, BF16, BF16, True)
    findings = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "sm": 90,
        "gate": str(target),
        "own": "FlashInfer tinygemm",
        "layers": 36,
        "us": {"FlashInfer tinygemm": OWN, "cluster": _scaled(0.5)},
        "skipped": {},
        "setting": "cluster",
    }
    lines = bench.as_text(findings).splitlines()
    assert max(map(len, lines)) <= 80
    assert "[128, 2880]" in lines[0]
    assert "bias" in lines[0]
    assert "SGLang's own is FlashInfer tinygemm." in lines[1]
    (row,) = [line for line in lines if line.startswith("16 ")]
    assert row.split() == ["16", "4.00", "2.00", "+72", "µs", "a", "step"]


def test_the_layers_are_those_with_experts(tmp_path: Path) -> None:
    config = {"n_routed_experts": 256, "hidden_size": 7168, "num_hidden_layers": 61}
    (tmp_path / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 3}))
    assert read_gate(tmp_path) == GateConfig(256, 7168, 58)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_gate(tmp_path).layers == 61


@pytest.mark.parametrize(
    ("architecture", "more", "form", "own"),
    [
        ("DeepseekV3ForCausalLM", {}, (BF16, FP32, False), OWN_NAME),
        (None, {}, (BF16, FP32, False), OWN_NAME),
        # A key of MiMo's alone.
        ("DeepseekV3ForCausalLM", {"moe_router_dtype": "float32"}, (BF16, FP32, False), OWN_NAME),
        ("Glm4MoeForCausalLM", {}, (FP32, FP32, False), "SGLang TF32 F.linear"),
        ("Glm4MoeLiteForCausalLM", {}, (FP32, FP32, False), "SGLang fp32 F.linear"),
        ("MiniMaxM2ForCausalLM", {}, (FP32, FP32, False), "SGLang TF32 F.linear"),
        ("HYV3ForCausalLM", {}, (FP32, FP32, False), "SGLang fp32 F.linear"),
        ("HYV4ForCausalLM", {}, (FP32, FP32, False), OWN_NAME),
        ("MiMoV2FlashForCausalLM", {}, (FP32, FP32, False), "SGLang fp32 F.linear"),
        (
            "MiMoV2ForCausalLM",
            {"moe_router_dtype": "bfloat16"},
            (BF16, FP32, False),
            "cuBLAS fp32",
        ),
        ("Qwen3MoeForCausalLM", {}, (BF16, BF16, False), "F.linear"),
        ("Qwen3MoeForCausalLM", {"moe_router_dtype": "bfloat16"}, (BF16, BF16, False), "F.linear"),
        ("KimiLinearForCausalLM", {}, (BF16, BF16, False), "F.linear"),
        ("GptOssForCausalLM", {}, (BF16, BF16, True), "FlashInfer tinygemm"),
        (
            "Step3p5ForCausalLM",
            {"need_fp32_gate": True},
            (BF16, FP32, False),
            "SGLang fp32 matmul",
        ),
        ("Step3p5ForCausalLM", {}, (BF16, BF16, False), "F.linear"),
    ],
)
def test_what_the_gate_of_a_model_computes(
    architecture: str | None,
    more: dict[str, object],
    form: tuple[torch.dtype, torch.dtype, bool],
    own: str,
    tmp_path: Path,
) -> None:
    config = {"architectures": architecture and [architecture], "hidden_size": 4096} | more
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 128}))
    gate = read_gate(tmp_path)
    assert (gate.shape, gate.form, gate.own) == ((128, 4096), form, own)


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ({"num_hidden_layers": 45, "moe_layers_enum": "3,4,44"}, 3),  # Step-3.5
        ({"num_hidden_layers": 28, "moe_layer_start_index": 1}, 27),  # Ernie 4.5
    ],
)
def test_experts_have_another_name_in_some_models(
    more: dict[str, object], layers: int, tmp_path: Path
) -> None:
    config = {"moe_num_experts": 288, "hidden_size": 4096} | more
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert read_gate(tmp_path) == GateConfig(288, 4096, layers)


def test_longcats_gate_has_its_zero_experts(tmp_path: Path) -> None:
    config: dict[str, object] = {"architectures": ["LongcatFlashForCausalLM"]}
    config |= {"n_routed_experts": 512, "zero_expert_num": 256, "hidden_size": 6144}
    (tmp_path / "config.json").write_text(json.dumps(config))
    gate = read_gate(tmp_path)
    assert (gate.shape, gate.form.dtype, gate.own) == ((768, 6144), FP32, "SGLang fp32 F.linear")


def _sources(folder: str) -> str:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    files = (Path(spec.origin).parent / "srt" / folder).glob("*.py")
    return "\n\n\n".join(file.read_text() for file in sorted(files))


def test_the_table_is_of_sglangs_classes_and_settings() -> None:
    models = _sources("models")
    for architecture in model_config._GATES:
        assert f"\nclass {architecture}(" in models
    tf32 = {
        architecture
        for text in _sources("arg_groups/model_overrides").split("\n\n\n")
        if '"enable_tf32_matmul"' in text
        for architecture in re.findall(r'@_register_for\("(\w+)"', text)
    }
    assert tf32 == {name for name, row in model_config._GATES.items() if "TF32" in row[1]}


@pytest.mark.parametrize(
    "row", sorted({*model_config._GATES.values()} | {model_config._CUBLAS}, key=str)
)
def test_the_benchmark_has_what_sglang_runs(row: Any) -> None:
    from router_gemm_benchmark.providers import all_providers

    gate = GateConfig(64, 512, None, *row)
    assert gate.own in [each.name for each in all_providers(64, 512, CPU, gate.form)]


class _Bench:
    """Every call takes 2 µs."""

    producer = None

    def __init__(self, *given: Any) -> None:
        *self.shape, _, _, self.dtype = given

    def measure(self, candidates: Any, num_tokens: int, mode: Any) -> Any:
        from router_gemm_benchmark.timing import make_timing

        names = [each.provider for each in candidates]
        assert {each.dtype for each in names} <= {self.dtype}
        rest = mode.name, num_tokens, *self.shape, (1.0, 2.0, 3.0), 3000.0
        return [make_timing(each, *rest) for each in names], []


@pytest.mark.parametrize(
    ("architecture", "timed", "reason"),
    [
        ("Glm4MoeForCausalLM", {"SGLang TF32 F.linear", "torch"}, None),
        ("HYV3ForCausalLM", {"SGLang fp32 F.linear", "torch"}, None),
        ("Qwen3MoeForCausalLM", {"F.linear", "torch"}, None),
        ("GptOssForCausalLM", {"torch"}, ("FlashInfer tinygemm", "no CUDA device")),
        ("DeepseekV3ForCausalLM", {"torch"}, (OWN_NAME, "no CUDA device")),
    ],
)
def test_what_is_timed_is_sglangs_own_and_ours(
    architecture: str,
    timed: set[str],
    reason: tuple[str, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from router_gemm_benchmark import timing

    config = {"architectures": [architecture], "hidden_size": 512, "num_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(timing, "Bench", _Bench)
    monkeypatch.setattr(bench, "NUM_TOKENS", (1, 8))
    torch.manual_seed(0)  # F.linear's bf16 logits are nearly off on a CPU
    with torch.no_grad():
        us, skipped = bench.measure(read_gate(tmp_path), CPU)
    assert us == {name: {1: 2.0, 8: 2.0} for name in timed}
    assert not {"cluster", "flashinfer", "sgl_kernel"} - skipped.keys()
    assert reason is None or skipped[reason[0]] == reason[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the failure is that there is no GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "this machine has no CUDA device"),
        (["--model", "nowhere"], "nowhere cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"sglang-router-gemm bench: {said}\n"
