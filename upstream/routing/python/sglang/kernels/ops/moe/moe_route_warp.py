"""Biased sigmoid top-k of DeepSeek-V3-class models on Hopper, a warp a token.

One launch gives the experts, their weights and the shared expert's column, see
csrc/moe/route_warp.cuh. Ids and weights have the bits of what ``select_experts`` runs
otherwise: FlashInfer's ``fused_topk_deepseek`` where there are groups, else
``moe_fused_gate`` as Triton 3.8 compiles it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.kernels.jit.utils import (
    cache_once,
    is_arch_support_pdl,
    load_jit,
    make_cpp_args,
)
from sglang.kernels.kernel_api_logging import debug_kernel_api
from sglang.srt.utils.custom_op import register_custom_op

if TYPE_CHECKING:
    from tvm_ffi.module import Module

# num_experts, num_groups, top_groups and top_k for which the kernel was measured to be
# faster than what ran before, on SM90 and for up to so many tokens.
ROUTINGS: frozenset[tuple[int, int, int, int]] = frozenset()
MAX_NUM_TOKENS = 128


def can_route_warp(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    top_groups: int,
    top_k: int,
    num_shared: int,
) -> bool:
    """Whether the kernel takes these operands, and was measured for this routing."""
    return (
        logits.dim() == 2
        and (logits.shape[1], num_groups, top_groups, top_k) in ROUTINGS
        and 1 <= logits.shape[0] <= MAX_NUM_TOKENS
        and num_shared in (0, 1)
        and bias.shape == logits.shape[1:]
        and all(
            each.dtype == torch.float32 and each.is_contiguous()
            for each in (logits, bias)
        )
    )


@cache_once
def _jit_route_warp_module(
    num_experts: int, num_groups: int, top_groups: int, top_k: int, num_shared: int
) -> Module:
    args = make_cpp_args(
        num_experts, num_groups, top_groups, top_k, num_shared, is_arch_support_pdl()
    )
    return load_jit(
        "route_warp",
        *args,
        cuda_files=["moe/route_warp.cuh"],
        cuda_wrappers=[("run", f"RouteWarpKernel<{args}>::run")],
        extra_cuda_cflags=["-O3"],
    )


@register_custom_op(op_name="moe_route_warp_out", mutates_args=["weights", "ids"])
def _route_warp_custom_op(
    logits: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    num_groups: int,
    top_groups: int,
    num_shared: int,
    scale: float,
    shared_weight: float,
) -> None:
    top_k = ids.shape[1] - num_shared
    module = _jit_route_warp_module(
        logits.shape[1], num_groups, top_groups, top_k, num_shared
    )
    module.run(logits, bias, weights, ids, scale, shared_weight)


@debug_kernel_api
def moe_route_warp(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    top_groups: int,
    top_k: int,
    num_shared: int = 0,
    scale: float = 1.0,
    shared_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and ids of each token's experts, best first, and of the shared one.

    The first call for a routing compiles its kernel. Operands that the kernel does not
    take raise.

    :param logits: Shape [num_tokens, num_experts], fp32, contiguous. num_experts must
        be a multiple of 32 up to 512.
    :param bias: Shape [num_experts], fp32, contiguous: added to the scores by which
        experts are ranked, not to the weights.
    :param num_groups: A power of two up to 32; 1 where there are no groups.
    :param top_groups: How many groups have experts that may be chosen.
    :param top_k: Routed experts of a token, up to 8. Their weights sum to ``scale``.
    :param num_shared: 0 or 1. The shared expert's id is num_experts, in the last column.
    :param shared_weight: Of the shared expert.
    :return: fp32 and int32, both of shape [num_tokens, top_k + num_shared].
    """
    shape = logits.shape[0], top_k + num_shared
    weights = logits.new_empty(shape, dtype=torch.float32)
    ids = logits.new_empty(shape, dtype=torch.int32)
    _route_warp_custom_op(
        logits,
        bias,
        weights,
        ids,
        num_groups,
        top_groups,
        num_shared,
        scale,
        shared_weight,
    )
    return weights, ids
