"""Random weights against the decision, and random tensors against the ops, on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import matrices, mostly, same_as_fp64

from sglang.srt.layers.moe_router import ops
from sglang.srt.layers.moe_router.backends import BACKENDS
from sglang.srt.layers.moe_router.environ import CHOICES
from sglang.srt.layers.moe_router.kernel import Target
from sglang.srt.layers.moe_router.plan import decide

CASES = 20_000
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)


def _around(last: int, step: int) -> st.SearchStrategy[int]:
    """Anything up to twice `last`, with multiples of half a step and the edge in between."""
    multiples = st.integers(0, 4 * last // step).map(lambda count: count * step // 2)
    edge = st.sampled_from([0, step, last, last + step])
    return st.one_of(edge, multiples, st.integers(0, 2 * last))


TARGETS = st.builds(
    Target,
    device=mostly("cuda", other=st.sampled_from(["cpu", "xpu", "meta"])).map(torch.device),
    sm=mostly(90, 100, 103, other=st.one_of(st.none(), st.integers(0, 200))),
    num_experts=mostly(256, 384, 160, 128, other=_around(1024, step=16)),
    hidden_size=mostly(7168, 6144, 5120, 4096, 2880, other=_around(8192, step=64)),
    dtype=mostly(torch.bfloat16, torch.float32, other=st.sampled_from(DTYPES)),
    logits_dtype=mostly(torch.float32, torch.bfloat16, other=st.sampled_from(DTYPES)),
    bias=mostly(False, other=st.just(True)),
)
UNAVAILABLE = st.fixed_dictionaries(
    dict.fromkeys(BACKENDS, mostly(None, other=st.just("not installed")))
)


def _serves(backend: str, target: Target, num_tokens: int) -> bool:
    """The rules of README.md's table, written once more and in another way."""
    m, n, k, dtype = num_tokens, target.num_experts, target.hidden_size, target.dtype
    logits = target.logits_dtype
    if backend == "torch":
        floats = dtype.itemsize in (2, 4) and logits.itemsize in (2, 4)
        return target.device.type in ("cuda", "cpu") and floats
    if target.device.type != "cuda" or target.sm is None or target.sm < 90:
        return False
    if dtype != torch.bfloat16 and (backend, dtype) != ("cluster", torch.float32):
        return False
    if logits != torch.float32 and (backend, logits) != ("cluster", torch.bfloat16):
        return False
    if target.bias and backend != "cluster":
        return False
    if backend == "cluster":
        return n % 16 == 0 and 0 < n <= 1024 and k % 64 == 0 and 0 < k <= 8192 and m <= 128
    served = {"flashinfer": (256,), "sgl_kernel": (256, 384)}[backend]
    return n in served and k == 7168 and 1 <= m <= 16


def _auto_takes(target: Target, num_tokens: int) -> str | None:
    """Whom `auto` takes, by README.md's table, written once more and in another way."""
    shape, m = (target.num_experts, target.hidden_size), num_tokens
    if target[4:] != (torch.bfloat16, torch.float32, False):
        others = {
            (torch.float32, torch.float32, False): [
                (160, 5120),
                (128, 4096),
                (256, 3072),
                (256, 4096),
                (256, 2816),
                (768, 6144),
            ],
            (torch.bfloat16, torch.bfloat16, False): [
                (128, 4096),
                (128, 2048),
                (512, 2048),
                (256, 2304),
            ],
            (torch.bfloat16, torch.bfloat16, True): [(128, 2880)],
        }
        known = shape in others.get(target[4:], ())
        last = 63 if shape == (768, 6144) else 128
        return "cluster" if target.sm == 90 and known and 1 <= m <= last else None
    if target.sm == 90:
        up_to_16 = (384, 7168), (256, 6144), (160, 5120), (128, 7168)
        known = shape in [*up_to_16, (256, 7168), (256, 4096), (288, 4096)]
        last = 16 if shape in up_to_16 else 128
        first = {(160, 5120): 2, (128, 7168): 4}.get(shape, 1)
        return "cluster" if known and first <= m <= last else None
    if target.sm in (100, 103):
        return "flashinfer" if shape == (256, 7168) and 1 <= m <= 16 else None
    return None


@settings(max_examples=CASES)
@given(
    target=TARGETS,
    num_tokens=mostly(1, 8, 16, other=st.integers(0, 100_000)),
    requested=st.sampled_from(CHOICES),
    unavailable=UNAVAILABLE,
    deterministic=mostly(False, other=st.booleans()),
)
def test_the_decision(
    target: Target,
    num_tokens: int,
    requested: str,
    unavailable: dict[str, str | None],
    deterministic: bool,
) -> None:
    found = decide(requested, target, lambda backend: unavailable[backend.name], deterministic)
    serves = num_tokens in found.num_tokens
    assert found.reason
    assert (found.backend is None) == (len(found.num_tokens) == 0)
    if deterministic or requested == "off":
        assert found.backend is None
        return
    name = _auto_takes(target, num_tokens) if requested == "auto" else requested
    expected = name is not None and unavailable[name] is None and _serves(name, target, num_tokens)
    assert serves is expected
    if serves:
        assert found.backend is BACKENDS[name]
    ranges = found.ranges()
    told = [who for tokens, who in ranges if _is_in(num_tokens, tokens)]
    if num_tokens:
        assert told == [name if serves else None]


def _is_in(num_tokens: int, tokens: str) -> bool:
    first, _, last = tokens.removesuffix("+").partition("-")
    end = float("inf") if tokens.endswith("+") else int(last or first)
    return int(first) <= num_tokens <= end


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    columns = draw(st.sampled_from([0, 1, 64, 512]))
    wrong = draw(st.sampled_from([0, 0, 0, 0, 1]))
    rows, experts = draw(st.integers(0, 40)), draw(st.sampled_from([1, 16, 17, 32]))
    return draw(matrices(rows, columns)), draw(matrices(experts, columns + wrong))


@settings(max_examples=1000)
@given(pair=operands())
def test_ops_are_right_or_name_the_argument(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden_states, weight = pair
    dtypes = hidden_states.dtype, weight.dtype
    served = dtypes in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
    same_width = hidden_states.shape[1] == weight.shape[1]
    fits = same_width and (served or dtypes[0] == dtypes[1])
    dense = hidden_states.is_contiguous() and weight.is_contiguous()
    aligned = all(each.data_ptr() % 16 == 0 for each in pair)
    rule = BACKENDS["cluster"].rule
    taken = fits and dense and served
    assert rule.takes_layout(*pair) == (taken and aligned)
    assert rule.takes_layout(*pair, addresses=False) == taken
    assert rule.takes(*pair) == (taken and aligned and len(hidden_states) <= 128)
    if not fits:
        with pytest.raises(ValueError, match=r"^weight (is|has)"):
            ops._compute(BACKENDS["cluster"], hidden_states, weight)
        return
    with torch.no_grad():
        logits = ops.cluster_router_gemm(hidden_states, weight)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(hidden_states), len(weight))
    assert same_as_fp64(logits, hidden_states, weight)
