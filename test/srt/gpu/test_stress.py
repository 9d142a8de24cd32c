"""Many calls on a real GPU: random ones, and graphs of every M replayed 100,000 times."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import run_of
from operands import matrices, same_as_fp64

from sglang.srt.layers.moe_router import backends, ops
from sglang.srt.layers.moe_router.backends import BACKENDS
from sglang.srt.layers.moe_router.kernel import Run, fit_together

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cluster_backend")]

CASES = 5000
REPLAYS = 100_000
MAX_TOKENS = 128
BF16, FP32 = torch.bfloat16, torch.float32
REPLAYED = [(256, 7168, BF16), (160, 5120, FP32)]
SERVED = [*REPLAYED, (160, 5120, BF16), (48, 1536, BF16), (16, 512, BF16)]
WEIGHTS = [*SERVED, (17, 512, BF16), (16, 64, BF16)]


@pytest.fixture
def cluster_backend(monkeypatch: pytest.MonkeyPatch, publish_server_args: object) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "cluster")
    for served in SERVED:
        run_of("cluster", *served)


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, hidden_size, dtype = draw(st.sampled_from(WEIGHTS))
    num_tokens = draw(st.one_of(st.integers(0, 17), st.integers(0, 140)))
    wrong = draw(st.sampled_from([0] * 9 + [1]))
    devices = draw(st.sampled_from([("cuda", "cuda")] * 9 + [("cuda", "cpu"), ("cpu", "cuda")]))
    plain = draw(st.booleans())  # or the kernel would hardly ever serve
    hidden_states = draw(matrices(num_tokens, hidden_size, devices[0], plain))
    weight = draw(matrices(num_experts, hidden_size + wrong, devices[1], plain))
    if dtype == FP32:
        wide = torch.empty_strided(weight.shape, weight.stride(), dtype=FP32, device=weight.device)
        # As bf16 holds it two of its terms would be zero.
        weight = wide.copy_(weight.detach().float() * (4 / 3))
    return hidden_states, weight


def test_random_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Counter[torch.dtype]()

    def counted(run: Run) -> Run:
        def call(*arguments: Any) -> torch.Tensor:
            served[arguments[1].dtype] += 1
            return run(*arguments)

        return call

    for key, run in backends._loaded.items():
        if key[0] == "cluster" and not isinstance(run, str):
            monkeypatch.setitem(backends._loaded, key, counted(run))

    @settings(max_examples=CASES)
    @given(pair=operands())
    def each_is_right_or_names_the_argument(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        hidden_states, weight = pair
        fits = hidden_states.shape[1] == weight.shape[1] and fit_together(
            hidden_states.dtype, weight.dtype
        )
        with torch.no_grad():
            if not fits or hidden_states.device != weight.device:
                with pytest.raises(ValueError, match=r"^weight (is|has)"):
                    ops._compute(BACKENDS["cluster"], hidden_states, weight)
                return
            logits = ops.cluster_router_gemm(hidden_states, weight)
        assert logits.dtype == torch.float32
        assert logits.shape == (len(hidden_states), len(weight))
        assert same_as_fp64(logits, hidden_states, weight)

    each_is_right_or_names_the_argument()
    assert served[BF16] > CASES // 10
    assert served[FP32] > CASES // 50


@pytest.mark.parametrize(("num_experts", "hidden_size", "dtype"), REPLAYED)
def test_graphs_of_every_m_replayed_in_random_order(
    num_experts: int, hidden_size: int, dtype: torch.dtype
) -> None:
    hidden_states, weight = random_inputs(MAX_TOKENS, "cuda", num_experts, hidden_size, dtype)
    ops.cluster_router_gemm(hidden_states, weight)
    graphs, logits = {}, {}
    pool = torch.cuda.graph_pool_handle()
    for num_tokens in range(MAX_TOKENS, 0, -1):
        graphs[num_tokens] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[num_tokens], pool=pool):
            logits[num_tokens] = ops.cluster_router_gemm(hidden_states[:num_tokens], weight)
    expected = torch.empty(MAX_TOKENS, num_experts, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    pick = random.Random(0)
    bytes_taken = 0
    for replay in range(REPLAYS):
        if replay % 100 == 0:
            hidden_states.normal_()
            expected.copy_(ops.cluster_router_gemm(hidden_states, weight))
        num_tokens = pick.randint(1, MAX_TOKENS)
        logits[num_tokens].fill_(torch.nan)
        graphs[num_tokens].replay()
        wrong += (logits[num_tokens] != expected[:num_tokens]).sum()
        if replay == REPLAYS // 20:  # PyTorch has by now what it wants for itself
            bytes_taken = torch.cuda.memory_reserved()  # of this process: others share the GPU
    torch.cuda.synchronize()
    assert int(wrong) == 0
    assert torch.cuda.memory_reserved() <= bytes_taken
