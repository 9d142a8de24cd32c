"""The gate that a model's config.json describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sglang.srt.layers.moe_router.kernel import Form

# What a gate computes, and whom the benchmark calls that does what the model's class does in
# SGLang 0.5.23.
_Computed = tuple[Form, str]
_FP32 = Form(torch.float32)
_BF16_LOGITS = Form(logits_dtype=torch.bfloat16)
_MOE_GATE: _Computed = (Form(), "SGLang MoEGate")
_CUBLAS: _Computed = (Form(), "cuBLAS fp32")
_CAST_MATMUL: _Computed = (Form(), "SGLang fp32 matmul")
_FP32_LINEAR: _Computed = (_FP32, "SGLang fp32 F.linear")
_TF32_LINEAR: _Computed = (_FP32, "SGLang TF32 F.linear")
_BF16_LINEAR: _Computed = (_BF16_LOGITS, "F.linear")

# By architecture; every other is taken for one of DeepSeek's.
_GATES: Mapping[str, _Computed] = {
    "Ernie4_5_MoeForCausalLM": _BF16_LINEAR,
    "Glm4MoeForCausalLM": _TF32_LINEAR,
    "Glm4MoeLiteForCausalLM": _FP32_LINEAR,
    "Glm4vMoeForConditionalGeneration": _FP32_LINEAR,
    "GptOssForCausalLM": (_BF16_LOGITS._replace(bias=True), "FlashInfer tinygemm"),
    "HYV3ForCausalLM": _FP32_LINEAR,
    "HYV4ForCausalLM": (_FP32, "SGLang MoEGate"),
    "KimiLinearForCausalLM": _BF16_LINEAR,
    "LongcatFlashForCausalLM": _FP32_LINEAR,
    "MiMoV2FlashForCausalLM": _FP32_LINEAR,
    "MiMoV2ForCausalLM": _FP32_LINEAR,
    "MiniMaxM2ForCausalLM": _TF32_LINEAR,
    "Qwen2MoeForCausalLM": _BF16_LINEAR,
    "Qwen3_5MoeForConditionalGeneration": _BF16_LINEAR,
    "Qwen3MoeForCausalLM": _BF16_LINEAR,
    "Qwen3NextForCausalLM": _BF16_LINEAR,
    "Qwen3VLMoeForConditionalGeneration": _BF16_LINEAR,
    "Step3VLForConditionalGeneration": _BF16_LINEAR,
    "Step3p5ForCausalLM": _CAST_MATMUL,
    "Step3p7ForConditionalGeneration": _CAST_MATMUL,
}

_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
# How many layers have no experts, or, in Step's, which ones have: "3,4,5".
_FIRST, _CHOSEN = ("first_k_dense_replace", "moe_layer_start_index"), "moe_layers_enum"


class ConfigError(Exception):
    """Why a config.json says nothing of a gate, in one line."""


class GateConfig(NamedTuple):
    """What a model's gates compute, and how many layers have one; DeepSeek's unless said."""

    num_experts: int
    hidden_size: int
    layers: int | None
    """None where the config does not say."""
    form: Form = _MOE_GATE[0]
    own: str = _MOE_GATE[1]
    """The benchmark's provider that does what SGLang does."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.num_experts, self.hidden_size


def read_gate(path: Path) -> GateConfig:
    """The gate of the model whose config.json, or its folder, this is.

    Raises:
        ConfigError: there is no such file, or it does not say.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    whole = config if isinstance(config, dict) else {}
    for part in (whole, whole.get("text_config")):
        if isinstance(part, dict):
            num_experts = next((part[name] for name in _NUM_EXPERTS if part.get(name)), None)
            hidden_size, layers = part.get("hidden_size"), part.get("num_hidden_layers")
            if isinstance(num_experts, int) and isinstance(hidden_size, int):
                num_experts += part.get("zero_expert_num") or 0  # LongCat's gate scores these too
                if isinstance(part.get(_CHOSEN), str):
                    layers = len(part[_CHOSEN].split(","))
                elif isinstance(layers, int):
                    layers -= next((part[name] for name in _FIRST if part.get(name)), 0)
                computed = _computed(whole.get("architectures") or (), part)
                return GateConfig(num_experts, hidden_size, layers, *computed)
    raise ConfigError(
        f"{file} has no {', '.join(_NUM_EXPERTS[:-1])} or {_NUM_EXPERTS[-1]} beside "
        "hidden_size: must be the config.json of an MoE model"
    )


def _computed(architectures: Sequence[str], config: Mapping[str, object]) -> _Computed:
    for name in architectures:
        if name.startswith("MiMoV2") and config.get("moe_router_dtype") == "bfloat16":
            return _CUBLAS
        if name.startswith("Step3p") and not config.get("need_fp32_gate"):
            return _BF16_LINEAR
        if name in _GATES:
            return _GATES[name]
    return _MOE_GATE
