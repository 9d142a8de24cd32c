"""The kernels behind the ops: what is installed, loading it, running it."""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from sglang.srt.utils.router_gemm.call import device_sm

logger = logging.getLogger(__name__)

FLASHINFER_KERNEL = "mm_M1_16_K7168_N256"

# The largest relative error against fp64 at which a kernel that was just loaded is
# believed. fp32 accumulation over K = 7168 gives about 1e-7 (test/srt/results/).
_MAX_RELATIVE_ERROR = 1e-6


class _Target(NamedTuple):
    """What a kernel is loaded for: a device, and the weight's N and K."""

    backend: str
    device_index: int | None
    num_experts: int
    hidden_size: int


class _Compiled(NamedTuple):
    """A kernel that nvcc compiles at the first start."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
    num_tokens: Sequence[int]
    """Each M for which it is another function, or loops: CUDA loads a function when it is
    first launched."""
    hint: str
    """What to do where it does not load."""
    check_cache: Callable[[], None] = lambda: None
    """Raises where others may have written what would be loaded; no-op if `run` does so."""


# Why a compiled kernel cannot be called; None once it can.
_loaded: dict[_Target, str | None] = {}


def matmul_fp32(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`hidden_states @ weight.T` in fp32: `[M, K]` and `[N, K]` give `[M, N]`.

    16-bit operands on a CUDA device go to cuBLAS as they are and are accumulated and
    returned in fp32. Elsewhere `torch.mm` has no `out_dtype`, and both are widened.
    """
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype != torch.float32:
        return torch.mm(hidden_states, weight.t(), out_dtype=torch.float32, out=out)
    return torch.mm(hidden_states.float(), weight.float().t(), out=out)


@functools.cache
def _import(
    module: str, attribute: str, distribution: str
) -> tuple[Callable[..., Any] | None, str]:
    """The attribute and "", or None and the reason why it is not there."""
    try:
        installed = f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return None, f"{distribution} is not installed; pip install {distribution}"
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # a broken install raises anything: OSError, RuntimeError
        return None, f"{installed} cannot be imported ({_first_line(error)})"
    return found, "" if found is not None else f"{installed} has no {attribute}"


def _flashinfer() -> tuple[Callable[..., Any] | None, str]:
    return _import("flashinfer.gemm", FLASHINFER_KERNEL, "flashinfer-python")


def _sgl_kernel() -> tuple[Callable[..., Any] | None, str]:
    return _import("sgl_kernel", "dsv3_router_gemm", "sglang-kernel")


def missing(backend: str, sm: int | None) -> str | None:
    """Why the installed packages have no kernel of `backend` for `sm`; None if they have.

    This asks the packages only. Whether the kernel is also built and loaded on a
    device, `unavailable` says.
    """
    if backend == "cluster":
        found, reason = _import("tvm_ffi", "load_module", "apache-tvm-ffi")
        if found is None:
            return reason
    elif backend == "flashinfer":
        kernel, reason = _flashinfer()
        if kernel is None:
            return reason
        declares = getattr(kernel, "is_compute_capability_supported", lambda sm: False)
        if not declares(sm):
            return f"flashinfer-python {version('flashinfer-python')} does not declare SM {sm}"
    elif backend == "sgl_kernel":
        kernel, reason = _sgl_kernel()
        if kernel is None:
            return reason
    return None


@torch.compiler.assume_constant_result
def unavailable(
    backend: str, device: torch.device, num_experts: int, hidden_size: int
) -> str | None:
    """Why the kernel of `backend` cannot be called there now; None if it can.

    Args:
        device: where the tensors are.
        num_experts: N of the weight.
        hidden_size: K of the weight.
    """
    if device.type != "cuda":
        return None if backend == "torch" else "no CUDA device"
    if backend in _COMPILED:
        target = _Target(backend, device.index, num_experts, hidden_size)
        return _loaded.get(target, "its kernel was not loaded with the model")
    return missing(backend, device_sm(device.type, device.index))


def load(backend: str, device: torch.device, num_experts: int, hidden_size: int) -> None:
    """Builds (where it must be) and loads the kernel of `backend` on a CUDA device.

    FlashInfer's kernel and `cluster` are compiled with nvcc on first use. This is where
    that happens: while the model loads, never on a request, never in a CUDA-graph
    capture. Several processes may call it at once: each builds behind a file lock, so
    that one compiles and the others wait. It never raises; after a failure `unavailable`
    says why, and nothing tries again in this process.

    Args:
        backend: a row of the policy's table.
        device: the CUDA device.
        num_experts: N of the weight.
        hidden_size: K of the weight.
    """
    target = _Target(backend, device.index, num_experts, hidden_size)
    if backend not in _COMPILED or target in _loaded:
        return
    name = f"{_COMPILED[backend].name} [{num_experts}, {hidden_size}]"
    logger.info("Router GEMM: loading %s; the first start builds it with nvcc.", name)
    started = time.perf_counter()
    try:
        _check_compiled(_COMPILED[backend], device, num_experts, hidden_size)
    except Exception as error:  # whatever nvcc, ninja, the driver or FlashInfer raise
        logger.info("Router GEMM: %s did not load.", name, exc_info=True)
        _loaded[target] = f"{name} did not load ({_first_line(error)}); {_COMPILED[backend].hint}"
    else:
        _loaded[target] = None
        logger.info("Router GEMM: %s is ready after %.1f s.", name, time.perf_counter() - started)


def _check_compiled(
    compiled: _Compiled, device: torch.device, num_experts: int, hidden_size: int
) -> None:
    """Runs the kernel once for each M that matters, and compares with fp64."""
    compiled.check_cache()
    every_m = compiled.num_tokens
    # A generator of its own: the global one seeds dummy weights and sampling.
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(
        torch.randn, generator=generator, device=device, dtype=torch.bfloat16
    )
    with torch.no_grad(), torch.cuda.device(device):
        weight = random(num_experts, hidden_size)
        hidden_states = random(every_m[-1], hidden_size)
        expected = hidden_states.double() @ weight.double().t()
        for num_tokens in every_m:
            # Said in full: while a model loads, SGLang's default dtype is the model's.
            logits = torch.full(
                (num_tokens, num_experts), torch.nan, dtype=torch.float32, device=device
            )
            compiled.run(logits, hidden_states[:num_tokens], weight, False)
            wrong = torch.dist(logits.double(), expected[:num_tokens])
            error = float(wrong / expected[:num_tokens].norm())
            if not error <= _MAX_RELATIVE_ERROR:
                raise RuntimeError(
                    f"{compiled.name} is off by {error:.1e} at M = {num_tokens}, "
                    f"must be within {_MAX_RELATIVE_ERROR:.0e} of fp64"
                )


def run_cluster(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, pdl: bool
) -> None:
    """Writes `logits`, fp32 `[M, N]`, with this project's kernel (`cluster_router_gemm`)."""
    from sglang.srt.utils.router_gemm import cluster_router_gemm

    sm = device_sm("cuda", weight.device.index)
    assert sm is not None
    module = cluster_router_gemm.load(weight.shape[0], weight.shape[1], sm)
    cluster_router_gemm.run(module, hidden_states, weight, logits, pdl)


def _check_flashinfer_cache() -> None:
    """FlashInfer itself loads whatever lies there."""
    from flashinfer.jit import env

    from sglang.srt.utils.router_gemm import jit

    folder = env.FLASHINFER_JIT_DIR
    for path in (folder, *folder.glob("dsv3_router_gemm*"), *folder.glob("dsv3_router_gemm*/*.so")):
        if path.exists():
            jit.check_trusted(path)


def run_flashinfer(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, pdl: bool
) -> None:
    """Writes `logits`, fp32 `[M, N]`, with FlashInfer's kernel. It must be loaded."""
    kernel, _ = _flashinfer()
    assert kernel is not None
    kernel(hidden_states, weight.t(), logits, launch_with_pdl=pdl)


def run_sgl_kernel(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 logits `[M, N]` from sgl-kernel, which reads its own switch for PDL."""
    kernel, _ = _sgl_kernel()
    assert kernel is not None
    logits: torch.Tensor = kernel(hidden_states, weight, out_dtype=torch.float32)
    return logits


_COMPILED = {
    "cluster": _Compiled(
        "cluster_router_gemm",
        run_cluster,
        (1, 8, 9, 16, 17, 64, 128),
        "it is built with nvcc: install the CUDA toolkit and set CUDA_HOME",
    ),
    "flashinfer": _Compiled(
        f"FlashInfer's {FLASHINFER_KERNEL}",
        run_flashinfer,
        range(1, 17),
        "FlashInfer builds it with nvcc and ninja: install the CUDA toolkit and set CUDA_HOME, or "
        "install FlashInfer's prebuilt kernels (flashinfer-jit-cache)",
        _check_flashinfer_cache,
    ),
}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
