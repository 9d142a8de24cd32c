"""DeepSeek-V3's router GEMM, bf16 ``x[m, 7168] @ w[256, 7168].T`` in fp32, by FlashInfer."""

from __future__ import annotations

import torch

from sglang.kernels.jit.utils import is_arch_support_pdl
from sglang.kernels.kernel_api_logging import debug_kernel_api
from sglang.srt.utils.custom_op import register_custom_op
from sglang.utils import LazyImport

# On the first call: SGLang imports without FlashInfer, too.
_mm_m1_16_k7168_n256 = LazyImport("flashinfer.gemm", "mm_M1_16_K7168_N256")


# It says that it writes logits: an op that does not may be moved or dropped by
# torch.compile, and leaves them uninitialized.
@register_custom_op(op_name="flashinfer_dsv3_router_gemm", mutates_args=["logits"])
def _flashinfer_dsv3_router_gemm_custom_op(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> None:
    _mm_m1_16_k7168_n256(
        hidden_states, weight.t(), logits, launch_with_pdl=is_arch_support_pdl()
    )


@debug_kernel_api
def flashinfer_dsv3_router_gemm(
    hidden_states: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The logits of DeepSeek-V3's gate, ``hidden_states @ weight.T`` with fp32 sums.

    The first call compiles the kernel. Operands that it does not take raise.

    :param hidden_states: Shape [num_tokens, 7168], bf16, contiguous, 1 to 16 tokens.
    :param weight: Shape [256, 7168], bf16, contiguous.
    :return: Shape [num_tokens, 256], fp32.
    """
    logits = hidden_states.new_empty(
        (hidden_states.shape[0], weight.shape[0]), dtype=torch.float32
    )
    _flashinfer_dsv3_router_gemm_custom_op(logits, hidden_states, weight)
    return logits
