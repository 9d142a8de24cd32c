"""The MoE gate of DeepSeek-V2/V3-class models: router logits from a tiny GEMM."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglang.srt.layers.moe_router.backends import matmul_fp32
from sglang.srt.layers.moe_router.plan import Plan, find_plan, make_plan
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import is_cpu

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


logger = logging.getLogger(__name__)


class DeepseekV2Gate(nn.Module):
    """Router logits `[M, N]` of `hidden_states [M, K]` for N experts, in fp32.

    A call goes to the backend of the gate's plan; else to `sgl_kernel.dsv3_router_gemm`,
    which serves what it can; else to an fp32-output matmul.

    Args:
        config: the model's config; `n_routed_experts` is N, `hidden_size` is K, and
            `topk_method == "noaux_tc"` asks for `e_score_correction_bias`.
        quant_config: accepted for the signature of SGLang's gate; router weights are
            not quantised.
        prefix: likewise.

    Raises:
        ValueError: an environment variable holds a value that it does not have.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        num_experts, hidden_size = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(num_experts, dtype=torch.float32))
            if config.topk_method == "noaux_tc"
            else None
        )
        plan_gate(self)
        self.fallback_plan = make_plan(self.weight, "sgl_kernel")

    def forward(
        self,
        hidden_states: torch.Tensor,
        gemm_output_zero_allocator: Any = None,
        forward_batch: ForwardBatch | None = None,
    ) -> torch.Tensor:
        weight = self.weight
        logits = router_logits(self, hidden_states, forward_batch)
        if logits is None and self.fallback_plan.is_for(weight):
            logits = self.fallback_plan.logits(hidden_states, weight, forward_batch)
        return matmul_fp32(hidden_states, weight) if logits is None else logits


def plan_gate(
    gate: nn.Module,
    own_forward: Callable[..., torch.Tensor] | None = None,
    logits_dtype: torch.dtype | None = torch.float32,
    bias: torch.Tensor | None = None,
) -> None:
    """Makes the plan of a gate that has just been built, and loads what it needs.

    Args:
        gate: has `weight`, `[N, K]`.
        own_forward: the forward that is replaced; a kernel must give what that gives.
        logits_dtype: of what that gives; None for the weight's.
        bias: the gate's `bias`, `[N]`, if it adds one.

    Raises:
        ValueError: an environment variable holds a value that it does not have.
    """
    gate.router_plan = None
    method = getattr(gate, "quant_method", None)
    plain = type(method) is UnquantizedLinearMethod and not is_cpu()  # for AMX it packs the weight
    if method is not None and not plain:  # its bytes may not be what they seem
        say_why_left(type(gate).__name__, f"{type(method).__name__} may pack its weight")
        return
    gate.router_plan = make_plan(
        gate.weight,
        gate=gate,
        own_forward=own_forward,
        own_logits_dtype=logits_dtype or gate.weight.dtype,
        bias=bias,
    )


@functools.cache  # a line for all layers
def say_why_left(gate: str, reason: str) -> None:
    """Says why a gate gets no plan, as a phrase."""
    logger.info("Router GEMM: %s: SGLang's own serves: %s.", gate, reason)


def router_logits(
    gate: nn.Module, hidden_states: torch.Tensor, forward_batch: ForwardBatch | None = None
) -> torch.Tensor | None:
    """Logits `[M, N]` from the backend that serves this call, None if none does.

    Args:
        gate: has `weight`, `[N, K]`, and what `plan_gate` gave it.
        hidden_states: `[M, K]`.
        forward_batch: SGLang's batch, where the gate was given it.
    """
    plan: Plan | None = gate.router_plan
    if plan is None:
        return None
    compiling = torch.compiler.is_compiling()
    if not compiling and hidden_states.shape[0] not in plan.looked_at:
        return None  # first, because a prefill comes this way
    weight: torch.Tensor = gate.weight
    if not plan.is_for(weight):
        if compiling or plan.is_final:
            return None  # a trace cannot plan; the next eager call will
        plan = gate.router_plan = find_plan(weight, plan)
    bias = gate.bias if plan.target.bias else None
    logits = plan.logits(hidden_states, weight, forward_batch, bias)
    if logits is None and plan.serves_every_m:
        return matmul_fp32(hidden_states, weight, bias=bias)
    return logits
