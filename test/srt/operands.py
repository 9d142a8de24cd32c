"""Random operands of a router GEMM, for the fuzz tests on a CPU and on a GPU."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

settings.register_profile(
    "fuzz", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fuzz")


def mostly(*values: object, other: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Mostly one of `values`, so that calls that are served come up often enough."""
    return st.one_of(st.sampled_from(values), st.sampled_from(values), other)


@st.composite
def matrices(
    draw: st.DrawFn, rows: int, columns: int, device: str = "cpu", plain: bool = False
) -> torch.Tensor:
    """A matrix as a view of something larger, transposed, offset or, where asked, plain."""
    dtype, row_step, column_step, padding = torch.bfloat16, 1, 1, 0
    offset = draw(st.sampled_from([0, 8]))
    if not plain:
        dtype = draw(mostly(dtype, other=st.sampled_from(FLOATS)))
        row_step, column_step = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
        offset, padding = draw(st.sampled_from([0, 0, 1, 8])), draw(st.sampled_from([0, 0, 3, 16]))
    width = columns * column_step + padding
    size = offset + rows * row_step * width + 1
    storage = torch.randn(size, device=device).to(dtype)
    special = draw(st.sampled_from([None, None, None, math.nan, math.inf, 1e-40]))
    if special is not None:
        storage[draw(st.integers(0, len(storage) - 1))] = special
    stride = (row_step * width, column_step)
    matrix = storage.as_strided((rows, columns), stride, offset)
    if not plain and draw(st.booleans()):
        matrix = matrix.t().contiguous().t()
    return matrix.requires_grad_(draw(st.booleans()))


def same_as_fp64(logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    expected = hidden_states.detach().double() @ weight.detach().double().t()
    size = hidden_states.detach().double().norm(dim=1, keepdim=True) * (
        weight.detach().double().norm(dim=1)
    )
    logits, finite = logits.detach().double(), expected.isfinite() & size.isfinite()
    if not torch.equal(logits.isnan() & ~finite, expected.isnan() & ~finite):
        return False
    return bool(((logits - expected).abs() <= 1e-5 * size + 1e-30)[finite].all())
