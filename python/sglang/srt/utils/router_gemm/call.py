"""What the policy needs to know of one router GEMM, as plain values."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

try:
    from sglang.srt.runtime_context import get_exec
except ImportError:  # SGLang < 0.5.17
    from sglang.srt.server_args import get_global_server_args

    def _deterministic_inference() -> bool:
        return get_global_server_args().enable_deterministic_inference
else:

    def _deterministic_inference() -> bool:
        return get_exec().deterministic.enable_deterministic_inference


# The widest vector load of the kernels in the table is 16 bytes.
ALIGNMENT_BYTES = 16


class RouterGemmCall(NamedTuple):
    """One call of the router GEMM. `None` means: known only when the kernel runs.

    Under torch.compile the number of tokens may be symbolic and addresses do not
    exist yet. The policy leaves such conditions open, and the op, which sees real
    tensors, asks the policy again.
    """

    device_type: str
    sm: int | None
    """10 * major + minor of an NVIDIA GPU's compute capability, else None."""
    num_tokens: int | None
    num_experts: int
    hidden_size: int
    hidden_states_dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    same_device: bool = True
    matching_shapes: bool = True
    """`[M, K]` and `[N, K]`: both matrices, with one K."""
    row_major: bool = True
    """Both dense and row-major; FlashInfer < 0.7 does not check row strides."""
    aligned: bool | None = True
    """Both start at a multiple of `ALIGNMENT_BYTES`."""
    deterministic_inference: bool = False
    context_parallel: bool = False
    """The batch is a context-parallel prefill, which SGLang routes by itself."""


@torch.compiler.assume_constant_result
def device_sm(device_type: str, device_index: int | None) -> int | None:
    """SM of a CUDA device as 10 * major + minor; None for any other device (ROCm too)."""
    return _nvidia_sm(device_index) if device_type == "cuda" else None


@functools.cache
def _nvidia_sm(device_index: int | None) -> int | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@torch.compiler.assume_constant_result
def deterministic_inference() -> bool:
    """Whether the server runs with `--enable-deterministic-inference`."""
    try:
        return bool(_deterministic_inference())
    except ValueError:  # no ServerArgs published: the gate is used outside of a server
        return False


def describe_call(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    forward_batch: ForwardBatch | None = None,
) -> RouterGemmCall:
    """Reads off what the policy needs; costs no synchronisation and works in a trace."""
    num_tokens: int | None = hidden_states.shape[0]
    aligned: bool | None
    if torch.compiler.is_compiling():
        aligned = None
        if not has_static_value(num_tokens):
            num_tokens = None
    else:
        addresses = hidden_states.data_ptr() | weight.data_ptr()
        aligned = addresses % ALIGNMENT_BYTES == 0
    device = hidden_states.device
    return RouterGemmCall(
        device_type=device.type,
        sm=device_sm(device.type, device.index),
        num_tokens=num_tokens,
        num_experts=weight.shape[0],
        hidden_size=weight.shape[-1],
        hidden_states_dtype=hidden_states.dtype,
        weight_dtype=weight.dtype,
        same_device=device == weight.device,
        matching_shapes=(
            hidden_states.dim() == 2
            and weight.dim() == 2
            and hidden_states.shape[1] == weight.shape[1]
        ),
        row_major=hidden_states.is_contiguous() and weight.is_contiguous(),
        aligned=aligned,
        deterministic_inference=deterministic_inference(),
        context_parallel=getattr(forward_batch, "attn_cp_metadata", None) is not None,
    )
