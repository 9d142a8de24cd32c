"""What stands between the gate's GEMM and the first expert GEMM, and how long it takes.

    python3 benchmark_route.py
    python3 benchmark_route.py --num-tokens 1 8 64 --save-path results
    python3 benchmark_route.py --from-json results/route_h200.json

The `chain` of the router-GEMM benchmark: the norm ahead of the gate, the `cluster` GEMM, then a
routing, 58 links in one CUDA graph, each with a weight and a bias of its own, as in DeepSeek-V3.
What is printed and saved is a link less that of the GEMM alone. Before anybody is timed, his
experts are compared with SGLang's own: ours bit for bit, and the plan of the expert GEMM too.
What is wrong is not timed.
"""

from __future__ import annotations

import functools
import importlib
import json
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmark_deepgemm_dsv3_router_gemm_blackwell import MAX_NUM_TOKENS, _integer_in, _Parser
from router_gemm_benchmark import how_to_call

if TYPE_CHECKING:
    import torch
    from router_gemm_benchmark.providers import Gemm
    from router_gemm_benchmark.timing import Bench, Failure

NUM_TOKENS, ROUNDS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128), 30
WIDTH = 100

# DeepSeek-V3's config.json; one shared expert behind the 256, if SGLang fuses it.
NUM_EXPERTS, HIDDEN_SIZE, TOP_K = 256, 7168, 8
NUM_GROUPS, TOP_GROUPS, SCALE = 8, 4, 2.5
BLOCK_SIZE = 16  # of SGLang's fp8 expert GEMM at these M

GATE = "gate"
# By provider: what it is. The shared expert is the ninth column.
NOTES = {
    GATE: "the router GEMM alone, with the norm ahead of it taken off",
    "FlashInfer fused_topk_deepseek": "8 columns, through SGLang's biased_grouped_topk_gpu",
    "SGLang Triton moe_fused_gate": "8 columns, grouped, sglang.kernels.ops.moe.moe_fused_gate",
    "vLLM grouped_topk": "8 columns, vLLM's fused_grouped_topk",
    "SGLang": "9 columns, select_experts of the installed release",
    "SGLang + align": f"that, and its moe_align_block_size, blocks of {BLOCK_SIZE}",
    "ours: route": "8 columns, cluster_route",
    "ours: route + align": f"9 columns and the plan, cluster_route, blocks of {BLOCK_SIZE}",
}
# Another order of rounding may choose another expert where two are as good, so not bit for bit.
ROUNDS_OTHERWISE = ("SGLang Triton moe_fused_gate", "vLLM grouped_topk")
LEAST_AGREEMENT = 0.95  # of the rows, then; seen is 1 in thousands, and M = 1 has 58 of them


@dataclass
class Microseconds:
    """Of one link: quartiles over the rounds."""

    provider: str
    num_tokens: int
    q25_us: float
    median_us: float
    q75_us: float


@dataclass
class Report:
    """What a run leaves, as it is in the JSON file."""

    gpu: str
    driver: str | None
    versions: dict[str, str | None]
    date: str
    command: str
    num_tokens: list[int]
    rounds: int
    links: int
    producer: str | None = None
    """The norm ahead of the gate."""
    skipped: dict[str, str] = field(default_factory=dict)
    """By provider, why it is not there."""
    failures: list[Failure] = field(default_factory=list)
    """Who was wrong or raised; the mode is `check` where that was before the timing."""
    gate: list[Microseconds] = field(default_factory=list)
    """The GEMM alone."""
    behind_gate: list[Microseconds] = field(default_factory=list)
    """Everybody else, less the GEMM's median."""
    error: str | None = None
    """What ended the run early."""


# ---- Who is measured ---------------------------------------------------------------------------


class Routed(NamedTuple):
    """fp32 weights and int32 ids, `[M, columns]`, and ours: the plan of the expert GEMM."""

    weights: torch.Tensor
    ids: torch.Tensor
    plan: tuple[torch.Tensor, ...] | None = None


class Call(NamedTuple):
    """One link's routing: bf16 `[M, K]` and fp32 `[M, N]`, and what came of them."""

    link: int
    hidden_states: torch.Tensor
    logits: torch.Tensor
    routed: Routed


Route = Callable[["torch.Tensor", "torch.Tensor", int, bool], Routed]
"""`route(hidden_states, logits, link, pdl)`"""


class Layers:
    """SGLang's own functions, without this plugin, and a bias and a config for each link.

    Args:
        weights: of the gates, bf16 `[LINKS, N, K]`.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        import torch

        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
        from sglang_router_gemm.hooks import ALIGN, TOPK

        device = weights.device
        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device=device.type))
        self.topk: Any = importlib.import_module(TOPK)
        self.select = without_plugin(self.topk.select_experts)
        self.align = without_plugin(importlib.import_module(ALIGN).moe_align_block_size)
        self.links = {weight.data_ptr(): link for link, weight in enumerate(weights)}
        self.biases = list(torch.randn(len(weights), NUM_EXPERTS, device=device) / 10)
        self.configs = {
            num_shared: [self._config(num_shared, bias) for bias in self.biases]
            for num_shared in (0, 1)
        }

    def _config(self, num_shared: int, bias: torch.Tensor) -> Any:
        config = self.topk.TopKConfig
        shared = {"num_fused_shared_experts": num_shared}
        if not hasattr(config, "num_fused_shared_experts"):  # since 0.5.23
            shared = {"shared_experts": self.topk.SharedExpertsConfig(**shared)}
        return config(
            TOP_K + num_shared,
            use_grouped_topk=True,
            num_expert_group=NUM_GROUPS,
            topk_group=TOP_GROUPS,
            correction_bias=bias,
            routed_scaling_factor=SCALE,
            scoring_func="sigmoid",
            **shared,
        )


def without_plugin(function: Any) -> Any:
    """SGLang's function, where the plugin has put a `functools.partial` in its place."""
    return function.__wrapped__ if isinstance(function, functools.partial) else function


def make_route(name: str, layers: Layers) -> Route:
    """Imports or builds a provider.

    Raises:
        Skip: it is not there; or whatever the import raises.
    """
    from router_gemm_benchmark.providers import Skip, _kernel

    device, biases, topk = layers.biases[0].device, layers.biases, layers.topk
    if name.startswith("FlashInfer"):
        if getattr(topk, "fused_topk_deepseek", None) is None:
            raise Skip("SGLang has not found FlashInfer's fused_topk_deepseek")
        routing = (TOP_K, True, NUM_GROUPS, TOP_GROUPS, 0, SCALE, False)
        return lambda hidden_states, logits, link, pdl: Routed(
            *topk.biased_grouped_topk_gpu(hidden_states, logits, biases[link], *routing)
        )
    if name.startswith("SGLang Triton"):
        gate = _kernel(device, ("sglang.kernels.ops.moe.moe_fused_gate", "moe_fused_gate"))
        groups = {"num_expert_group": NUM_GROUPS, "topk_group": TOP_GROUPS}
        return lambda hidden_states, logits, link, pdl: Routed(
            *gate(logits, biases[link], TOP_K, routed_scaling_factor=SCALE, **groups)
        )
    if name.startswith("vLLM"):
        # The one moved in 2026; both are asked for, and a reason names both.
        package, function = "vllm.model_executor.layers.fused_moe", "fused_grouped_topk"
        places = (f"{package}.router.grouped_topk_router", f"{package}.fused_moe")
        vllm = _kernel(device, *((place, function) for place in places))
        groups = {"num_expert_group": NUM_GROUPS, "topk_group": TOP_GROUPS}
        return lambda hidden_states, logits, link, pdl: Routed(
            *vllm(
                hidden_states,
                logits,
                TOP_K,
                renormalize=True,
                e_score_correction_bias=biases[link],
                scoring_func="sigmoid",
                routed_scaling_factor=SCALE,
                **groups,
            )
        )
    if name.startswith("ours"):
        return _ours(layers, *((1, BLOCK_SIZE) if name.endswith("align") else (0, 0)))
    return _sglang(layers, aligned=name.endswith("align"))


def _sglang(layers: Layers, aligned: bool) -> Route:
    def route(hidden_states: torch.Tensor, logits: torch.Tensor, link: int, pdl: bool) -> Routed:
        own = layers.select(hidden_states, logits, layers.configs[1][link])
        if aligned:
            layers.align(own.topk_ids, BLOCK_SIZE, NUM_EXPERTS + 1)
        return Routed(own.topk_weights, own.topk_ids)

    return route


def _ours(layers: Layers, num_shared: int, block_size: int) -> Route:
    """`cluster_route`, as a layer's plan has found it to have the bits of SGLang's own."""
    from router_gemm_benchmark.providers import Skip, environment

    from sglang.srt.layers.moe_router.route import make_route_plan

    with environment(SGLANG_ROUTER_GEMM_BACKEND="cluster"):
        plan = make_route_plan(layers.configs[num_shared][0], layers.select)
    if plan is None or plan.kernel is None or plan.variant is None:
        raise Skip(plan.reason if plan is not None else "there is no bias")
    kernel, variant = plan.kernel, plan.variant
    factors = plan.asked.scale_here, plan.asked.shared_weight(variant)
    return lambda hidden_states, logits, link, pdl: Routed(
        *kernel(logits, layers.biases[link], variant, *factors, pdl, block_size)
    )


class Link:
    """A GEMM and the routing behind it, called as a GEMM is."""

    def __init__(self, layers: Layers, gate: Gemm, route: Route) -> None:
        self.layers, self.gate, self.route = layers, gate, route
        self.last: Call | None = None
        """Of the last call, whose memory in a graph thus stays its own."""

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        logits = self.gate(hidden_states, weight, out, pdl)
        link = self.layers.links[weight.data_ptr()]
        routed = self.route(hidden_states, logits, link, pdl)
        self.last = Call(link, hidden_states, logits, routed)
        return logits


# ---- Whether they are right --------------------------------------------------------------------


def why_wrong(layers: Layers, calls: Sequence[Call], exact: bool) -> str | None:
    """What differs from SGLang's own, as a phrase; None if nothing does.

    Args:
        exact: bit for bit, else the same experts in `LEAST_AGREEMENT` of all rows.
    """
    import torch

    from sglang_router_gemm.routing import agreement

    shares = []
    for link, hidden_states, logits, (weights, ids, plan) in calls:
        own = layers.select(hidden_states, logits, layers.configs[ids.shape[1] - TOP_K][link])
        if not exact:
            shares.append(agreement(ids.sort().values, own.topk_ids.sort().values))
        elif not torch.equal(ids, own.topk_ids):
            return f"other experts than SGLang's in link {link + 1}"
        elif not torch.equal(*(each.view(torch.int32) for each in (weights, own.topk_weights))):
            return f"other weights than SGLang's in link {link + 1}"
        if plan is not None:
            aligned = layers.align(own.topk_ids, BLOCK_SIZE, NUM_EXPERTS + 1)
            reason = why_plan_wrong(plan, aligned)
            if reason is not None:
                return f"{reason} in link {link + 1}"
    share = sum(shares) / len(shares) if shares else 1.0
    if share >= LEAST_AGREEMENT:
        return None
    return f"SGLang's experts in {share:.0%} of the rows, must be {LEAST_AGREEMENT:.0%}"


def why_plan_wrong(plan: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> str | None:
    """The same blocks and the same tokens in each, ours in their order, SGLang's in any."""
    import torch

    (tokens, experts, padded), (own_tokens, own_experts, own_padded) = plan, own
    total = int(own_padded)
    if int(padded) != total:
        return f"the plan has {int(padded)} places, must have {total},"
    experts, own_experts = (each[: total // BLOCK_SIZE] for each in (experts, own_experts))
    if not torch.equal(experts, own_experts):
        return "the plan's blocks are other experts'"
    first = experts.repeat_interleave(BLOCK_SIZE).long() << 32
    if not torch.equal(first + tokens[:total], (first + own_tokens[:total]).sort().values):
        return "the plan has other tokens, or in another order,"
    return None


def check(bench: Bench, link: Link, num_tokens: int, exact: bool) -> str | None:
    """Calls all links in a row, with PDL, and compares each afterwards."""
    hidden_states = bench.random_tokens(num_tokens)
    calls = []
    try:
        for weight in bench.weights:
            link(hidden_states, weight, hidden_states.new_empty(0), True)
            assert link.last is not None
            calls.append(link.last)
        return why_wrong(link.layers, calls, exact)
    except Exception as error:  # this provider is out, the run goes on
        from sglang.srt.layers.moe_router.packages import first_line

        return first_line(error)
