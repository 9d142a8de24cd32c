"""Router GEMM of an MoE gate on Hopper: bf16 ``x[m, k] @ w[n, k].T`` in fp32.

A cluster of eight CTAs splits K and sums up through distributed shared memory, see
csrc/gemm/cluster_router_gemm.cuh. A row's bits do not depend on the batch it is in.
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

# num_experts and hidden_size of a gate: the fewest and the most num_tokens for which
# the kernel, behind a norm, was faster than what the gate ran before: on an H200, and
# on an H100 where it was measured there.
NUM_TOKENS: dict[tuple[int, int], tuple[int, int]] = {}


@cache_once
def _jit_cluster_router_gemm_module(num_experts: int, hidden_size: int) -> Module:
    args = make_cpp_args(num_experts, hidden_size, is_arch_support_pdl())
    return load_jit(
        "cluster_router_gemm",
        *args,
        cuda_files=["gemm/cluster_router_gemm.cuh"],
        cuda_wrappers=[("run", f"ClusterRouterGemmKernel<{args}>::run")],
        extra_cuda_cflags=["-O3"],
    )


@register_custom_op(op_name="cluster_router_gemm_out", mutates_args=["logits"])
def _cluster_router_gemm_custom_op(
    hidden_states: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor
) -> None:
    _jit_cluster_router_gemm_module(*weight.shape).run(hidden_states, weight, logits)


@debug_kernel_api
def cluster_router_gemm(
    hidden_states: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The logits of an MoE gate, ``hidden_states @ weight.T`` with fp32 sums.

    The first call for a shape compiles its kernels. Operands that the kernel does not
    take raise.

    :param hidden_states: Shape [num_tokens, hidden_size], bf16, contiguous, with at
        most 128 tokens.
    :param weight: Shape [num_experts, hidden_size], bf16, contiguous. num_experts must
        be a multiple of 16, hidden_size of 64.
    :return: Shape [num_tokens, num_experts], fp32.
    """
    logits = hidden_states.new_empty(
        (hidden_states.shape[0], weight.shape[0]), dtype=torch.float32
    )
    _cluster_router_gemm_custom_op(hidden_states, weight, logits)
    return logits
