"""The backends: what each one's kernel takes, and how it is loaded and run.

A backend is one record in `BACKENDS`. To add one, write its functions and its record; its
op, its place in the settings, `doctor`, `prebuild` and README's table follow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from sglang.srt.layers.moe_router import (
    cluster_router_gemm,
    flashinfer_router_gemm,
    jit,
    sgl_kernel_router_gemm,
)
from sglang.srt.layers.moe_router.isolation import LimitExceededError, run_isolated
from sglang.srt.layers.moe_router.kernel import (
    ALIGNMENT_BYTES,
    Loaded,
    Run,
    Target,
    empty_logits,
    fits,
    is_aligned,
    relative_error,
)
from sglang.srt.layers.moe_router.packages import first_line

logger = logging.getLogger(__name__)

# The largest relative error against fp64 at which a kernel that was just loaded is
# believed. fp32 accumulation over K = 7168 gives about 1e-7 (H100, 2026-11-27).
_MAX_RELATIVE_ERROR = 1e-6

# The longest that a load may take, builds included. SGLang's ranks meet again after it, and a
# collective waits 300 s or more.
LOAD_LIMIT_S = 240.0


Pdl = Literal["switch", "always", "never"]


class Rule(NamedTuple):
    """What one backend's kernel takes; None stands for 'any'."""

    device_types: tuple[str, ...]
    min_sm: int | None
    num_experts: Sequence[int] | None
    """A range in steps stands for the multiples of its step."""
    hidden_sizes: Sequence[int] | None
    num_tokens: range
    dtypes: tuple[torch.dtype, ...]
    """Of the weight; hidden_states are bf16, but for a matmul."""
    logits_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    bias: bool = False
    """It can add one."""
    any_layout: bool = False
    """Strided and unaligned tensors too."""

    def refuse_weight(self, target: Target) -> str | None:
        """Why no call with this weight can be served, as a phrase; None if some can."""
        device_type, sm = target.device.type, target.sm
        if device_type not in self.device_types:
            return f"device is {device_type}, must be {either(self.device_types)}"
        if self.min_sm is not None and (sm is None or sm < self.min_sm):
            return f"SM is {sm}, must be {self.min_sm} or newer"
        if self.num_experts is not None and target.num_experts not in self.num_experts:
            return f"N is {target.num_experts}, must be {either(self.num_experts)}"
        if self.hidden_sizes is not None and target.hidden_size not in self.hidden_sizes:
            return f"K is {target.hidden_size}, must be {either(self.hidden_sizes)}"
        if target.dtype not in self.dtypes:
            return f"weight is {target.dtype}, must be {either(self.dtypes)}"
        if target.logits_dtype not in self.logits_dtypes:
            return f"logits are {target.logits_dtype}, must be {either(self.logits_dtypes)}"
        if target.bias and not self.bias:
            return "the gate has a bias, must have none"
        return None

    def takes(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> bool:
        """Whether a call is served, with a weight of a shape that is not refused."""
        return (
            hidden_states.shape[0] in self.num_tokens
            and weight.dtype in self.dtypes
            and self.takes_layout(hidden_states, weight, bias)
        )

    def takes_layout(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        addresses: bool = True,
    ) -> bool:
        """The same for any M, of a weight of the right dtype.

        Without `addresses`, where they do not exist yet, an unaligned call is taken too.
        """
        kernel_takes = self.any_layout or hidden_states.dtype == torch.bfloat16
        if not kernel_takes or not fits(hidden_states, weight):
            return False
        if bias is not None and not (self.any_layout or is_readable(bias, addresses)):
            return False
        # FlashInfer < 0.7 does not check row strides.
        dense = self.any_layout or (hidden_states.is_contiguous() and weight.is_contiguous())
        return dense and (self.any_layout or not addresses or is_aligned(hidden_states, weight))


def is_readable(bias: torch.Tensor, address: bool = True) -> bool:
    """Whether a kernel can read it; where it starts is asked only of what has an `address`."""
    aligned = not address or bias.data_ptr() % ALIGNMENT_BYTES == 0
    return bias.dtype == torch.bfloat16 and bias.is_contiguous() and aligned


def either(values: Sequence[object]) -> str:
    """The values that a rule allows, as a phrase."""
    if isinstance(values, range):
        if values.step == 1:
            return f"{values[0]} to {values[-1]}"
        return f"a multiple of {values.step} up to {values[-1]}"
    return " or ".join(map(str, values))


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute the router GEMM."""

    name: str
    kernel: str
    """Whose kernel it is, as a person calls it."""
    rule: Rule
    missing: Callable[[int | None], str | None]
    """Why the installed packages have no kernel for an SM; None if they have."""
    load: Callable[[Target], Loaded]
    """Builds it where it must, and loads it. Raises whatever nvcc and the libraries raise."""
    hint: str = ""
    """What to install where its library cannot build or load it."""
    op: str | None = None
    """The name of its custom op, in the namespace `sglang`; None where PyTorch's own serves.

    One that no release of SGLang ever had: torch's graph cache does not see a changed schema
    (pytorch issue 187319). SGLang 0.5.11 to 0.5.14 have a `flashinfer_dsv3_router_gemm` that
    declares no mutated argument, so that a compiled graph may return logits that nobody wrote.
    """
    op_writes_logits: bool = False
    """The op writes logits that the caller gives, as in SGLang PR 17707, and returns nothing."""
    guards_device: bool = False
    """It runs on its tensors' device, whichever is the current one."""
    pdl: Pdl = "switch"
    """Whether the caller says if it is launched with PDL, or that is fixed."""
    measured_sms: tuple[int, ...] | None = None
    """Where this project timed its own kernel; None for somebody else's."""
    build: Callable[[Target], str] | None = None
    """Builds it without a GPU and returns the module's name; None if nothing is compiled."""
    find_builder: Callable[[Target], Path | None] | None = None
    """The nvcc that a build would run; None where the kernel is cached. Raises `jit.BuildError`
    where it can be neither loaded nor built."""
    cache_variable: str | None = None
    """The environment variable that says where the compiled kernel is kept."""
    writes_cache: bool = False
    """Its library writes there whenever it is imported: the server's user must own the folder."""


# ---- Loading -----------------------------------------------------------------------------------

# What `load_kernel` came to: the kernel, or why it cannot be called.
_loaded: dict[tuple[object, ...], Run | str] = {}


def _key(backend: Backend, target: Target) -> tuple[object, ...]:
    return backend.name, target.device, target.gate  # its SM is the device's


def find_kernel(backend: Backend, target: Target) -> Run | str:
    """The kernel for such calls, whatever the target's SM, or why there is none, as a phrase.

    It looks up what `load_kernel` left, and never loads: nothing is built on a request.
    """
    if backend.op is None:
        return matmul_fp32
    return _loaded.get(_key(backend, target), "its kernel was not loaded with the model")


def load_kernel(backend: Backend, target: Target) -> Run | str:
    """Builds, loads and checks a kernel, once a process. For model load only.

    `cluster` and FlashInfer's are compiled by nvcc at the first start. Several processes
    may come here at once: one compiles behind a file lock, and the others wait. It never
    raises: it returns the kernel, or why it cannot be called, and so does `find_kernel`.
    """
    if backend.op is None:
        return matmul_fp32
    key = _key(backend, target)
    if key in _loaded:
        return _loaded[key]
    name = f"{backend.kernel} {target}"
    compiled = "" if backend.build is None else "; the first start builds it with nvcc"
    logger.info("Router GEMM: loading %s%s.", name, compiled)
    started = time.perf_counter()
    given_up = threading.Event()
    try:
        _loaded[key] = run_isolated(
            lambda: _load_checked(backend, target, given_up), target.device, LOAD_LIMIT_S
        )
    except Exception as error:  # whatever nvcc, ninja, the driver or a library raises
        given_up.set()
        logger.info("Router GEMM: %s did not load.", name, exc_info=True)
        reason = f"{name} did not load ({first_line(error)})"
        # Ours say what to do; a library that fails to build does not.
        ours = isinstance(error, (jit.BuildError, WrongNumbersError, LimitExceededError))
        _loaded[key] = reason if ours or not backend.hint else f"{reason}; {backend.hint}"
    else:
        logger.info("Router GEMM: %s is ready after %.1f s.", name, time.perf_counter() - started)
    return _loaded[key]


def refuse_kernel(backend: Backend, target: Target, reason: str) -> None:
    """Takes back what `load_kernel` gave: nobody in this process may call it."""
    _loaded[_key(backend, target)] = reason


class WrongNumbersError(Exception):
    """A kernel that was just loaded does not compute the logits."""


def _load_checked(backend: Backend, target: Target, given_up: threading.Event) -> Run:
    """Loads the kernel, and runs it once for each M that matters, against fp64.

    Raises:
        WrongNumbersError: it is off by more than rounding; and whatever the load raises.
    """
    run, every_m = backend.load(target)
    if not backend.guards_device:
        run = _on_its_device(run)
    # The product on the CPU: SGLang's batch-invariant mode replaces that on the GPU, where
    # cuBLAS would also keep a workspace. The generator is its own: the global one seeds dummy
    # weights and sampling.
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        random = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return random.to(dtype)

    weight = draw(target.num_experts, target.hidden_size, dtype=target.dtype)
    hidden_states = draw(max(every_m), target.hidden_size)
    bias = draw(target.num_experts) if target.bias else None
    expected = hidden_states.double() @ weight.double().t()
    if bias is not None:
        expected += bias.double()
        bias = bias.to(target.device)
    weight, hidden_states = weight.to(target.device), hidden_states.to(target.device)
    most = _MAX_RELATIVE_ERROR
    if target.logits_dtype != torch.float32:
        most = torch.finfo(target.logits_dtype).eps / 2
    for num_tokens in every_m:
        if given_up.is_set():  # the GPU may be in a graph capture by now
            raise LimitExceededError("nobody waits for it any longer")
        rows = hidden_states[:num_tokens]
        logits = empty_logits(rows, weight, target.logits_dtype).fill_(torch.nan)
        error = relative_error(run(rows, weight, logits, False, bias), expected[:num_tokens])
        if not error <= most:
            raise WrongNumbersError(
                f"it is off by {error:.1e} at M = {num_tokens}, must be within {most:.0e} of fp64"
            )
    return run


def _on_its_device(run: Run) -> Run:
    """Makes the tensors' device the current one, where it is another: kernels run there."""

    def guarded(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if weight.device.index == torch.cuda.current_device():
            return run(hidden_states, weight, logits, pdl, bias)
        with torch.cuda.device(weight.device):
            return run(hidden_states, weight, logits, pdl, bias)

    return guarded


def matmul_fp32(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor | None = None,
    pdl: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`hidden_states @ weight.T (+ bias)` in fp32: `[M, K]` and `[N, K]` give `[M, N]`.

    16-bit operands on a CUDA device go to cuBLAS as they are and are accumulated and
    returned in fp32. Elsewhere `torch.mm` has no `out_dtype`, and both are widened. Where `logits`
    are of 16 bits the sum is rounded to them.
    """
    device_type = hidden_states.device.type
    if device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):  # it would round the logits
            return matmul_fp32(hidden_states, weight, logits, pdl, bias)
    if logits is not None and logits.dtype != torch.float32:
        if bias is None and hidden_states.dtype == weight.dtype == logits.dtype:
            return torch.mm(hidden_states, weight.t(), out=logits)  # as SGLang's own: one kernel
        return logits.copy_(matmul_fp32(hidden_states, weight, None, pdl, bias))
    if bias is not None:
        product = matmul_fp32(hidden_states, weight) + bias.float()
        return product if logits is None else logits.copy_(product)
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype != torch.float32:
        return torch.mm(hidden_states, weight.t(), out_dtype=torch.float32, out=logits)
    return torch.mm(hidden_states.float(), weight.float().t(), out=logits)


# ---- The records -------------------------------------------------------------------------------

_BF16 = (torch.bfloat16,)

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="cluster",
            kernel="cluster_router_gemm",
            rule=Rule(
                device_types=("cuda",),
                min_sm=90,
                num_experts=range(16, 1025, 16),
                hidden_sizes=range(64, 8193, 64),
                num_tokens=range(129),
                dtypes=(torch.bfloat16, torch.float32),
                logits_dtypes=(torch.float32, torch.bfloat16),
                bias=True,
            ),
            missing=cluster_router_gemm.missing,
            load=cluster_router_gemm.load,
            op="cluster_router_gemm",
            guards_device=True,
            measured_sms=(90,),
            build=cluster_router_gemm.build,
            find_builder=cluster_router_gemm.find_builder,
            cache_variable="TVM_FFI_CACHE_DIR",
        ),
        Backend(
            name="flashinfer",
            kernel="FlashInfer's mm_M1_16_K7168_N256",
            rule=Rule(
                device_types=("cuda",),
                min_sm=90,
                num_experts=(256,),
                hidden_sizes=(7168,),
                num_tokens=range(1, 17),
                dtypes=_BF16,
            ),
            missing=flashinfer_router_gemm.missing,
            load=flashinfer_router_gemm.load,
            hint="FlashInfer builds it with nvcc and ninja: install the CUDA toolkit and set "
            "CUDA_HOME, or install FlashInfer's prebuilt kernels (flashinfer-jit-cache)",
            op="flashinfer_dsv3_router_gemm_out",
            op_writes_logits=True,
            build=flashinfer_router_gemm.build,
            find_builder=flashinfer_router_gemm.find_builder,
            cache_variable="FLASHINFER_WORKSPACE_BASE",
            writes_cache=True,
        ),
        Backend(
            name="sgl_kernel",
            kernel="sgl-kernel's dsv3_router_gemm",
            rule=Rule(
                device_types=("cuda",),
                min_sm=90,
                num_experts=(256, 384),
                hidden_sizes=(7168,),
                num_tokens=range(1, 17),
                dtypes=_BF16,
            ),
            missing=sgl_kernel_router_gemm.missing,
            load=sgl_kernel_router_gemm.load,
            hint="pip install 'sglang-kernel<=0.4.4'",
            op="sgl_kernel_dsv3_router_gemm",
            pdl="always",
        ),
        Backend(
            name="torch",
            kernel="torch.mm",
            rule=Rule(
                device_types=("cuda", "cpu"),
                min_sm=None,
                num_experts=None,
                hidden_sizes=None,
                num_tokens=range(2**31),
                dtypes=(torch.bfloat16, torch.float16, torch.float32),
                logits_dtypes=(torch.float32, torch.bfloat16, torch.float16),
                bias=True,
                any_layout=True,
            ),
            missing=lambda sm: None,
            load=lambda target: (matmul_fp32, ()),
            pdl="never",
        ),
    )
}
