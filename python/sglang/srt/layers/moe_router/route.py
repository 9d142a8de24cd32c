"""The routing of a layer behind its gate: who chooses the experts, and who plans their GEMM.

`decide` is the one place where it is decided whether `cluster_route` does. That gives the bits
of SGLang's own top-k: it is held against that when the model loads, and where one bit differs
SGLang's own serves. So ranks need not agree, and any call may go either way.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from sglang.srt.layers.moe_router import cluster_route, cluster_router_gemm
from sglang.srt.layers.moe_router.backends import LOAD_LIMIT_S
from sglang.srt.layers.moe_router.cluster_route import (
    BLOCK_SIZES,
    MAX_NUM_TOKENS,
    ExpertPlan,
    Kernel,
    Routing,
    Variant,
    is_plan_of,
    variants,
)
from sglang.srt.layers.moe_router.environ import AUTO, OFF, pdl_enabled, requested_backend
from sglang.srt.layers.moe_router.isolation import run_isolated
from sglang.srt.layers.moe_router.kernel import device_sm, is_aligned
from sglang.srt.layers.moe_router.models import Route, find_route, routing_phrase
from sglang.srt.layers.moe_router.packages import first_line
from sglang.srt.layers.moe_router.plan import (
    OfThisProcess,
    deterministic_inference,
    is_plain_eager,
)

logger = logging.getLogger(__name__)

_BACKEND = "cluster"  # the setting that asks for it, besides `auto`
_MIN_SM = 90
_OTHER_BITS = "SGLang's own gives other ids, weights or another plan"

OwnSelect = Callable[..., Any]
"""SGLang's `select_experts(hidden_states, router_logits, topk_config, ...)`."""


# ---- What is asked for -------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a `TopKConfig` of SGLang says of ids and weights."""

    columns: int
    num_shared: int
    num_groups: int
    top_groups: int
    renormalize: bool
    scale: float | None
    """What the routed weights are multiplied with, here or behind the experts."""
    scales_here: bool
    scoring_func: str
    is_biased: bool
    """It chooses by sigmoid and a correction bias, in groups or without."""
    unknown: tuple[object, ...]
    """The values of all fields that are not read here; see `_unknown_fields`."""
    scales_shared: bool = False
    """The shared experts' weights have a factor of their own; 1, as GLM-4.5's, is none."""

    def routing(self, num_experts: int) -> Routing:
        """What the kernel is compiled for."""
        return Routing(
            num_experts,
            self.num_groups,
            self.top_groups,
            self.columns - self.num_shared,
            self.num_shared,
            self.renormalize,
        )

    @property
    def scale_here(self) -> float:
        """What the routed weights are multiplied with here."""
        return self.scale if self.scales_here and self.scale else 1.0

    @classmethod
    def of_model(cls, route: Route) -> Asked:
        """What SGLang asks for a model of the table, without a fused shared expert."""
        groups, top_groups, top_k = route[:3]
        return cls(top_k, 0, groups, top_groups, True, None, False, "sigmoid", True, ())

    def shared_weight(self, variant: Variant) -> float:
        """The shared expert's weight, or its share of the others' sum."""
        if not self.scale or (self.scales_here and variant.shared_order is None):
            return 1.0
        return 1.0 / self.scale


def ask(config: Any) -> Asked:
    """Reads SGLang's `TopKConfig`. Called for each call: a model sets some fields late."""
    num_shared = getattr(config, "num_shared_topk_slots", None)  # SGLang < 0.5.23 has the other
    grouped = bool(config.use_grouped_topk)
    # Without groups SGLang has another arithmetic for PyTorch's own experts.
    by_sigmoid = config.scoring_func == "sigmoid" and not config.torch_native
    return Asked(
        config.top_k,
        config.num_fused_shared_experts if num_shared is None else num_shared,
        (grouped and config.num_expert_group) or 1,
        (grouped and config.topk_group) or 1,
        bool(config.renormalize),
        config.routed_scaling_factor,
        bool(config.apply_routed_scaling_factor_on_output),
        config.scoring_func,
        config.correction_bias is not None and (grouped or by_sigmoid),
        tuple(getattr(config, name) for name in _unknown_fields(config.__class__)),
        config.fused_shared_experts_scaling_factor not in (None, 1),
    )


# Where ids and weights go, and who looks on: without a say in them.
_WITHOUT_A_SAY = {
    "output_format",
    "runner_backend",
    "routing_method_type",
    "allow_routed_experts_capture",
    "layer_id",
}
_READ = {
    "top_k",
    "shared_experts",
    "num_fused_shared_experts",
    "fused_shared_experts_scaling_factor",
    "num_expert_group",
    "topk_group",
    "renormalize",
    "routed_scaling_factor",
    "apply_routed_scaling_factor_on_output",
    "scoring_func",
    "use_grouped_topk",
    "correction_bias",
    "torch_native",
}


@functools.cache
def _unknown_fields(config_class: type) -> dict[str, object]:
    """The other fields, some of a later release perhaps: each must have its default."""
    return {
        each.name: each.default
        for each in fields(config_class)
        if each.name not in _READ | _WITHOUT_A_SAY and not each.name.startswith("_")
    }


# ---- The decision ------------------------------------------------------------------------------


def decide(
    requested: str,
    sm: int | None,
    asked: Asked,
    defaults: tuple[object, ...],
    num_experts: int,
    deterministic: bool = False,
) -> str | None:
    """Why SGLang's own routing serves a layer, as a phrase; None if `cluster_route` may.

    Args:
        requested: what the user asked for: a backend's name, `auto` or `off`.
        sm: of the layer's device.
        asked: what SGLang's config says.
        defaults: what its unknown fields must be.
        num_experts: routed ones.
        deterministic: the server runs with `--enable-deterministic-inference`.
    """
    if requested not in (AUTO, _BACKEND):
        return "it is switched off" if requested == OFF else f"the backend is {requested}"
    if deterministic:
        return "deterministic inference is on"
    if sm is None or sm < _MIN_SM:
        return f"SM is {sm}, must be {_MIN_SM} or newer"
    if not asked.is_biased:
        return "it is not a top-k by sigmoid and a correction bias"
    if asked.unknown != defaults:
        return f"its config has {asked.unknown}, must have {defaults}"
    if asked.scales_shared:
        return "the shared expert's weight has a factor of its own"
    routing = asked.routing(num_experts)
    refusal = routing.refusal()
    if refusal is not None or requested == _BACKEND:
        return refusal
    route = find_route(num_experts, routing.num_groups, routing.top_groups, routing.top_k)
    if route is None or sm not in route.auto:
        return f"auto does not take this routing on SM {sm}"
    return None


# ---- The plan ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RoutePlan(OfThisProcess):
    """Who routes the calls with one `TopKConfig`. Layers of one model share it."""

    asked: Asked
    num_experts: int
    device: torch.device
    reason: str | None
    """Why SGLang's own serves; None if `kernel` does."""
    kernel: Kernel | None = None
    variant: Variant | None = None
    pdl: bool = True
    block_sizes: dict[int, int] = field(default_factory=dict)
    """By M, the block size that the expert GEMM last asked for. Only a guess: whoever is
    given a plan for another block size has the experts planned anew."""

    def select(
        self, logits: torch.Tensor, config: Any, with_plan: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights and ids of a call's tokens; None where SGLang's own must serve it.

        Args:
            logits: `[M, N]`, of the gate.
            config: SGLang's, with the correction bias.
            with_plan: the ids will stay as they are, so a plan may lie on them.

        Returns:
            fp32 and int32, `[M, columns]`, best expert first and the shared one last.
        """
        bias = config.correction_bias
        if (
            self.kernel is None
            or self.variant is None
            or ask(config) != self.asked
            or logits.dtype != torch.float32
            or bias.dtype != torch.float32
            or logits.dim() != 2
            or logits.shape[1] != self.num_experts
            or bias.shape != (self.num_experts,)
            or not (logits.device == bias.device == self.device)
        ):
            return None
        num_tokens = logits.shape[0]
        dense = logits.is_contiguous() and bias.is_contiguous() and is_aligned(logits, bias)
        served = 1 <= num_tokens <= MAX_NUM_TOKENS and dense
        if not served or not is_plain_eager(logits, profiled=True):
            return None
        size = self.block_sizes.get(num_tokens, 0) if with_plan else 0
        weights, ids, plan = self.kernel(
            logits,
            bias,
            self.variant,
            self.asked.scale_here,
            self.asked.shared_weight(self.variant),
            self.pdl,
            size,
        )
        if with_plan and not ids.is_inference():  # else nobody could tell whether they change
            ids.expert_plan = PlanOfIds(self, size, plan, ids._version)
        return weights, ids


class PlanOfIds(NamedTuple):
    """What `RoutePlan.select` leaves on the ids that it returns, for whoever aligns them."""

    route: RoutePlan
    block_size: int
    plan: ExpertPlan | None
    version: int
    """Of the ids, which count their changes."""

    def take(self, ids: torch.Tensor, block_size: int, num_experts: int) -> ExpertPlan | None:
        """The plan, if it is one for these ids, this block size and so many experts."""
        asked = self.route.asked
        if num_experts != self.route.num_experts + asked.num_shared or ids._version != self.version:
            return None
        if block_size in BLOCK_SIZES:
            self.route.block_sizes[ids.shape[0]] = block_size
        return self.plan if block_size == self.block_size else None


# ---- Making it ---------------------------------------------------------------------------------

_plans: dict[tuple[object, ...], RoutePlan] = {}


def make_route_plan(config: Any, own_select: OwnSelect) -> RoutePlan | None:
    """The plan of a layer with this `TopKConfig`; loads the kernel. For model load only.

    Args:
        config: SGLang's.
        own_select: SGLang's function, which the kernel is held against.

    Returns:
        None where there is no correction bias that says how many experts there are.

    Raises:
        ValueError: an environment variable holds a value that it does not have.
    """
    bias = config.correction_bias
    if bias is None or bias.dim() != 1:
        return None
    device = bias.device
    if device.type != "cuda" and torch.cuda.is_available():
        # Made on the CPU or the meta device, and moved later.
        device = torch.device("cuda", torch.cuda.current_device())
    requested, deterministic = requested_backend(), deterministic_inference()
    asked, num_experts = ask(config), bias.shape[0]
    key = (requested, deterministic, asked, num_experts, device, own_select, pdl_enabled())
    if key not in _plans:
        sm = device_sm(device)
        defaults = tuple(_unknown_fields(config.__class__).values())
        reason = decide(requested, sm, asked, defaults, num_experts, deterministic)
        plan = RoutePlan(asked, num_experts, device, reason, pdl=pdl_enabled())
        if reason is None:
            assert sm is not None
            plan = _loaded(plan, sm, config, own_select)
        _plans[key] = plan
        could = reason is None and plan.reason != _OTHER_BITS  # which nobody can mend
        _announce(plan, wanted=could or requested == _BACKEND)
    return _plans[key]


def _loaded(plan: RoutePlan, sm: int, config: Any, own_select: OwnSelect) -> RoutePlan:
    """The plan with its kernel, or with the reason why it has none."""
    missing = cluster_router_gemm.missing(sm)
    if missing is not None:
        return replace(plan, reason=missing)
    routing = plan.asked.routing(plan.num_experts)

    def load() -> tuple[Kernel, Variant | None]:
        kernel = cluster_route.load(routing, plan.device, sm)
        return kernel, _find_variant(kernel, plan, config, own_select)

    try:
        kernel, variant = run_isolated(load, plan.device, LOAD_LIMIT_S)
    except Exception as error:  # whatever nvcc, the driver or SGLang's own raise
        logger.info("Routing: cluster_route did not load.", exc_info=True)
        return replace(plan, reason=f"cluster_route did not load ({first_line(error)})")
    if variant is None:
        return replace(plan, reason=_OTHER_BITS)
    return replace(plan, kernel=kernel, variant=variant)


def _find_variant(
    kernel: Kernel, plan: RoutePlan, config: Any, own_select: OwnSelect
) -> Variant | None:
    """The variant whose ids and weights have the bits of SGLang's own; None if none has."""
    logits, bias = _trial_rows(plan.num_experts)
    logits, bias = logits.to(plan.device), bias.to(plan.device)
    theirs = own_select(
        torch.zeros(logits.shape[0], 8, dtype=torch.bfloat16, device=plan.device),
        logits,
        # Nobody must take these for a request's.
        replace(config, correction_bias=bias, allow_routed_experts_capture=False),
    )
    expected = theirs.topk_ids, theirs.topk_weights.contiguous().view(torch.int32)
    for variant in variants(kernel.routing):
        shared_weight = plan.asked.shared_weight(variant)
        # With an M of each of the kernel's functions, and without a plan.
        for rows, size in ((16, 16), (32, 16), (64, 16), (MAX_NUM_TOKENS, 16), (MAX_NUM_TOKENS, 0)):
            found = [
                kernel(each, bias, variant, plan.asked.scale_here, shared_weight, False, size)
                for each in logits.split(rows)
            ]
            ids = torch.cat([each[1] for each in found])
            weights = torch.cat([each[0] for each in found])
            same_ids = torch.equal(ids, expected[0])
            if not (same_ids and torch.equal(weights.view(torch.int32), expected[1])):
                break
            num_experts = plan.num_experts + plan.asked.num_shared
            if not all(
                experts is None or is_plan_of(experts, each, size, num_experts)
                for _, each, experts in found
            ):
                return None
        else:
            return variant
    return None


def _trial_rows(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits and bias, drawn and made up: ties, extremes and what is not a number."""
    generator = torch.Generator("cpu").manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    bias = draw(num_experts) / 10
    usual, wide = draw(640, num_experts), draw(128, num_experts) * 20
    rough = (draw(128, num_experts) * 2).round() / 2
    equal = torch.zeros(16, num_experts, device="cpu", dtype=torch.float32)
    negative = draw(64, num_experts) * 2 - 17
    odd = draw(64, num_experts)
    odd[::2, ::17], odd[1::2, ::13], odd[1::4, ::19] = torch.nan, torch.inf, -torch.inf
    return torch.cat([usual, wide, rough, equal, negative, odd]), bias


def _announce(plan: RoutePlan, wanted: bool) -> None:
    """Says once a routing who serves it; warns where ours was asked for and cannot."""
    if plan.device.type != "cuda":
        return
    asked = plan.asked
    groups, top_k = (asked.num_groups, asked.top_groups), asked.columns - asked.num_shared
    what = routing_phrase(plan.num_experts, *groups, top_k)
    if asked.num_shared:
        what += f", {asked.num_shared} shared"
    if plan.reason is None:
        logger.info(
            "Routing, %s: M 1-%d cluster_route, with the plan of the expert GEMM where the "
            "Triton runner asks for one; M %d+ SGLang",
            what,
            MAX_NUM_TOKENS,
            MAX_NUM_TOKENS + 1,
        )
    else:
        level = logging.WARNING if wanted else logging.INFO
        logger.log(level, "Routing, %s: SGLang's own serves: %s.", what, plan.reason)


# ---- SGLang's two functions --------------------------------------------------------------------


def select_experts(
    own_select: OwnSelect,
    topk: Any,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    topk_config: Any,
    *,
    layer_id: int | None = None,
    num_token_non_padded: torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
    **others: Any,
) -> Any:
    """SGLang's `select_experts`, by the layer's plan where that serves the call.

    Args:
        own_select: SGLang's function.
        topk: SGLang's module `sglang.srt.layers.moe.topk`.
        others: what later releases added; anything but None is left to SGLang.
    """
    selected = None
    if (
        not torch.compiler.is_compiling()  # first: a trace should see nothing of a plan
        and expert_location_dispatch_info is None
        and all(value is None for value in others.values())
    ):
        plan: RoutePlan | None = getattr(topk_config, "route_plan", None)
        if plan is not None:
            # SGLang's mask of padded rows writes to the ids, and PyTorch does not count that.
            with_plan = num_token_non_padded is None
            selected = plan.select(router_logits, topk_config, with_plan)
    if selected is None:
        return own_select(
            hidden_states,
            router_logits,
            topk_config,
            layer_id=layer_id,
            num_token_non_padded=num_token_non_padded,
            expert_location_dispatch_info=expert_location_dispatch_info,
            **others,
        )
    weights, ids = selected
    recorder = topk.get_global_expert_distribution_recorder()
    if num_token_non_padded is None and type(recorder).on_select_experts is _records_nothing():
        topk.capture_routed_experts_if_allowed(topk_config, layer_id, ids)
    else:
        # What SGLang does behind its top-k: padded rows, statistics.
        ids, weights, recorded = topk._post_process_topk_ids(
            topk_ids=ids,
            topk_weights=weights,
            topk_config=topk_config,
            router_logits=router_logits,
            layer_id=layer_id,
            num_token_non_padded=num_token_non_padded,
            expert_location_dispatch_info=None,
        )
        if recorded is not None:
            recorder.on_select_experts(topk_ids=recorded)
    return topk.StandardTopKOutput(weights, ids, router_logits)


@functools.cache
def _records_nothing() -> Callable[..., None]:
    # Not imported above: SGLang's modules import each other, and this one meanwhile.
    from sglang.srt.eplb.expert_distribution import ExpertDistributionRecorder

    return ExpertDistributionRecorder.on_select_experts


def moe_align_block_size(
    own_align: Callable[..., Any],
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """SGLang's `moe_align_block_size`; the plan that came with the ids, where there is one."""
    if not torch.compiler.is_compiling() and not any(args) and not any(kwargs.values()):
        of_ids: PlanOfIds | None = getattr(topk_ids, "expert_plan", None)
        plan = of_ids.take(topk_ids, block_size, num_experts) if of_ids is not None else None
        if plan is not None:
            return tuple(plan)
    return own_align(topk_ids, block_size, num_experts, *args, **kwargs)
