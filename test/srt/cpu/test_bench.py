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
from sglang.srt.layers.moe_router.models import GATES
from sglang_router_gemm import bench
from sglang_router_gemm.cli import main
from sglang_router_gemm.model_config import _CUBLAS, _GATES, ConfigError, GateConfig, read_gate

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = Target(torch.device("cuda", 0), 90, 256, 7168)
BLACKWELL = HOPPER._replace(sm=100)
OWN = dict.fromkeys(bench.NUM_TOKENS, 4.0)
OWN_NAME, TF32_LINEAR = "SGLang MoEGate", "SGLang TF32 F.linear"


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
        assert bench.recommend(bench.by_setting({own: OWN} | us, target, own)) == setting


def test_without_sglangs_own_time_there_is_nothing_to_compare_with() -> None:
    settings = bench.by_setting({"cluster": _scaled(0.1)}, BLACKWELL, OWN_NAME)
    assert bench.recommend(settings) == "auto"


def test_a_setting_has_sglangs_own_time_where_it_does_not_serve() -> None:
    us = {OWN_NAME: OWN, "flashinfer": _scaled(0.5, 1, 8)}
    settings = bench.by_setting(us, HOPPER, OWN_NAME)
    assert settings["flashinfer"] == _scaled(0.5, 1, 8) | _scaled(1, 16, 32, 64)
    assert settings["auto"] == settings["off"] == OWN  # auto takes cluster there, which has none


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
        "routing": (8, 4, 8),
        "layers": 58,
        "us": us,
        "us_by_setting": bench.by_setting(us, BLACKWELL, OWN_NAME),
        "skipped": {"sgl_kernel": "sglang-kernel 0.4.10 has no dsv3_router_gemm"},
        "setting": "flashinfer",
    }
    lines = bench.as_text(findings).splitlines()
    assert max(map(len, lines)) <= 80
    calls, steps = ([line.split() for line in lines if line.startswith(m)] for m in ("16 ", "32 "))
    assert calls == [["16", "4.00", "2.00", "3.00", "8.00"], ["16", "232", "174", "58"]]
    assert steps == [["32", "4.00", "2.00", "8.00"], ["32", "232", "232", "0"]]
    assert "µs of a decode step, 58 layers:" in lines
    headers = next(line for line in lines if "saved" in line)
    assert headers.split() == ["M", "SGLang's", "with", "flashinfer", "saved"]
    unknown = bench.as_text(findings | {"layers": None, "routing": None})
    assert "decode step" not in unknown
    assert "Behind it" not in unknown
    assert lines[-2] == "Use SGLANG_ROUTER_GEMM_BACKEND=flashinfer"
    assert "SM 103: please send what --json prints" in lines[-1]
    assert "please send" not in bench.as_text(findings | {"sm": 90})
    assert lines[0] == "NVIDIA B300 (SM 103), gate [256, 7168]"
    assert lines[1] == "Behind it, not timed here: top 8 of 256 experts in 4 of 8 groups."
    assert lines[2] == "µs of one call. SGLang's own is SGLang MoEGate."


def test_the_table_of_another_gate_says_which_and_what_sglang_runs() -> None:
    target = Target(torch.device("cuda", 0), 90, 128, 2880, BF16, BF16, True)
    us = {"FlashInfer tinygemm": OWN, "cluster": _scaled(0.5)}
    findings = {
        "num_experts": 128,
        "gpu": "NVIDIA H100 80GB HBM3",
        "sm": 90,
        "gate": str(target),
        "own": "FlashInfer tinygemm",
        "routing": (1, 1, 4),
        "layers": 36,
        "us": us,
        "us_by_setting": bench.by_setting(us, target, "FlashInfer tinygemm"),
        "skipped": {},
        "setting": "cluster",
    }
    lines = bench.as_text(findings).splitlines()
    assert max(map(len, lines)) <= 80
    assert "[128, 2880]" in lines[0]
    assert "bias" in lines[0]
    assert lines[1] == "Behind it, not timed here: top 4 of 128 experts."
    assert "SGLang's own is FlashInfer tinygemm." in lines[2]
    rows = [line.split() for line in lines if line.startswith("16 ")]
    assert rows == [["16", "4.00", "2.00"], ["16", "144", "72", "72"]]


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
        ("Glm4MoeForCausalLM", {}, (FP32, FP32, False), TF32_LINEAR),
        ("Glm4MoeLiteForCausalLM", {}, (FP32, FP32, False), "SGLang fp32 F.linear"),
        ("MiniMaxM2ForCausalLM", {}, (FP32, FP32, False), TF32_LINEAR),
        ("HYV3ForCausalLM", {}, (FP32, FP32, False), "SGLang fp32 F.linear"),
        ("HYV4ForCausalLM", {}, (FP32, FP32, False), OWN_NAME),
        ("MiMoV2FlashForCausalLM", {}, (FP32, FP32, False), "SGLang fp32 F.linear"),
        (
            "MiMoV2ForCausalLM",
            {"moe_router_dtype": "bfloat16"},
            (BF16, FP32, False),
            "cuBLAS fp32",
        ),
        ("DeepseekV3ForCausalLM", {"router_fp32": True}, (FP32, FP32, False), OWN_NAME),
        ("BailingMoeV2ForCausalLM", {}, (BF16, BF16, False), "F.linear"),
        ("BailingMoeV2ForCausalLM", {"router_dtype": "fp32"}, (FP32, BF16, False), None),
        ("BailingMoeV2_5ForCausalLM", {}, (FP32, BF16, False), None),
        ("BailingMoeV2_5ForCausalLM", {"router_dtype": "bf16"}, (BF16, BF16, False), "F.linear"),
        ("BeamForCausalLM", {}, (FP32, FP32, False), None),
        ("MiniMaxM3SparseForCausalLM", {}, (BF16, FP32, False), None),
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
    own: str | None,
    tmp_path: Path,
) -> None:
    config = {"architectures": architecture and [architecture], "hidden_size": 4096} | more
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 128}))
    gate = read_gate(tmp_path)
    assert (gate.shape, gate.form, gate.own) == ((128, 4096), form, own)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "BailingMoeV3ForCausalLM"])
def test_a_model_whose_gate_is_not_hooked_is_none(name: str, tmp_path: Path) -> None:
    config = {"architectures": [name], "hidden_size": 4096, "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"router_dtype": "fp32"}))
    with pytest.raises(ConfigError, match=f"is of {name}, must be of a model whose gate is"):
        read_gate(tmp_path)


@pytest.mark.parametrize(
    "names",
    [("text_config",), ("language_config",), ("llm_config",), ("thinker_config", "text_config")],
)
def test_a_part_of_a_config_may_have_the_gate(names: tuple[str, ...], tmp_path: Path) -> None:
    part: dict[str, object] = {"hidden_size": 4096, "num_experts": 128}
    part["architectures"] = ["Qwen3MoeForCausalLM"]
    for name in reversed(names):
        part = {name: part}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ASightedModel"]} | part))
    gate = read_gate(tmp_path)
    assert (gate.shape, gate.own) == ((128, 4096), "F.linear")


@pytest.mark.parametrize(
    ("more", "routing"),
    [
        ({"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}, (8, 4, 8)),
        ({"num_experts_per_tok": 8}, (1, 1, 8)),
        ({"n_group": None, "moe_topk": 12}, (1, 1, 12)),
        ({"num_expert_group": 4, "topk_group": 2, "num_experts_per_token": 6}, (4, 2, 6)),
        ({"moe_top_k": 8}, (1, 1, 8)),
        ({"moe_k": 6}, (1, 1, 6)),
        ({"moe_topk": [8, 8]}, None),
        ({}, None),
    ],
)
def test_how_a_model_chooses_experts(
    more: dict[str, object], routing: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    config = {"num_experts": 128, "hidden_size": 4096} | more
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_gate(tmp_path).routing == routing


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
    config |= {"num_layers": 28, "moe_topk": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    gate = read_gate(tmp_path)
    assert (gate.shape, gate.form.dtype, gate.own) == ((768, 6144), FP32, "SGLang fp32 F.linear")
    assert (gate.layers, gate.routing) == (28, (1, 1, 12))


def _files(folder: str) -> list[Path]:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "srt" / folder).rglob("*.py"))


def _sources(folder: str) -> str:
    return "\n\n\n".join(file.read_text() for file in _files(folder))


def test_the_table_is_of_sglangs_classes_and_settings() -> None:
    models = _sources("models")
    for architecture in _GATES:
        assert f"\nclass {architecture}(" in models
    tf32 = {
        architecture
        for text in _sources("arg_groups/model_overrides").split("\n\n\n")
        if '"enable_tf32_matmul"' in text
        for architecture in re.findall(r'@_register_for\("(\w+)"', text)
    }
    assert tf32 == {name for name, (_, own) in _GATES.items() if own == TF32_LINEAR}


# No model of experts; no gate of ours: Kimi-K3's is part of a GEMM, Ling 3 calls another kernel,
# Ernie's vision model and SarvamMLA have a layer of their own, UnlimitedOCR the first DeepSeek's.
_LEFT = {
    "BailingMoeV3ForCausalLM",
    "BailingMoeV3VLForConditionalGeneration",
    "Ernie4_5_ForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "HunYuanDenseV1ForCausalLM",
    "KimiK3ForConditionalGeneration",
    "KimiK3LinearForCausalLM",
    "LightOnOCRForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
    "PixtralVisionModel",
    "Qwen3ASRForConditionalGeneration",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "SarvamMLAForCausalLM",
    "UnlimitedOCRForCausalLM",
}
# A model's draft has its config, and what holds another model names that in a part of its own.
_LEFT_KINDS = re.compile("NextN|MTP|Eagle|Draft|DSpark|BailingMM|InternVL|MiniCPM|Nemotron")


def test_every_model_with_a_hooked_gate_is_in_the_table() -> None:
    names = {"deepseek_v2", *(gate.module.split(".")[0] for gate in GATES)}
    texts = {file.stem: file.read_text() for file in _files("models")}
    modules: set[str] = set()
    while modules != names:  # what imports a module that has such a gate, and so on
        modules = set(names)
        imports = re.compile(rf"sglang\.srt\.models(\.| import )({'|'.join(modules)})\b")
        names |= {name for name, text in texts.items() if imports.search(text)}
    found = set()
    for name in names & texts.keys():
        entry = re.search(r"^EntryClass\b[^=]*= *(\[[^]]*\]|\w+)", texts[name], re.MULTILINE)
        found |= set(re.findall(r"\w+", entry[1])) if entry else set()
    left = {name for name in found if _LEFT_KINDS.search(name)} | _LEFT
    assert found - left == _GATES.keys()


@pytest.mark.parametrize(
    "row", sorted({row for row in (*_GATES.values(), _CUBLAS) if row[1] is not None}, key=str)
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
