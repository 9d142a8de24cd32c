"""The gate that a model's config.json describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sglang.srt.layers.moe_router.kernel import Form

# What a gate computes, and whom the benchmark calls that does what the model's class does in
# SGLang 0.5.23; None where nobody does, for its gate chooses among kernels of its own, or rounds.
_Computed = tuple[Form, str | None]
_FP32 = Form(torch.float32)
_BF16_LOGITS = Form(logits_dtype=torch.bfloat16)
_MOE_GATE: _Computed = (Form(), "SGLang MoEGate")
_FP32_MOE_GATE: _Computed = (_FP32, "SGLang MoEGate")
_CUBLAS: _Computed = (Form(), "cuBLAS fp32")
_CAST_MATMUL: _Computed = (Form(), "SGLang fp32 matmul")
_FP32_LINEAR: _Computed = (_FP32, "SGLang fp32 F.linear")
_TF32_LINEAR: _Computed = (_FP32, "SGLang TF32 F.linear")
_BF16_LINEAR: _Computed = (_BF16_LOGITS, "F.linear")
_FP32_ROUNDED: _Computed = (_BF16_LOGITS._replace(dtype=torch.float32), None)

# By architecture, those of the classes that the plugin hooks (`models.GATES`, and `MoEGate`).
_GATES: Mapping[str, _Computed] = {
    "BailingMoEForCausalLM": _BF16_LINEAR,
    "BailingMoeForCausalLM": _BF16_LINEAR,
    "BailingMoeV2ForCausalLM": _BF16_LINEAR,
    "BailingMoeV2_5ForCausalLM": _FP32_ROUNDED,
    "BeamForCausalLM": (_FP32, None),
    "DeepseekOCRForCausalLM": _MOE_GATE,
    "DeepseekV2ForCausalLM": _MOE_GATE,
    "DeepseekV3ForCausalLM": _MOE_GATE,
    "DeepseekV32ForCausalLM": _MOE_GATE,
    "DeepseekV4ForCausalLM": _MOE_GATE,
    "DeepseekVL2ForCausalLM": _MOE_GATE,
    "Dots3NoteForCausalLM": (_BF16_LOGITS, None),
    "DotsVLMForCausalLM": _MOE_GATE,
    "Ernie4_5_MoeForCausalLM": _BF16_LINEAR,
    "GigaChat35ForCausalLM": _MOE_GATE,
    "Glm4MoeForCausalLM": _TF32_LINEAR,
    "Glm4MoeLiteForCausalLM": _FP32_LINEAR,
    "Glm4vMoeForConditionalGeneration": _FP32_LINEAR,
    "Glm5NextForConditionalGeneration": _MOE_GATE,
    "GlmMoeDsaForCausalLM": _MOE_GATE,
    "GptOssForCausalLM": (_BF16_LOGITS._replace(bias=True), "FlashInfer tinygemm"),
    "HYV3ForCausalLM": _FP32_LINEAR,
    "HYV4ForCausalLM": _FP32_MOE_GATE,
    "HunYuanMoEV1ForCausalLM": _BF16_LINEAR,
    "InternS1ForConditionalGeneration": _BF16_LINEAR,
    "InternS1ProForConditionalGeneration": _BF16_LINEAR,
    "InternS2MobiusForConditionalGeneration": _BF16_LINEAR,
    "InternS2PreviewForConditionalGeneration": _BF16_LINEAR,
    "KimiK25ForConditionalGeneration": _MOE_GATE,
    "KimiLinearForCausalLM": _BF16_LINEAR,
    "KimiVLForConditionalGeneration": _MOE_GATE,
    "LongcatFlashForCausalLM": _FP32_LINEAR,
    "MellumForCausalLM": _BF16_LINEAR,
    "MiMoV2FlashForCausalLM": _FP32_LINEAR,
    "MiMoV2ForCausalLM": _FP32_LINEAR,
    "MiniMaxM2ForCausalLM": _TF32_LINEAR,
    "MiniMaxM3SparseForCausalLM": (Form(), None),
    "MiniMaxM3SparseForConditionalGeneration": (Form(), None),
    "MistralLarge3ForCausalLM": _MOE_GATE,
    "PixtralForConditionalGeneration": _MOE_GATE,  # Mistral Large 3, where it has experts
    "Qwen2MoeForCausalLM": _BF16_LINEAR,
    "Qwen3_5MoeForCausalLM": _BF16_LINEAR,
    "Qwen3_5MoeForConditionalGeneration": _BF16_LINEAR,
    "Qwen3MoeForCausalLM": _BF16_LINEAR,
    "Qwen3NextForCausalLM": _BF16_LINEAR,
    "Qwen3OmniMoeForConditionalGeneration": _BF16_LINEAR,
    "Qwen3VLMoeForConditionalGeneration": _BF16_LINEAR,
    "Qwen4ExpForConditionalGeneration": _BF16_LINEAR,
    "SarvamMoEForCausalLM": _BF16_LINEAR,
    "Step3p5ForCausalLM": _CAST_MATMUL,
    "Step3p7ForConditionalGeneration": _CAST_MATMUL,
}

_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_NUM_GROUPS = ("n_group", "num_expert_group")
# Where the config of a model that sees or hears has that of its language model.
_PARTS = ("text_config", "language_config", "llm_config")
# How many layers have no experts, or, in Step's, which ones have: "3,4,5".
_FIRST, _CHOSEN = ("first_k_dense_replace", "moe_layer_start_index"), "moe_layers_enum"


class ConfigError(Exception):
    """Why a config.json says nothing of a gate, in one line."""


class GateConfig(NamedTuple):
    """What a model's gates compute, how many layers have one, and how the model chooses experts.

    DeepSeek's unless said.
    """

    num_experts: int
    hidden_size: int
    layers: int | None
    """None where the config does not say."""
    form: Form = _MOE_GATE[0]
    own: str | None = _MOE_GATE[1]
    """The benchmark's provider that does what SGLang does; None where none does."""
    routing: tuple[int, int, int] | None = None
    """`n_group`, `topk_group` and `num_experts_per_tok`; None where the config does not say."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.num_experts, self.hidden_size


def read_gate(path: Path) -> GateConfig:
    """The gate of the model whose config.json, or its folder, this is.

    Raises:
        ConfigError: there is no such file, it does not say, or the plugin hooks no gate of such a
            model.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    whole = config if isinstance(config, dict) else {}
    thinker = whole.get("thinker_config")
    holders = (whole, thinker if isinstance(thinker, dict) else {})
    for part in (whole, *(holder.get(name) for holder in holders for name in _PARTS)):
        if isinstance(part, dict):
            num_experts = next((part[name] for name in _NUM_EXPERTS if part.get(name)), None)
            hidden_size = part.get("hidden_size")
            layers = part.get("num_hidden_layers") or part.get("num_layers")  # LongCat's
            if isinstance(num_experts, int) and isinstance(hidden_size, int):
                num_experts += part.get("zero_expert_num") or 0  # LongCat's gate scores these too
                if isinstance(part.get(_CHOSEN), str):
                    layers = len(part[_CHOSEN].split(","))
                elif isinstance(layers, int):
                    layers -= next((part[name] for name in _FIRST if part.get(name)), 0)
                names = [*(whole.get("architectures") or ()), *(part.get("architectures") or ())]
                computed = _computed(file, list(dict.fromkeys(names)), part)
                return GateConfig(num_experts, hidden_size, layers, *computed, _routing(part))
    raise ConfigError(
        f"{file} has no {', '.join(_NUM_EXPERTS[:-1])} or {_NUM_EXPERTS[-1]} beside "
        "hidden_size: must be the config.json of an MoE model"
    )


def _computed(file: Path, architectures: Sequence[str], config: Mapping[str, object]) -> _Computed:
    for name in architectures:
        computed = _GATES.get(name)
        if computed is None:
            continue
        if name.startswith("MiMoV2") and config.get("moe_router_dtype") == "bfloat16":
            return _CUBLAS
        if name.startswith("Step3p") and not config.get("need_fp32_gate"):
            return _BF16_LINEAR
        if name.startswith(("BailingMo", "SarvamMoE")) and config.get("router_dtype") is not None:
            return _FP32_ROUNDED if config["router_dtype"] == "fp32" else _BF16_LINEAR
        if computed == _MOE_GATE and config.get("router_fp32"):
            return _FP32_MOE_GATE
        return computed
    if architectures:
        raise ConfigError(
            f"{file} is of {' or '.join(architectures)}, must be of a model whose gate is hooked: "
            "docs/backends.md has them"
        )
    return _MOE_GATE


def _routing(config: Mapping[str, object]) -> tuple[int, int, int] | None:
    top_k = next((config[name] for name in _TOP_K if config.get(name)), None)
    groups = next((config[name] for name in _NUM_GROUPS if config.get(name)), 1)
    top_groups = config.get("topk_group") or 1
    if not (isinstance(top_k, int) and isinstance(groups, int) and isinstance(top_groups, int)):
        return None
    return groups, top_groups, top_k
