"""`csrc/cluster_router_gemm.cuh` in Python: one compiled module for each N, K and SM."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from sglang.srt.utils.router_gemm import jit

SOURCE = Path(__file__).parent / "csrc" / "cluster_router_gemm.cu"


def spec(num_experts: int, hidden_size: int, sm: int) -> jit.Spec:
    """What is compiled for weights `[N, K]` on one SM."""
    return jit.Spec(
        name=f"cluster_router_gemm_n{num_experts}_k{hidden_size}_sm{sm}",
        source=SOURCE,
        sm=sm,
        defines=(
            ("ROUTER_GEMM_NUM_EXPERTS", num_experts),
            ("ROUTER_GEMM_HIDDEN_SIZE", hidden_size),
        ),
    )


@functools.cache
def load(num_experts: int, hidden_size: int, sm: int) -> Any:
    """The module for weights `[N, K]`; builds it where it is not cached.

    Raises:
        jit.BuildError: there is no compiler, it fails, or the cache cannot be trusted.
    """
    return jit.load(spec(num_experts, hidden_size, sm))


def run(
    module: Any,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    pdl: bool,
) -> None:
    """Writes `logits`, fp32 `[M, N]`, on the current stream.

    Args:
        module: what `load` gave for this weight's N, K and SM.
        hidden_states: bf16 `[M, K]`, M up to 128, contiguous and 16-byte aligned.
        weight: bf16 `[N, K]`, likewise.
        pdl: launch with programmatic dependent launch.

    Raises:
        ValueError: an argument is not that; it is named.
        RuntimeError: CUDA refused the launch.
    """
    module.run(hidden_states, weight, logits, pdl)
