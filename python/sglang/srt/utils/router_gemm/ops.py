"""The router GEMM as custom ops, which torch.compile does not look into.

An op is total: inside a compiled region M is symbolic, one graph serves every M, and
SGLang's compiled prefill reuses it without guards. So each op asks the policy once
more, now with the real tensors, and what its kernel does not take (M = 17, say) goes
to an fp32-output matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang.srt.utils.custom_op import register_custom_op
from sglang.srt.utils.router_gemm import kernels
from sglang.srt.utils.router_gemm.call import describe_call
from sglang.srt.utils.router_gemm.environ import pdl_enabled
from sglang.srt.utils.router_gemm.policy import refuse


def _free_op_name(name: str) -> str:
    """`name`, or another where `sglang::name` is taken.

    `register_custom_op` keeps whatever op already has the name. SGLang 0.5.11 to
    0.5.14 register `flashinfer_dsv3_router_gemm` when `deepseek_v2` is imported, with
    a schema that declares no mutated argument: torch.compile may then drop the call
    or move it, and the logits stay uninitialised. An op cannot be redefined, so ours
    moves to a name of its own; whoever imports first, this module's functions are
    ours.
    """
    return f"{name}_mutating" if hasattr(torch.ops.sglang, name) else name


def _register(
    name: str,
    impl: Callable[..., Any],
    mutates_args: list[str],
    fake_impl: Callable[..., Any],
) -> Callable[..., Any]:
    op_name = _free_op_name(name)
    op: Callable[..., Any] = register_custom_op(
        impl, op_name=op_name, mutates_args=mutates_args, fake_impl=fake_impl
    )
    # SGLang registers for CUDA alone. No router kernel runs on a CPU, but a total op
    # has an answer there too, so a graph traced for a GPU can be checked without one.
    torch.library.register_kernel(f"sglang::{op_name}", "cpu", impl)
    return op


def _serves(backend: str, hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    call = describe_call(hidden_states, weight)
    unavailable = kernels.unavailable(
        backend, hidden_states.device, call.num_experts, call.hidden_size
    )
    return refuse(backend, call, unavailable) is None


def _check_operands(hidden_states: torch.Tensor, weight: torch.Tensor) -> None:
    for name, tensor in (("hidden_states", hidden_states), ("weight", weight)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, must be a matrix")
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype}, must be torch.bfloat16 (or another float of 16 or "
                "32 bits, for an fp32-output matmul)"
            )
    if weight.dtype != hidden_states.dtype:
        raise ValueError(f"weight is {weight.dtype}, must be {hidden_states.dtype}")
    if weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, must be [N, {hidden_states.shape[1]}]"
        )
    if weight.device != hidden_states.device:
        raise ValueError(f"weight is on {weight.device}, must be on {hidden_states.device}")


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


def empty_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 `[M, N]`, not written, where `hidden_states` is."""
    return hidden_states.new_empty((hidden_states.shape[0], weight.shape[0]), dtype=torch.float32)


def _cluster_router_gemm(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T` in fp32, with this project's kernel where it serves.

    Args:
        hidden_states: bf16 `[M, K]`, any M.
        weight: bf16 `[N, K]`, on the same device.

    Returns:
        The logits, fp32 `[M, N]`. Up to M = 128 a row's bits do not depend on M.

    Raises:
        ValueError: an argument is not that; it is named.
    """
    _check_operands(hidden_states, weight)
    if not _serves("cluster", hidden_states, weight):
        return kernels.matmul_fp32(hidden_states, weight)
    logits = empty_logits(hidden_states, weight)
    kernels.run_cluster(logits, hidden_states, weight, pdl=pdl_enabled())
    return logits


def _flashinfer_dsv3_router_gemm(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> None:
    """Writes `hidden_states @ weight.T` into `logits`, with FlashInfer's kernel where it serves.

    Args:
        logits: fp32 `[M, N]`, contiguous, on the device of the other two; written.
        hidden_states: bf16 `[M, K]`, any M.
        weight: bf16 `[N, K]`.

    Raises:
        ValueError: `logits` is not that.
    """
    _check_logits(logits, hidden_states, weight)
    if _serves("flashinfer", hidden_states, weight):
        kernels.run_flashinfer(logits, hidden_states, weight, pdl=pdl_enabled())
    else:
        kernels.matmul_fp32(hidden_states, weight, out=logits)


def _sgl_kernel_dsv3_router_gemm(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T` in fp32, with sgl-kernel's kernel where it serves.

    Args:
        hidden_states: bf16 `[M, K]`, any M.
        weight: bf16 `[N, K]`, on the same device.

    Returns:
        The logits, fp32 `[M, N]`.
    """
    if _serves("sgl_kernel", hidden_states, weight):
        return kernels.run_sgl_kernel(hidden_states, weight)
    return kernels.matmul_fp32(hidden_states, weight)


cluster_router_gemm = _register(
    "cluster_router_gemm",
    _cluster_router_gemm,
    mutates_args=[],
    fake_impl=empty_logits,
)

flashinfer_dsv3_router_gemm = _register(
    "flashinfer_dsv3_router_gemm",
    _flashinfer_dsv3_router_gemm,
    mutates_args=["logits"],
    fake_impl=lambda logits, hidden_states, weight: None,
)

sgl_kernel_dsv3_router_gemm = _register(
    "sgl_kernel_dsv3_router_gemm",
    _sgl_kernel_dsv3_router_gemm,
    mutates_args=[],
    fake_impl=empty_logits,
)
