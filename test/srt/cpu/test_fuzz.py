"""Random calls against the policy, and random tensors against the ops, on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.layers.moe_router import ops
from sglang.srt.layers.moe_router.call import RouterGemmCall, describe_call
from sglang.srt.layers.moe_router.policy import BACKENDS, RULES, select_backend

CASES = 20_000
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)
FLOATS = DTYPES[:3]

settings.register_profile(
    "fuzz", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fuzz")


def _mostly(*values: object, other: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Mostly one of `values`, so that calls that are served come up often enough."""
    return st.one_of(st.sampled_from(values), st.sampled_from(values), other)


def _around(last: int, step: int) -> st.SearchStrategy[int]:
    """Anything up to twice `last`, with multiples of half a step and the edge in between."""
    multiples = st.integers(0, 4 * last // step).map(lambda count: count * step // 2)
    edge = st.sampled_from([0, step, last, last + step])
    return st.one_of(edge, multiples, st.integers(0, 2 * last))


CALLS = st.builds(
    RouterGemmCall,
    device_type=_mostly("cuda", other=st.sampled_from(["cpu", "xpu", "meta"])),
    sm=_mostly(90, 100, 103, other=st.one_of(st.none(), st.integers(0, 200))),
    num_tokens=_mostly(1, 8, 16, other=st.one_of(st.none(), st.integers(0, 100_000))),
    num_experts=_mostly(256, 384, 160, 128, other=_around(1024, step=16)),
    hidden_size=_mostly(7168, 6144, 5120, other=_around(8192, step=512)),
    hidden_states_dtype=_mostly(torch.bfloat16, other=st.sampled_from(DTYPES)),
    weight_dtype=_mostly(torch.bfloat16, other=st.sampled_from(DTYPES)),
    same_device=_mostly(True, other=st.booleans()),
    matching_shapes=_mostly(True, other=st.booleans()),
    row_major=_mostly(True, other=st.booleans()),
    aligned=_mostly(True, None, other=st.booleans()),
    deterministic_inference=_mostly(False, other=st.booleans()),
    context_parallel=_mostly(False, other=st.booleans()),
)
UNAVAILABLE = st.fixed_dictionaries(
    dict.fromkeys(RULES, _mostly(None, other=st.just("not installed")))
)


def _serves(backend: str, call: RouterGemmCall) -> bool:
    """The rules of README.md's table, written once more and in another way."""
    m, n, k = call.num_tokens, call.num_experts, call.hidden_size
    if call.deterministic_inference or call.context_parallel:
        return False
    if not (call.same_device and call.matching_shapes):
        return False
    if call.hidden_states_dtype != call.weight_dtype:
        return False
    if backend == "torch":
        return call.device_type in ("cuda", "cpu") and call.weight_dtype.itemsize == 2
    if call.device_type != "cuda" or call.sm is None or call.sm < 90:
        return False
    if call.weight_dtype != torch.bfloat16 or not call.row_major or call.aligned is False:
        return False
    if backend == "cluster":
        shape = n % 16 == 0 and 0 < n <= 1024 and k % 512 == 0 and 0 < k <= 8192
        return shape and (m is None or m <= 128)
    served = {"flashinfer": (256,), "sgl_kernel": (256, 384)}[backend]
    return n in served and k == 7168 and (m is None or 1 <= m <= 16)


def _is_faster(backend: str, call: RouterGemmCall) -> bool:
    """Where README.md says that `auto` takes `backend`, the SM aside."""
    first, last = 1, 16
    if backend == "cluster":
        shape = call.num_experts, call.hidden_size
        if shape == (256, 7168):
            last = 128
        elif shape == (160, 5120):
            first = 2
        elif shape == (128, 7168):
            first = 4
        elif shape not in [(384, 7168), (256, 6144)]:
            return False
    return call.num_tokens is None or first <= call.num_tokens <= last


@settings(max_examples=CASES)
@given(call=CALLS, requested=st.sampled_from(BACKENDS), unavailable=UNAVAILABLE)
def test_the_policy(
    call: RouterGemmCall, requested: str, unavailable: dict[str, str | None]
) -> None:
    backend, refusal = select_backend(call, requested, unavailable)
    assert (backend is None) == (refusal is not None)
    if backend is not None:
        assert unavailable[backend] is None
        assert _serves(backend, call)
    if requested in RULES:
        serves = unavailable[requested] is None and _serves(requested, call)
        assert (backend == requested) is serves
    if requested == "auto" and call.device_type == "cuda":
        name = {90: "cluster", 100: "flashinfer", 103: "flashinfer"}.get(call.sm or 0)
        if name is None:
            assert backend is None
        else:
            here = unavailable[name] is None and _serves(name, call) and _is_faster(name, call)
            assert backend == (name if here else None)
    if requested == "off":
        assert backend is None


@st.composite
def matrices(
    draw: st.DrawFn, rows: int, columns: int, device: str = "cpu", plain: bool = False
) -> torch.Tensor:
    """A matrix as a view of something larger, transposed, offset or, where asked, plain."""
    dtype, row_step, column_step, padding = torch.bfloat16, 1, 1, 0
    offset = draw(st.sampled_from([0, 8]))
    if not plain:
        dtype = draw(_mostly(dtype, other=st.sampled_from(FLOATS)))
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


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    columns = draw(st.sampled_from([0, 1, 64, 512]))
    wrong = draw(st.sampled_from([0, 0, 0, 0, 1]))
    rows, experts = draw(st.integers(0, 40)), draw(st.sampled_from([1, 16, 17, 32]))
    return draw(matrices(rows, columns)), draw(matrices(experts, columns + wrong))


def same_as_fp64(logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    expected = hidden_states.detach().double() @ weight.detach().double().t()
    size = hidden_states.detach().double().norm(dim=1, keepdim=True) * (
        weight.detach().double().norm(dim=1)
    )
    logits, finite = logits.detach().double(), expected.isfinite() & size.isfinite()
    if not torch.equal(logits.isnan() & ~finite, expected.isnan() & ~finite):
        return False
    return bool(((logits - expected).abs() <= 1e-5 * size + 1e-30)[finite].all())


@settings(max_examples=1000)
@given(pair=operands())
def test_ops_are_right_or_name_the_argument(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden_states, weight = pair
    call = describe_call(hidden_states, weight)
    assert call.row_major == (hidden_states.is_contiguous() and weight.is_contiguous())
    assert call.aligned == all(each.data_ptr() % 16 == 0 for each in pair)
    fits = hidden_states.shape[1] == weight.shape[1] and hidden_states.dtype == weight.dtype
    assert call.matching_shapes == (hidden_states.shape[1] == weight.shape[1])
    if not fits:
        with pytest.raises(ValueError, match=r"^weight (is|has)"):
            ops._cluster_router_gemm(hidden_states, weight)
        return
    with torch.no_grad():
        logits = ops.cluster_router_gemm(hidden_states, weight)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(hidden_states), len(weight))
    assert same_as_fp64(logits, hidden_states, weight)
