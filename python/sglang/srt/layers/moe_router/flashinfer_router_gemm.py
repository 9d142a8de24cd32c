"""FlashInfer's `mm_M1_16_K7168_N256`, which FlashInfer itself compiles and caches."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.packages import find_function

if TYPE_CHECKING:
    from sglang.srt.layers.moe_router.backends import Loaded, Target

KERNEL = ("flashinfer.gemm", "mm_M1_16_K7168_N256", "flashinfer-python")


def missing(sm: int | None) -> str | None:
    """Why the installed FlashInfer has no such kernel for `sm`, as a phrase; None if it has."""
    kernel, reason = find_function(*KERNEL)
    if kernel is None:
        return reason
    declares = getattr(kernel, "is_compute_capability_supported", lambda sm: False)
    return None if declares(sm) else f"{KERNEL[2]} {version(KERNEL[2])} does not declare SM {sm}"


def load(target: Target) -> Loaded:
    """Finds the kernel. FlashInfer builds and loads it at the first call.

    Raises:
        jit.BuildError: others may have written what FlashInfer would load.
    """
    kernel, reason = find_function(*KERNEL)
    if kernel is None:
        raise jit.BuildError(reason)
    library = _spec(target).jit_library_path
    for path in (library.parents[1], library.parent, library):
        if path.exists():
            jit.check_trusted(path)

    def run(
        hidden_states: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        kernel(hidden_states, weight.t(), logits, launch_with_pdl=pdl)
        return logits

    return run, range(1, 17)


def build(target: Target) -> str:
    """Compiles the kernel into FlashInfer's cache, without a GPU; returns the module's name.

    Raises:
        jit.BuildError: nvcc or ninja is missing.
        RuntimeError: the build fails.
    """
    assert target.sm is not None
    spec = _spec(target)
    if not spec.is_aot:  # else flashinfer-jit-cache has it
        find_nvcc(target.sm)
        if shutil.which("ninja") is None:
            raise jit.BuildError("ninja is missing; pip install ninja")
        # FLASHINFER_JIT_VERBOSE would show ninja's steps too, but it also compiles for
        # debugging, and the server would then compile again.
        spec.build(verbose=True, need_lock=True)
    name: str = spec.name
    return name


def find_nvcc(sm: int) -> Path:
    """The nvcc that FlashInfer would take: it searches by itself, and takes no other.

    Raises:
        jit.BuildError: it is missing, or does not know the SM.
    """
    from flashinfer.jit.cpp_ext import get_cuda_path

    try:
        nvcc = Path(os.environ.get("FLASHINFER_NVCC") or f"{get_cuda_path()}/bin/nvcc")
    except RuntimeError:  # it found no CUDA toolkit
        nvcc = Path("nvcc")
    return jit.find_nvcc(sm, (nvcc,))


def _spec(target: Target) -> Any:
    """The module that the kernel lies in on such a GPU."""
    from flashinfer.jit import gen_dsv3_router_gemm_module

    try:
        from flashinfer.jit import cake_router_gemm
    except ImportError:  # FlashInfer < 0.7 has one module for all GPUs
        return gen_dsv3_router_gemm_module()
    assert target.sm is not None
    if cake_router_gemm.supported_capability(divmod(target.sm, 10)) is None:
        return gen_dsv3_router_gemm_module()
    return cake_router_gemm.gen_cake_router_gemm_module()
