"""The router GEMM as custom ops, which torch.compile does not look into: one a backend.

An op is total: inside a compiled region M is symbolic, one graph serves every M, and
SGLang's compiled prefill reuses it without guards. What the kernel does not take (M = 17,
say) goes to an fp32-output matmul.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang.srt.layers.moe_router.backends import BACKENDS, Backend, find_kernel, matmul_fp32
from sglang.srt.layers.moe_router.environ import pdl_enabled
from sglang.srt.layers.moe_router.kernel import Target, empty_logits, fit_together
from sglang.srt.utils.custom_op import register_custom_op


def _compute(
    backend: Backend,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """What every op does: the backend's kernel where it serves, else a matmul."""
    if weight.dim() == 2 and backend.rule.takes(hidden_states, weight, bias):
        num_experts, hidden_size = weight.shape
        options = weight.dtype, logits_dtype, bias is not None
        target = Target(weight.device, None, num_experts, hidden_size, *options)
        kernel = find_kernel(backend, target)
        if not isinstance(kernel, str):
            if logits is None:
                logits = empty_logits(hidden_states, weight, logits_dtype)
            return kernel(hidden_states, weight, logits, pdl_enabled(), bias)
    _check_operands(hidden_states, weight, bias)
    if logits is None and logits_dtype != torch.float32:
        logits = empty_logits(hidden_states, weight, logits_dtype)
    return matmul_fp32(hidden_states, weight, logits, bias=bias)


def _check_operands(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    for name, tensor in (("hidden_states", hidden_states), ("weight", weight)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, must be a matrix")
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype}, must be torch.bfloat16 (or another float of 16 or "
                "32 bits, for an fp32-output matmul)"
            )
    if not fit_together(hidden_states.dtype, weight.dtype):
        raise ValueError(f"weight is {weight.dtype}, must be {hidden_states.dtype}")
    if weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, must be [N, {hidden_states.shape[1]}]"
        )
    if weight.device != hidden_states.device:
        raise ValueError(f"weight is on {weight.device}, must be on {hidden_states.device}")
    if bias is None:
        return
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {list(bias.shape)}, must be [{weight.shape[0]}]")
    if not bias.dtype.is_floating_point:
        raise ValueError(f"bias is {bias.dtype}, must be torch.bfloat16 (or another float)")
    if bias.device != weight.device:
        raise ValueError(f"bias is on {bias.device}, must be on {weight.device}")


def _check_logits(logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor) -> None:
    expected = (hidden_states.shape[0], weight.shape[0])
    if tuple(logits.shape) != expected:
        raise ValueError(f"logits has shape {list(logits.shape)}, must be {list(expected)}")
    if logits.dtype != torch.float32:
        raise ValueError(f"logits is {logits.dtype}, must be torch.float32")
    if not logits.is_contiguous():
        raise ValueError(f"logits has strides {logits.stride()}, must be contiguous")
    if logits.device != hidden_states.device:
        raise ValueError(f"logits is on {logits.device}, must be on {hidden_states.device}")


def _register(backend: Backend) -> Callable[..., torch.Tensor | None]:
    assert backend.op is not None

    def returning(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        logits_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        return _compute(backend, hidden_states, weight, bias, logits_dtype)

    def returning_fake(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        logits_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        return empty_logits(hidden_states, weight, logits_dtype)

    def writing(logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor) -> None:
        _check_logits(logits, hidden_states, weight)
        _compute(backend, hidden_states, weight, logits=logits)

    impl: Callable[..., torch.Tensor | None] = returning
    fake_impl: Callable[..., torch.Tensor | None] = returning_fake
    if backend.op_writes_logits:
        impl, fake_impl = writing, lambda logits, hidden_states, weight: None
    op: Callable[..., torch.Tensor | None] = register_custom_op(
        impl,
        op_name=backend.op,
        mutates_args=["logits"] if backend.op_writes_logits else [],
        fake_impl=fake_impl,
    )
    # SGLang registers for CUDA alone. No router kernel runs on a CPU, but a total op
    # has an answer there too, so a graph traced for a GPU can be checked without one.
    torch.library.register_kernel(f"sglang::{backend.op}", "cpu", impl)
    return op


_OPS = {name: _register(backend) for name, backend in BACKENDS.items() if backend.op is not None}


def router_gemm(
    backend: Backend,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`hidden_states @ weight.T (+ bias)`, summed in fp32, through the op of `backend`.

    Args:
        backend: whose kernel, where it serves.
        hidden_states: bf16 `[M, K]`, any M; fp16 and fp32 too, for the matmul.
        weight: `[N, K]` on the same device, of the same dtype, or fp32 where they are bf16.
        bias: `[N]`; only for a backend whose rule takes one.
        logits_dtype: one that its rule takes.

    Returns:
        The logits, `[M, N]`. Up to M = 128 a row's bits do not depend on M with `cluster`.

    Raises:
        ValueError: an argument is not that; it is named.
    """
    if backend.op is None:
        return matmul_fp32(hidden_states, weight, bias=bias).to(logits_dtype)
    op = _OPS[backend.name]
    if backend.op_writes_logits:
        logits = empty_logits(hidden_states, weight)
        op(logits, hidden_states, weight)
        return logits
    returned = op(hidden_states, weight, bias, logits_dtype)
    assert returned is not None
    return returned


cluster_router_gemm = _OPS["cluster"]
flashinfer_dsv3_router_gemm = _OPS["flashinfer"]
