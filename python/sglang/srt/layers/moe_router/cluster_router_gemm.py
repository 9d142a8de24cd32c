"""`csrc/cluster_router_gemm.cuh` in Python: one compiled module for what a `Target` computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.kernel import Loaded, Target
from sglang.srt.layers.moe_router.packages import find_function

SOURCE = Path(__file__).parent / "csrc" / "cluster_router_gemm.cu"


def missing(sm: int | None) -> str | None:
    """Why it cannot be built at all, as a phrase; None if it can."""
    found, reason = find_function("tvm_ffi", "load_module", "apache-tvm-ffi")
    return None if found is not None else reason


def spec(
    num_experts: int,
    hidden_size: int,
    sm: int,
    dtype: torch.dtype = torch.bfloat16,
    logits_dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> jit.Spec:
    """What is compiled for weights `[N, K]` on one SM; the rest as in a `Target`."""
    name = f"cluster_router_gemm_n{num_experts}_k{hidden_size}"
    defines = [("ROUTER_GEMM_NUM_EXPERTS", num_experts), ("ROUTER_GEMM_HIDDEN_SIZE", hidden_size)]
    options = {
        "fp32": dtype == torch.float32,
        "bias": bias,
        "bf16_logits": logits_dtype == torch.bfloat16,
    }
    for option in (each for each, is_set in options.items() if is_set):
        name += f"_{option}"
        defines.append((f"ROUTER_GEMM_{option.upper()}", 1))
    return jit.Spec(f"{name}_sm{sm}", SOURCE, sm, tuple(defines))


def spec_of(target: Target) -> jit.Spec:
    """The same, for what a gate needs."""
    _, sm, num_experts, hidden_size, *options = target
    assert sm is not None
    return spec(num_experts, hidden_size, sm, *options)


def load(target: Target) -> Loaded:
    """Loads the kernel; builds it where it is not cached.

    Raises:
        jit.BuildError: there is no compiler, it fails, or the cache cannot be trusted.
    """
    module = jit.load(spec_of(target))
    module.prepare(target.device.index)
    launch = module.run

    def run(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        launch(hidden_states, weight, logits, pdl, bias)
        return logits

    return run, num_tokens_to_check(module)


def num_tokens_to_check(module: Any) -> list[int]:
    """The M at both edges of each of the module's kernels, ascending."""
    largest = list(module.largest_num_tokens())
    smallest = [1, *(each + 1 for each in largest[:-1])]
    return sorted({*smallest, *largest})


def find_builder(target: Target) -> Path | None:
    """The nvcc that `build` would run; None where the cache has the kernel.

    Raises:
        jit.BuildError: neither.
    """
    return jit.find_builder(spec_of(target))


def build(target: Target) -> str:
    """Compiles the kernel into the cache, without a GPU, and returns the module's name.

    Raises:
        jit.BuildError: as `load`.
    """
    built = spec_of(target)
    jit.build(built)
    return built.name
