"""sgl-kernel's `dsv3_router_gemm`, which comes compiled, up to sglang-kernel 0.4.4."""

from __future__ import annotations

import torch

from sglang.srt.layers.moe_router.kernel import Loaded, Target
from sglang.srt.layers.moe_router.packages import find_function

KERNEL = ("sgl_kernel", "dsv3_router_gemm", "sglang-kernel")


def missing(sm: int | None) -> str | None:
    """Why the installed sgl-kernel has no such kernel, as a phrase; None if it has."""
    kernel, reason = find_function(*KERNEL)
    return None if kernel is not None else reason


def load(target: Target) -> Loaded:
    """Finds the kernel.

    Raises:
        RuntimeError: it is not there.
    """
    kernel, reason = find_function(*KERNEL)
    if kernel is None:
        raise RuntimeError(reason)

    def run(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,  # never: the rule of its backend refuses one
    ) -> torch.Tensor:
        # It allocates by itself, and reads TRTLLM_ENABLE_PDL for PDL.
        found: torch.Tensor = kernel(hidden_states, weight, out_dtype=torch.float32)
        return found

    return run, range(1, 17)
