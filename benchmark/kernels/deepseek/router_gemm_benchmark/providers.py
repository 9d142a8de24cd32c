"""Every router GEMM that can be measured, each called through its public function."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

import sglang_router_gemm  # noqa: F401  makes the in-tree modules importable
from sglang.srt.layers.moe_router.backends import BACKENDS, Backend, Pdl, either
from sglang.srt.layers.moe_router.kernel import Form, Target, device_sm
from sglang.srt.layers.moe_router.packages import first_line
from sglang.srt.layers.moe_router.plan import make_plan

Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""`gemm(hidden_states, weight, out, pdl)`: bf16 `[M, K]` and `[N, K]` give `[M, N]`.

`out` has the provider's output dtype. An API that takes it writes and returns it; one
that allocates by itself returns its own tensor. A provider with a bias adds that.
"""

FP32, BF16 = torch.float32, torch.bfloat16


PLAIN, FP32_WEIGHT = Form(), Form(dtype=FP32)
BF16_LOGITS, WITH_BIAS = Form(logits_dtype=BF16), Form(logits_dtype=BF16, bias=True)

# N, K: FlashInfer's function for that shape and the dtype it writes.
_FLASHINFER = {
    (256, 7168): ("mm_M1_16_K7168_N256", FP32),
    (256, 6144): ("mm_M1_16_K6144_N256", FP32),
    (384, 7168): ("mm_M1_16_K7168_N384", FP32),
    (128, 7168): ("mm_M1_16_K7168_N128", BF16),
}

CUBLAS, CAST_MATMUL = "cuBLAS fp32", "SGLang fp32 matmul"
FP32_LINEAR, TF32_LINEAR = "SGLang fp32 F.linear", "SGLang TF32 F.linear"
LINEAR = "F.linear"


class Skip(Exception):
    """The provider is not there; the message is the reason, in one phrase."""


def _any_num_tokens(num_tokens: int) -> str | None:
    return None


def _up_to(most: int) -> Callable[[int], str | None]:
    return lambda m: None if 1 <= m <= most else f"M is {m}, must be 1 to {most}"


@dataclass(frozen=True)
class Provider:
    """One router GEMM, for one N, K, form and device."""

    name: str
    make: Callable[[], Gemm]
    """Imports it and returns the call; may compile. Raises whatever it raises."""
    output: torch.dtype = FP32
    pdl: Pdl = "switch"
    """Whether programmatic dependent launch follows `pdl`, or is fixed."""
    supports: Callable[[int], str | None] = _any_num_tokens
    """Why a number of tokens is not served; None if it is."""
    note: str = ""
    ours: bool = False
    own_kernel: bool = False
    """A kernel of this project, not one that it calls."""
    serves: tuple[Form, ...] = (PLAIN,)
    """The forms that it is shown for. bf16 logits are shown beside fp32 ones, a lesser result."""
    tf32: bool = False
    """It rounds the weight to TF32, which has 10 bits of mantissa."""
    dtype: torch.dtype = BF16
    """The weight's."""
    bias: torch.Tensor | None = field(default=None, compare=False)
    """What it adds to each row."""

    def build(self) -> Gemm:
        """The call.

        Raises:
            Skip: it cannot be had here, for whatever reason.
        """
        try:
            return self.make()
        except Exception as error:  # a broken install raises anything
            raise Skip(str(error) if isinstance(error, Skip) else first_line(error)) from error


def all_providers(
    num_experts: int, hidden_size: int, device: torch.device, form: Form = PLAIN
) -> list[Provider]:
    """Every provider that has a chance at this shape and form, peers first."""
    function, dtype = _FLASHINFER.get((num_experts, hidden_size), ("", FP32))
    shape = f"N = {num_experts}, K = {hidden_size}"
    target = Target(device, device_sm(device), num_experts, hidden_size, *form)
    bias = torch.randn(num_experts, dtype=BF16, device=device) if form.bias else None
    # What writes bf16 logits is told apart by its name where the others' are fp32.
    mark = "" if form.logits_dtype == BF16 else " (bf16 out)"

    def no_flashinfer() -> Gemm:
        raise Skip(f"FlashInfer has no router GEMM for {shape}")

    providers = [
        Provider(
            f"FlashInfer{mark if dtype == BF16 else ''}",
            (lambda: _flashinfer(function, device)) if function else no_flashinfer,
            output=dtype,
            supports=_up_to(16),
            note=f"flashinfer.gemm.{function}" if function else "",
            serves=(PLAIN, BF16_LOGITS) if dtype == BF16 else (PLAIN,),
        ),
        Provider(
            f"FlashInfer tinygemm{mark}",
            lambda: _flashinfer_tinygemm(device, bias),
            output=BF16,
            note="flashinfer.gemm.tinygemm_bf16",
            serves=(PLAIN, BF16_LOGITS, WITH_BIAS),
        ),
        Provider(
            "sgl_kernel",
            lambda: _sgl_kernel(num_experts, hidden_size, device),
            pdl="always",
            supports=_up_to(16),
            note="sgl_kernel.dsv3_router_gemm; reads TRTLLM_ENABLE_PDL once a process",
        ),
        Provider(
            "SGLang dsv3",
            lambda: _sglang_dsv3(num_experts, hidden_size, device),
            pdl="always",
            supports=_up_to(16),
            note="sglang…dsv3_router_gemm, 0.5.15 to 0.5.19; PDL is compiled in",
        ),
        Provider(
            "SGLang tiny_gemm",
            lambda: _sglang_tiny_gemm(num_experts, hidden_size, device, form.dtype),
            output=form.logits_dtype,
            pdl="always",
            supports=_up_to(16),
            note="sglang.kernels.ops.gemm.tiny_gemm, max_m=16; PDL is compiled in",
            serves=(PLAIN, FP32_WEIGHT, BF16_LOGITS),
        ),
        Provider(
            "SGLang MoEGate",
            lambda: _sglang_gate(num_experts, hidden_size, device, form.dtype),
            pdl="always",
            note="MoEGate.forward of the installed release, without this plugin; "
            "PDL is compiled in where it calls a router kernel",
            serves=(PLAIN, FP32_WEIGHT),
        ),
        Provider(
            "SGLang router_gemv",
            lambda: _sglang_router_gemv(num_experts, hidden_size, device),
            pdl="never",
            supports=_up_to(8),
            note="sglang.kernels.ops.gemm.router_gemv.router_gemv",
            serves=(FP32_WEIGHT,),
        ),
        Provider(
            "SGLang router_gate_matvec",
            lambda: _sglang_fp32(device, "router_gate_matvec", "router_gate_matvec"),
            pdl="always",
            supports=_up_to(8),
            note="sglang.kernels.ops.gemm.router_gate_matvec; PDL is compiled in",
            serves=(FP32_WEIGHT,),
        ),
        Provider(
            "SGLang bf16x3",
            lambda: _sglang_fp32(device, "router_gemv", "router_gemm_bf16x3_cublas"),
            pdl="never",
            note="sglang.kernels.ops.gemm.router_gemv.router_gemm_bf16x3_cublas",
            serves=(FP32_WEIGHT,),
        ),
        Provider(
            FP32_LINEAR,
            lambda: _linear_of_fp32("highest"),
            pdl="never",
            note="torch.nn.functional.linear(hidden_states.float(), weight)",
            serves=(FP32_WEIGHT,),
        ),
        Provider(
            TF32_LINEAR,
            lambda: _linear_of_fp32("high"),
            pdl="never",
            note="the same under torch.set_float32_matmul_precision('high'), which SGLang's "
            "server sets for GLM-4.5 and MiniMax-M2",
            serves=(FP32_WEIGHT,),
            tf32=True,
        ),
        Provider(
            "vLLM ll_bf16",
            lambda: _vllm(device),
            pdl="always",
            note="vllm…cute_dsl.ll_bf16.ll_bf16_gemm; PDL is compiled in. vLLM's GateLinear "
            "calls it up to M = 16",
        ),
        Provider(
            CUBLAS,
            lambda: _cublas(device),
            pdl="never",
            note="torch.mm(…, out_dtype=torch.float32)",
        ),
        Provider(
            CAST_MATMUL,
            lambda: _matmul_of_casts,
            pdl="never",
            note="torch.matmul(hidden_states.float(), weight.t().float()), as in Step-3.5",
        ),
        Provider(
            f"{LINEAR}{mark}",
            lambda: lambda hidden_states, weight, out, pdl: F.linear(hidden_states, weight, bias),
            output=BF16,
            pdl="never",
            note="torch.nn.functional.linear",
            serves=(PLAIN, BF16_LOGITS, WITH_BIAS),
        ),
        *(_backend(backend, target, bias) for backend in BACKENDS.values()),
    ]
    return [replace(each, dtype=form.dtype, bias=bias) for each in providers if form in each.serves]


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables, and puts them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets how precise a product of fp32 matrices is, and puts it back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _kernel(device: torch.device, *places: tuple[str, str]) -> Any:
    """The first of (module, attribute) that exists; releases move and rename them."""
    _need_cuda(device)
    reasons = []
    for module, name in places:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # OSError of a missing library, RuntimeError, …
            reasons.append(first_line(error))
    raise Skip("; ".join(reasons))


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("no CUDA device")


def _declared(kernel: Any, device: torch.device) -> None:
    """FlashInfer says which compute capabilities a function has been built for."""
    major, minor = torch.cuda.get_device_capability(device)
    declares = getattr(kernel, "is_compute_capability_supported", None)
    if declares is not None and not declares(10 * major + minor):
        raise Skip(f"FlashInfer does not declare SM {major}{minor}")


def _flashinfer(function: str, device: torch.device) -> Gemm:
    kernel = _kernel(device, ("flashinfer.gemm", function))
    _declared(kernel, device)

    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        kernel(hidden_states, weight.t(), out, launch_with_pdl=pdl)
        return out

    return gemm


def _flashinfer_tinygemm(device: torch.device, bias: torch.Tensor | None) -> Gemm:
    kernel = _kernel(device, ("flashinfer.gemm", "tinygemm_bf16"))
    _declared(kernel, device)

    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        kernel(hidden_states, weight, out, bias, use_pdl=pdl)
        return out

    return gemm


def _sgl_kernel(num_experts: int, hidden_size: int, device: torch.device) -> Gemm:
    if num_experts not in (256, 384) or hidden_size != 7168:
        raise Skip("serves N = 256 or 384 and K = 7168 only")
    kernel = _kernel(device, ("sgl_kernel", "dsv3_router_gemm"))
    return lambda hidden_states, weight, out, pdl: kernel(hidden_states, weight, out_dtype=FP32)


def _sglang_dsv3(num_experts: int, hidden_size: int, device: torch.device) -> Gemm:
    if num_experts not in (256, 384) or hidden_size % 1024:
        raise Skip("serves N = 256 or 384 and K % 1024 = 0 only")
    name = "dsv3_router_gemm"
    kernel = _kernel(
        device,
        ("sglang.kernels.ops.gemm.dsv3_router_gemm", name),
        ("sglang.jit_kernel.dsv3_router_gemm", name),
    )
    return lambda hidden_states, weight, out, pdl: kernel(
        hidden_states, weight, out_dtype=FP32, output=out
    )


def _sglang_tiny_gemm(
    num_experts: int, hidden_size: int, device: torch.device, dtype: torch.dtype
) -> Gemm:
    if dtype == FP32 and num_experts >= hidden_size:
        raise Skip("with fp32 weights it serves N < K only")
    module = "sglang.kernels.ops.gemm.tiny_gemm"
    # Until 0.5.19 the variant for N < K had a name of its own.
    kernel = _kernel(device, (module, "tiny_gemm_bf16"), (module, "tiny_n_gemm_bf16"))
    can_use = getattr(importlib.import_module(module), "can_use_tiny_gemm", None)
    if can_use is not None and not can_use(num_experts, hidden_size, max_m=16):
        raise Skip("can_use_tiny_gemm says no to this shape")
    return lambda hidden_states, weight, out, pdl: kernel(hidden_states, weight, out, max_m=16)


def _sglang_gate(
    num_experts: int, hidden_size: int, device: torch.device, dtype: torch.dtype
) -> Gemm:
    _need_cuda(device)
    from sglang_router_gemm.check import sglang_gate

    gate = sglang_gate(device, num_experts, hidden_size, dtype)
    if gate.weight.dtype != dtype:
        raise Skip(f"this release keeps the weight in {gate.weight.dtype}")
    gate_class = type(gate)
    # Where a plugin hooked the class, the release's own forward lies below.
    forward = getattr(gate_class.forward, "__wrapped__", gate_class.forward)

    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        gate.weight.data = weight
        logits: torch.Tensor = forward(gate, hidden_states)
        return logits

    return gemm


def _sglang_router_gemv(num_experts: int, hidden_size: int, device: torch.device) -> Gemm:
    if num_experts % 16 or hidden_size % 128:
        raise Skip("serves N % 16 = 0 and K % 128 = 0 only")
    return _sglang_fp32(device, "router_gemv", "router_gemv")


def _sglang_fp32(device: torch.device, module: str, name: str) -> Gemm:
    """One of SGLang's for fp32 weights."""
    kernel = _kernel(device, (f"sglang.kernels.ops.gemm.{module}", name))
    return lambda hidden_states, weight, out, pdl: kernel(hidden_states, weight)


def _linear_of_fp32(precision: str) -> Gemm:
    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        with matmul_precision(precision):
            return F.linear(hidden_states.float(), weight)

    return gemm


def _matmul_of_casts(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    return torch.matmul(hidden_states.to(FP32), weight.t().to(FP32))


def _vllm(device: torch.device) -> Gemm:
    module = "vllm.model_executor.kernels.linear.cute_dsl.ll_bf16"
    if not _kernel(device, (module, "is_available"))():
        raise Skip("the CuTe DSL cannot be imported")
    kernel = _kernel(device, (module, "ll_bf16_gemm"))
    return lambda hidden_states, weight, out, pdl: kernel(hidden_states, weight)


def _cublas(device: torch.device) -> Gemm:
    _need_cuda(device)
    return lambda hidden_states, weight, out, pdl: torch.mm(
        hidden_states, weight.t(), out_dtype=FP32, out=out
    )


def _backend(backend: Backend, target: Target, bias: torch.Tensor | None) -> Provider:
    """A backend of this project, behind a gate's plan."""
    rule = backend.rule

    def refusal(num_tokens: int) -> str | None:
        reason = rule.refuse_weight(target)
        if reason is None and num_tokens not in rule.num_tokens:
            reason = f"M is {num_tokens}, must be {either(rule.num_tokens)}"
        return reason

    return Provider(
        f"ours: {backend.name}",
        lambda: _planned(backend, target, bias),
        output=target.logits_dtype,
        pdl=backend.pdl,
        supports=refusal,
        note=f"the gate's plan under SGLANG_ROUTER_GEMM_BACKEND={backend.name}",
        ours=True,
        own_kernel=backend.measured_sms is not None,
        serves=(target.form,),
    )


def _planned(backend: Backend, target: Target, bias: torch.Tensor | None) -> Gemm:
    reason = backend.rule.refuse_weight(target)
    if reason is not None:
        raise Skip(reason)
    shape = target.num_experts, target.hidden_size
    weight = torch.empty(shape, dtype=target.dtype, device=target.device)
    # A plan reads the variable when it is made, and no call reads it: do_bench sees the host.
    plans = {}
    for pdl in (True, False):
        with environment(SGLANG_ROUTER_GEMM_PDL=str(pdl)):
            plans[pdl] = make_plan(
                weight, backend.name, own_logits_dtype=target.logits_dtype, bias=bias
            )
        if plans[pdl].decision.backend is None:
            raise Skip(plans[pdl].decision.reason)

    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        logits = plans[pdl].logits(hidden_states, weight, bias=bias)
        if logits is None:
            _, reason = plans[pdl].why_not(hidden_states, weight)
            raise RuntimeError(f"the plan did not take {backend.name}: {reason}")
        return logits

    return gemm
