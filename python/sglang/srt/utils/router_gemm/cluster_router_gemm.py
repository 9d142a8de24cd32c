"""`csrc/cluster_router_gemm.cuh` in Python: one compiled module for each N, K and SM."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from sglang.srt.utils.router_gemm import jit

SOURCE = Path(__file__).parent / "csrc" / "cluster_router_gemm.cu"

# What a CTA may take of an SM, in bytes: CUDA C++ Programming Guide, table of technical
# specifications per compute capability (227 KB on 9.0 and 10.x, 99 KB on 12.x).
_SHARED_BYTES = {12: 99 * 1024}
_SHARED_BYTES_ELSE = 227 * 1024


def spec(num_experts: int, hidden_size: int, sm: int) -> jit.Spec:
    """What is compiled for weights `[N, K]` on one SM."""
    return jit.Spec(
        name=f"cluster_router_gemm_n{num_experts}_k{hidden_size}_sm{sm}",
        source=SOURCE,
        sm=sm,
        defines=(
            ("ROUTER_GEMM_NUM_EXPERTS", num_experts),
            ("ROUTER_GEMM_HIDDEN_SIZE", hidden_size),
            ("ROUTER_GEMM_SHARED_BYTES", _SHARED_BYTES.get(sm // 10, _SHARED_BYTES_ELSE)),
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
