"""The one table: the models whose gates were measured, and what `auto` takes for each.

To add a model, add a row. README.md, `doctor`, `prebuild` and the benchmark's shapes follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from sglang.srt.layers.moe_router.kernel import Form


class Auto(NamedTuple):
    """What `auto` takes on one SM, and for which M: where it was seen to be faster."""

    backend: str
    num_tokens: range
    measured: str | None = None
    """The day of the result that shows it, as YYYY-MM-DD; None where this project has none."""


class Route(NamedTuple):
    """How a model chooses among its experts: `n_group`, `topk_group` and `num_experts_per_tok`."""

    num_groups: int
    top_groups: int
    top_k: int
    auto: Mapping[int, str] = MappingProxyType({})
    """The SMs where `auto` takes `cluster_route`, each with the day of the result that shows it."""


class Model(NamedTuple):
    """One model's gate.

    `num_experts` and `hidden_size` are N and K: `n_routed_experts` and `hidden_size` in its
    config.json. `auto` is by SM, 10 * major + minor; every other SM is left to SGLang.
    `route` is None where `cluster_route` does not take the model's. `dtype` is the weight's, and
    `logits_dtype` that of what the gate gives, a `bias` added or not.
    """

    name: str
    num_experts: int
    hidden_size: int
    auto: Mapping[int, Auto]
    route: Route | None = None
    dtype: torch.dtype = torch.bfloat16
    logits_dtype: torch.dtype = torch.float32
    bias: bool = False

    @property
    def gate(self) -> tuple[int, int, torch.dtype, torch.dtype, bool]:
        """What it computes, as in a `Target`."""
        return self.num_experts, self.hidden_size, *self.form

    @property
    def form(self) -> Form:
        """The same without its shape."""
        return Form(self.dtype, self.logits_dtype, self.bias)


# SGLang PRs 17707 (SM 100) and 23285 (SM 103); not measured by this project.
_BLACKWELL = Auto("flashinfer", range(1, 17))

_UNGROUPED = Route(1, 1, 8, auto={90: "2026-11-30"})


def _cluster(fewest: int, most: int, measured: str) -> Mapping[int, Auto]:
    return {90: Auto("cluster", range(fewest, most + 1), measured)}


_UP_TO_128 = _cluster(1, 128, "2026-11-30")

# SM 90: docs/kernel.md. With fewer bytes of weights SGLang's own is faster at the smallest M.
MODELS: tuple[Model, ...] = (
    Model(
        "DeepSeek-V3",
        256,
        7168,
        {**_cluster(1, 128, "2026-11-27"), 100: _BLACKWELL, 103: _BLACKWELL},
        Route(8, 4, 8, auto={90: "2026-11-30"}),
    ),
    Model("Kimi-K2", 384, 7168, _UP_TO_128, _UNGROUPED),
    Model("Mistral Large 3", 128, 7168, _cluster(4, 128, "2026-11-30")),
    Model("GLM-5", 256, 6144, _UP_TO_128, _UNGROUPED),
    Model("DeepSeek-V2", 160, 5120, _cluster(2, 128, "2026-11-30")),
    Model("DeepSeek-V4-Flash", 256, 4096, _UP_TO_128),
    Model("GLM-5.3-Flash", 288, 4096, _UP_TO_128),  # Step-3.5's, too
    Model("DeepSeek-V4.1", 384, 5120, _UP_TO_128),
    Model("GLM-4.5", 160, 5120, _UP_TO_128, _UNGROUPED, dtype=torch.float32),
    Model("GLM-4.5-Air", 128, 4096, _UP_TO_128, _UNGROUPED, dtype=torch.float32),
    Model("MiniMax-M2", 256, 3072, _UP_TO_128, _UNGROUPED, dtype=torch.float32),
    Model("MiMo-V2-Flash", 256, 4096, _UP_TO_128, dtype=torch.float32),
    Model("Hy4", 256, 2816, _UP_TO_128, dtype=torch.float32),
    # From M = 64 on SGLang calls the package hpc, where that is installed; it was not measured.
    Model("LongCat-Flash", 768, 6144, _cluster(1, 63, "2026-11-30"), dtype=torch.float32),
    Model("Qwen3-235B", 128, 4096, _UP_TO_128, logits_dtype=torch.bfloat16),
    Model("Qwen3-30B", 128, 2048, _UP_TO_128, logits_dtype=torch.bfloat16),
    Model("Qwen3-Next", 512, 2048, _UP_TO_128, logits_dtype=torch.bfloat16),
    Model("Kimi-Linear", 256, 2304, _UP_TO_128, logits_dtype=torch.bfloat16),
    Model("gpt-oss-120b", 128, 2880, _UP_TO_128, logits_dtype=torch.bfloat16, bias=True),
)

DEEPSEEK_V3 = MODELS[0]


class Gate(NamedTuple):
    """Where SGLang has a model's gate, other than in DeepSeek's `MoEGate`.

    That is a class with `weight`, whose `forward(hidden_states)` gives the logits and does nothing
    but multiply. Or, with `linear`, a `ReplicatedLinear` under that name in a class.
    """

    module: str
    """Under `sglang.srt.models`."""
    name: str
    linear: str | None = None
    logits_dtype: torch.dtype | None = torch.float32
    """None where the logits have the weight's."""
    casting: tuple[str, ...] = ()
    """The methods of the class that widen hidden_states for the gate, in a launch of their own."""
    multiplying: tuple[str, ...] = ()
    """The methods of the class that multiply by the layer's weight themselves, in fp32, in a block
    whose attribute `fp32_if` is true; in another one they call the layer."""
    fp32_if: str | None = None
    method: str | None = None
    """What gives the logits from the layer's weight, `method(hidden_states)` of the class, where
    that is not the layer's own forward."""


_AS_WEIGHT = None

# The plugin hooks these as it hooks `MoEGate`. To add one, add a row.
GATES: tuple[Gate, ...] = (
    Gate("glm4_moe", "Glm4MoeGate"),  # GLM-4.5, 4.6
    Gate("glm4_moe_lite", "Glm4MoeLiteGate"),  # GLM-4.7-Flash
    Gate("mimo_v2", "MoEGate"),  # MiMo-V2
    Gate("bailing_moe", "BailingMoEGate", logits_dtype=torch.bfloat16),  # Ling 1, Ring
    Gate("bailing_moe_linear", "BailingMoEGate", logits_dtype=torch.bfloat16),  # Ring-linear
    Gate("dots3_common.modeling", "Dots3MoEGate", logits_dtype=_AS_WEIGHT),
    Gate("ernie4", "MoEGate", logits_dtype=_AS_WEIGHT),
    Gate("qwen2_moe", "Qwen2MoeSparseMoeBlock", "gate", _AS_WEIGHT),  # Qwen3-Next, Qwen3.5, too
    Gate("qwen3_moe", "Qwen3MoeSparseMoeBlock", "gate", _AS_WEIGHT),
    Gate("kimi_linear", "KimiMoE", "gate", _AS_WEIGHT),
    Gate("hunyuan", "HunYuanSparseMoeBlock", "gate", _AS_WEIGHT),
    Gate("gpt_oss", "GptOssSparseMoeBlock", "router", _AS_WEIGHT),
    Gate(
        "minimax_m2",
        "MiniMaxM2MoE",
        "gate",
        _AS_WEIGHT,
        casting=("forward_normal", "forward_deepep"),
    ),
    Gate(
        "hunyuan_v3",
        "HYV3MoEFused",
        "gate",
        _AS_WEIGHT,
        casting=("_forward_single_stream", "_forward_dual_stream"),
    ),
    Gate(
        "step3p5",  # Step-3.7 and the draft model, too
        "Step3p5MoEMLP",
        "gate",
        _AS_WEIGHT,
        multiplying=("forward_normal", "forward_deepep"),
        fp32_if="need_fp32_gate",
    ),
    Gate("longcat_flash", "LongcatFlashRouter", "classifier", method="forward"),
    Gate("minimax_m3", "MiniMaxM3MoE", "gate", method="_compute_router_logits"),
    Gate("beam", "BeamMoE", "gate", method="_router_logits"),
)


def find_model(
    num_experts: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    logits_dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> Model | None:
    """The first row of such a gate, None where the table has none."""
    gate = num_experts, hidden_size, dtype, logits_dtype, bias
    return next((model for model in MODELS if model.gate == gate), None)


def routing_phrase(num_experts: int, num_groups: int, top_groups: int, top_k: int) -> str:
    """A routing as a person says it."""
    within = f" in {top_groups} of {num_groups} groups" if num_groups > 1 else ""
    return f"top {top_k} of {num_experts} experts{within}"


def find_route(num_experts: int, num_groups: int, top_groups: int, top_k: int) -> Route | None:
    """The row of this routing, None where the table has none."""
    for model in MODELS:
        route = model.route
        if route is None or model.num_experts != num_experts:
            continue
        if route[:3] == (num_groups, top_groups, top_k):
            return route
    return None
