"""The MoE gate of DeepSeek-V2/V3-class models: router logits from a tiny GEMM."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglang.srt.utils.router_gemm import kernels
from sglang.srt.utils.router_gemm.call import RouterGemmCall, describe_call, device_sm
from sglang.srt.utils.router_gemm.environ import pdl_enabled, requested_backend
from sglang.srt.utils.router_gemm.ops import (
    cluster_router_gemm,
    empty_logits,
    flashinfer_dsv3_router_gemm,
    sgl_kernel_dsv3_router_gemm,
)
from sglang.srt.utils.router_gemm.policy import (
    RULES,
    Refusal,
    considered,
    decisions_by_num_tokens,
    refuse,
    select_backend,
)

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

_warned: set[str] = set()


class DeepseekV2Gate(nn.Module):
    """Router logits `[M, N]` of `hidden_states [M, K]` for N experts, in fp32.

    The kernel is chosen per call by `router_gemm.policy`. Where no fast path applies,
    `sgl_kernel.dsv3_router_gemm` serves what it can and an fp32-output matmul the rest.

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
        prepare_router_gemm(self.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        gemm_output_zero_allocator: Any = None,
        forward_batch: ForwardBatch | None = None,
    ) -> torch.Tensor:
        logits = fast_router_logits(hidden_states, self.weight, forward_batch)
        if logits is not None:
            return logits
        call = describe_call(hidden_states, self.weight, forward_batch)
        unavailable = kernels.unavailable("sgl_kernel", hidden_states.device, *self.weight.shape)
        if refuse("sgl_kernel", call, unavailable) is None:
            return sgl_kernel_dsv3_router_gemm(hidden_states, self.weight)
        return kernels.matmul_fp32(hidden_states, self.weight)


def fast_router_logits(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    forward_batch: ForwardBatch | None = None,
) -> torch.Tensor | None:
    """fp32 logits `[M, N]` from the backend that serves this call, None if none does.

    Args:
        hidden_states: `[M, K]`.
        weight: `[N, K]`.
        forward_batch: SGLang's batch, where the gate was given it.
    """
    requested = requested_backend()
    call = describe_call(hidden_states, weight, forward_batch)
    unavailable = {
        name: kernels.unavailable(name, hidden_states.device, call.num_experts, call.hidden_size)
        for name in considered(requested, call.sm)
    }
    backend, refusal = select_backend(call, requested, unavailable)
    if refusal is not None and requested in RULES and not torch.compiler.is_compiling():
        _warn_once(requested, refusal)
    if backend == "cluster":
        return cluster_router_gemm(hidden_states, weight)
    if backend == "flashinfer":
        logits = empty_logits(hidden_states, weight)
        flashinfer_dsv3_router_gemm(logits, hidden_states, weight)
        return logits
    if backend == "sgl_kernel":
        return sgl_kernel_dsv3_router_gemm(hidden_states, weight)
    if backend == "torch":
        return kernels.matmul_fp32(hidden_states, weight)
    return None


def prepare_router_gemm(weight: torch.Tensor) -> None:
    """Loads what the calls of a gate with this weight will need. For model load only.

    Args:
        weight: the gate's `[N, K]`, on the device where it will be used, or not yet.

    Raises:
        ValueError: an environment variable holds a value that it does not have.
    """
    requested = requested_backend()
    if not torch.cuda.is_available():
        return
    device = weight.device
    if device.type != "cuda":  # made on the CPU or the meta device, moved later
        device = torch.device("cuda", torch.cuda.current_device())
    num_experts, hidden_size = weight.shape
    _prepare_once(requested, device, num_experts, hidden_size, weight.dtype)


@functools.cache
def _prepare_once(
    requested: str,
    device: torch.device,
    num_experts: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    sm = device_sm(device.type, device.index)
    call = RouterGemmCall(device.type, sm, None, num_experts, hidden_size, dtype, dtype)
    names = considered(requested, sm)
    installed = {name: kernels.missing(name, sm) for name in names}
    backend, refusal = select_backend(call, requested, installed)
    if backend is not None:
        kernels.load(backend, device, num_experts, hidden_size)
    loaded = {name: kernels.unavailable(name, device, num_experts, hidden_size) for name in names}
    refusal = refusal or select_backend(call, requested, loaded).refusal
    if refusal is not None and refusal.condition == "unavailable":
        _warn_once(requested, refusal)
    logger.info(
        "Router GEMM [%d, %d] on SM %s: %s (backend %s, PDL %s)",
        num_experts,
        hidden_size,
        sm,
        ", ".join(
            f"M {served.tokens} {served.decision.backend or 'SGLang'}"
            for served in decisions_by_num_tokens(call, requested, loaded)
        ),
        requested,
        "on" if pdl_enabled() else "off",
    )


def _warn_once(requested: str, refusal: Refusal) -> None:
    """One warning a process for each condition, whatever the values that failed it."""
    if refusal.condition in _warned:
        return
    _warned.add(refusal.condition)
    logger.warning(
        "Router GEMM (backend %s): SGLang's own path serves instead: %s.", requested, refusal.reason
    )
