"""FlashInfer's `mm_M1_16_K7168_N256`, which FlashInfer itself compiles and caches."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.kernel import Loaded, Target
from sglang.srt.layers.moe_router.packages import find_function

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
    _check_trusted(_spec(target).jit_library_path)

    def run(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,  # never: the rule of its backend refuses one
    ) -> torch.Tensor:
        kernel(hidden_states, weight.t(), logits, launch_with_pdl=pdl)
        return logits

    return run, range(1, 17)


def find_builder(target: Target) -> Path | None:
    """The nvcc that FlashInfer would run; None where it has the kernel.

    It is FlashInfer that decides, when it loads, whether a kernel in its cache is current.

    Raises:
        jit.BuildError: neither: no nvcc for the SM, no ninja, nothing to link with, or a cache
            that cannot be written or trusted.
    """
    spec = _spec(target)
    if spec.is_aot:  # flashinfer-jit-cache has it
        return None
    library: Path = spec.jit_library_path
    _check_trusted(library)
    # FlashInfer runs ninja before every load, which writes its log, and so does FlashInfer.
    jit.check_writable(library.parent)
    if shutil.which("ninja") is None:
        raise jit.BuildError("ninja is missing; pip install ninja")
    if library.exists():
        return None
    assert target.sm is not None
    nvcc = find_nvcc(target.sm)
    _check_link()
    return nvcc


def build(target: Target) -> str:
    """Compiles the kernel into FlashInfer's cache, without a GPU; returns the module's name.

    Raises:
        jit.BuildError: as `find_builder`.
        RuntimeError: the build fails.
    """
    spec = _spec(target)
    if not spec.is_aot:
        find_builder(target)
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


def _check_trusted(library: Path) -> None:
    for path in (library.parents[1], library.parent, library):
        if path.exists():
            jit.check_trusted(path)


def _check_link() -> None:
    """The libraries that FlashInfer links with are there: it would find out after a minute."""
    from flashinfer.jit.cpp_ext import get_cuda_path

    compiler = os.environ.get("CXX", "c++")
    folders = [f"{get_cuda_path()}/lib64{stubs}" for stubs in ("", "/stubs")]
    with tempfile.TemporaryDirectory() as scratch:
        command = [compiler, "-shared", *(f"-L{folder}" for folder in folders), "-lcudart"]
        command += ["-lcuda", *shlex.split(os.environ.get("FLASHINFER_EXTRA_LDFLAGS", ""))]
        try:
            done = subprocess.run(
                [*command, "-o", f"{scratch}/linked.so"],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise jit.BuildError(f"{compiler} does not run ({error}); install g++") from error
    missing = dict.fromkeys(re.findall(r"-l(cuda\w*)", done.stderr)) if done.returncode else ()
    if missing:
        raise jit.BuildError(
            f"the linker finds no {' and no '.join(f'lib{name}.so' for name in missing)}; "
            f"install cuda-cudart-dev and cuda-driver-dev, which CUDA's devel images have, for "
            f"{folders[0]} and its folder stubs"
        )


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
