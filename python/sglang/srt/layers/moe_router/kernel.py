"""What a kernel is to all who load or call one: what it is loaded for, and how it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

# The widest vector load of any kernel here.
ALIGNMENT_BYTES = 16


class Form(NamedTuple):
    """The dtypes of a gate's weight and logits, and whether it adds a bias, `[N]` in bf16."""

    dtype: torch.dtype = torch.bfloat16
    logits_dtype: torch.dtype = torch.float32
    bias: bool = False


class Target(NamedTuple):
    """What a kernel is loaded for: a device and its SM, and what it computes there.

    Its `dtype` is the weight's, which is `[num_experts, hidden_size]`. With a `bias`, a bf16
    `[num_experts]` is added before the logits are rounded to `logits_dtype`.
    """

    device: torch.device
    sm: int | None
    num_experts: int
    hidden_size: int
    dtype: torch.dtype = torch.bfloat16
    logits_dtype: torch.dtype = torch.float32
    bias: bool = False

    @property
    def gate(self) -> tuple[int, int, torch.dtype, torch.dtype, bool]:
        """What it computes, wherever."""
        return self[2:]

    @property
    def form(self) -> Form:
        """The same without its shape."""
        return Form(*self[4:])

    def __str__(self) -> str:
        """The same, as a person writes it."""
        text = f"[{self.num_experts}, {self.hidden_size}]"
        if self.dtype != torch.bfloat16:
            text += f" {dtype_name(self.dtype)}"
        if self.bias:
            text += " with a bias"
        if self.logits_dtype != torch.float32:
            text += f", {dtype_name(self.logits_dtype)} logits"
        return text


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, say."""
    return str(dtype).removeprefix("torch.")


class Run(Protocol):
    """A kernel, on the current stream.

    It gives logits `[M, N]`: it writes and returns `logits`, or returns a tensor of its own where
    the library allocates. `bias` is there if it was loaded for one.
    """

    def __call__(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor: ...


Loaded = tuple[Run, Sequence[int]]
"""A kernel, and each M that is compared with fp64 before it is believed. One for each function
that CUDA would otherwise load at its first launch, in a graph capture perhaps."""


def device_sm(device: torch.device) -> int | None:
    """10 * major + minor of an NVIDIA GPU's compute capability, None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fits(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the two are `[M, K]` and `[N, K]`, of fitting dtypes and on one device."""
    return (
        hidden_states.dim() == 2
        and hidden_states.shape[1] == weight.shape[1]
        and fit_together(hidden_states.dtype, weight.dtype)
        and hidden_states.device == weight.device
    )


def fit_together(hidden_states: torch.dtype, weight: torch.dtype) -> bool:
    """Whether they are of one dtype, or the weight of a bf16 model's gate is kept in fp32."""
    return hidden_states == weight or (hidden_states == torch.bfloat16 and weight == torch.float32)


def is_aligned(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both start at a multiple of `ALIGNMENT_BYTES`."""
    return (hidden_states.data_ptr() | weight.data_ptr()) % ALIGNMENT_BYTES == 0


def empty_logits(
    hidden_states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`[M, N]`, not written, where `hidden_states` is."""
    # The dtype is said: while a model loads, SGLang's default dtype is the model's.
    return hidden_states.new_empty((hidden_states.shape[0], weight.shape[0]), dtype=dtype)


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """‖logits - expected‖ / ‖expected‖, in fp64 on the CPU; NaN where a value is not finite."""
    expected = expected.cpu().double()
    return float((logits.cpu().double() - expected).norm() / expected.norm())
