"""The one table: the models whose gates were measured, and what `auto` takes for each.

To add a model, add a row. README.md, `doctor`, `prebuild` and the benchmark's shapes follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch


class Auto(NamedTuple):
    """What `auto` takes on one SM, and for which M: where it was seen to be the fastest."""

    backend: str
    num_tokens: range


class Route(NamedTuple):
    """How a model chooses among its experts: `n_group`, `topk_group` and `num_experts_per_tok`."""

    num_groups: int
    top_groups: int
    top_k: int
    auto: tuple[int, ...] = ()
    """The SMs where `auto` takes `cluster_route`: where it was seen to be the fastest."""


class Model(NamedTuple):
    """One model's gate.

    `num_experts` and `hidden_size` are N and K: `n_routed_experts` and `hidden_size` in its
    config.json. `auto` is by SM, 10 * major + minor; every other SM is left to SGLang.
    `route` is None where `cluster_route` does not take the model's. `dtype` is the weight's.
    """

    name: str
    num_experts: int
    hidden_size: int
    auto: Mapping[int, Auto]
    route: Route | None = None
    dtype: torch.dtype = torch.bfloat16


# SGLang PRs 17707 (SM 100) and 23285 (SM 103); not measured by this project.
_BLACKWELL = Auto("flashinfer", range(1, 17))

_UNGROUPED = Route(1, 1, 8, auto=(90,))

# SM 90: docs/kernel.md. With fewer bytes of weights SGLang's own is faster at the smallest M.
MODELS: tuple[Model, ...] = (
    Model(
        "DeepSeek-V3",
        256,
        7168,
        {90: Auto("cluster", range(1, 129)), 100: _BLACKWELL, 103: _BLACKWELL},
        Route(8, 4, 8, auto=(90,)),
    ),
    Model("Kimi-K2", 384, 7168, {90: Auto("cluster", range(1, 17))}, _UNGROUPED),
    Model("Mistral Large 3", 128, 7168, {90: Auto("cluster", range(4, 17))}),
    Model("GLM-5", 256, 6144, {90: Auto("cluster", range(1, 17))}, _UNGROUPED),
    Model("DeepSeek-V2", 160, 5120, {90: Auto("cluster", range(2, 17))}),
    Model("GLM-4.5", 160, 5120, {}, dtype=torch.float32),
    Model("GLM-4.5-Air", 128, 4096, {}, dtype=torch.float32),
)

DEEPSEEK_V3 = MODELS[0]


class Gate(NamedTuple):
    """A model's gate that is nothing but its weight: `forward(hidden_states)` gives fp32 logits."""

    module: str
    """Under `sglang.srt.models`."""
    name: str


# The plugin hooks these as it hooks DeepSeek's `MoEGate`. To add one, add a row.
GATES: tuple[Gate, ...] = (
    Gate("glm4_moe", "Glm4MoeGate"),  # GLM-4.5, 4.6
    Gate("glm4_moe_lite", "Glm4MoeLiteGate"),  # GLM-4.7-Flash
    Gate("mimo_v2", "MoEGate"),  # MiMo-V2
)


def find_model(
    num_experts: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16
) -> Model | None:
    """The row of such a weight, None where the table has none."""
    for model in MODELS:
        if (model.num_experts, model.hidden_size, model.dtype) == (num_experts, hidden_size, dtype):
            return model
    return None


def find_route(num_experts: int, num_groups: int, top_groups: int, top_k: int) -> Route | None:
    """The row of this routing, None where the table has none."""
    for model in MODELS:
        route = model.route
        if route is None or model.num_experts != num_experts:
            continue
        if route[:3] == (num_groups, top_groups, top_k):
            return route
    return None
