"""The cluster router GEMM against fp64, and MoEGate, which calls it."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from sglang.kernels.ops.gemm.cluster_router_gemm import (
    NUM_TOKENS,
    cluster_router_gemm,
)
from sglang.srt.environ import envs
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=180, stage="base-b-kernel-unit", runner_config="1-gpu-large")

SHAPES = sorted(NUM_TOKENS)
# Both edges of each of the three kernels: up to 8 tokens, up to 16, up to 128.
EDGES = (0, 1, 7, 8, 9, 16, 17, 32, 33, 127, 128)

Operands = tuple[torch.Tensor, torch.Tensor]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="SM90 required",
)


def operands(
    num_tokens: int, num_experts: int = 256, hidden_size: int = 7168, seed: int = 0
) -> Operands:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight, hidden_states = (
        torch.randn(rows, hidden_size, device="cuda", generator=generator).bfloat16()
        for rows in (num_experts, num_tokens)
    )
    return hidden_states, weight


def assert_like_fp64(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> None:
    """What fp32 sums of exact products of bf16 may be off, by the operands' norms."""
    assert logits.dtype == torch.float32
    expected = hidden_states.double() @ weight.double().t()
    by_token = hidden_states.double().norm(dim=1, keepdim=True)
    size = by_token * weight.double().norm(dim=1)
    assert ((logits.double() - expected).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("num_experts,hidden_size", SHAPES)
def test_like_fp64_and_batch_invariant(num_experts: int, hidden_size: int) -> None:
    hidden_states, weight = operands(128, num_experts, hidden_size)
    # Rows of other sizes, so that a sum of the wrong row shows.
    hidden_states *= torch.arange(1, 129, device="cuda").unsqueeze(1) / 16
    whole = cluster_router_gemm(hidden_states, weight)
    assert_like_fp64(whole, hidden_states, weight)
    for num_tokens in EDGES:
        logits = cluster_router_gemm(hidden_states[:num_tokens], weight)
        assert torch.equal(logits, whole[:num_tokens]), num_tokens


@pytest.mark.parametrize("num_experts,hidden_size", [(16, 64), (48, 192), (288, 1088)])
def test_shapes_with_few_or_uneven_chunks(num_experts: int, hidden_size: int) -> None:
    for num_tokens in EDGES:
        given = operands(num_tokens, num_experts, hidden_size)
        assert_like_fp64(cluster_router_gemm(*given), *given)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(special: float) -> None:
    hidden_states, weight = operands(16)
    clean = cluster_router_gemm(hidden_states, weight)
    hidden_states[5, 4000] = special
    logits = cluster_router_gemm(hidden_states, weight)
    assert not logits[5].isfinite().any()
    others = [row for row in range(16) if row != 5]
    assert torch.equal(logits[others], clean[others])


@pytest.mark.parametrize(
    "spoil,said",
    [
        (lambda x, w: (x.float(), w), "Dtype value"),
        (lambda x, w: (x, w.float()), "Dtype value"),
        (lambda x, w: (x[:, :-64], w), "Size mismatch"),
        (lambda x, w: (x.t().contiguous().t(), w), "not contiguous"),
        (lambda x, w: (x, w.t().contiguous().t()), "not contiguous"),
        (lambda x, w: (x.cpu(), w), "Device mismatch"),
        (lambda x, w: (x.repeat(65, 1), w), "num_tokens is 130, must be at most 128"),
    ],
)
def test_what_it_does_not_take(spoil: Callable[..., Operands], said: str) -> None:
    hidden_states, weight = spoil(*operands(2))
    with pytest.raises(RuntimeError, match=said):
        cluster_router_gemm(hidden_states, weight)
    right = operands(2)  # and the next call is none the worse
    assert_like_fp64(cluster_router_gemm(*right), *right)


@triton.jit
def copy_after_trigger(source: tl.tensor, to: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Lets the next kernel start, with room for clusters, and writes 5 us later."""
    tl.extra.cuda.gdc_launch_dependents()
    start = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - start < 5000:
        pass
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at))


def test_in_a_cuda_graph_behind_the_kernel_that_writes_its_operand() -> None:
    """Each link waits for the one before it, which PDL lets it overtake."""
    sources = [operands(16, seed=seed)[0] for seed in range(8)]
    weight = operands(0)[1]
    expected = [cluster_router_gemm(each, weight) for each in sources]
    hidden_states = torch.empty_like(sources[0])
    logits: list[torch.Tensor] = []

    def links() -> None:
        logits.clear()
        for each in sources:
            copy_after_trigger[(each.numel() // 8192,)](each, hidden_states, BLOCK=8192)
            logits.append(cluster_router_gemm(hidden_states, weight))

    links()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        links()
    for _ in range(100):
        for each in logits:
            each.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, logits, expected))


@torch.no_grad()
def test_under_torch_compile() -> None:
    weight = operands(0)[1]

    def doubled(hidden_states: torch.Tensor) -> torch.Tensor:
        return cluster_router_gemm(hidden_states, weight) * 2

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    for num_tokens in (4, 16, 100):
        hidden_states = operands(num_tokens)[0]
        assert torch.equal(compiled(hidden_states), doubled(hidden_states))


class TestMoEGate:
    """Which of its kernels the gate takes."""

    @staticmethod
    def gate(
        num_experts: int = 256, hidden_size: int = 7168, **config: bool
    ) -> torch.nn.Module:
        from sglang.srt.models.deepseek_v2 import MoEGate

        with set_default_torch_dtype(torch.bfloat16), torch.device("cuda"):
            gate = MoEGate(
                SimpleNamespace(
                    n_routed_experts=num_experts,
                    hidden_size=hidden_size,
                    topk_method="greedy",
                    **config,
                ),
                quant_config=None,
            )
        dtype = gate.weight.dtype
        gate.weight.data.copy_(operands(0, num_experts, hidden_size)[1].to(dtype))
        return gate

    @staticmethod
    @torch.no_grad()
    def takes_it(
        gate: torch.nn.Module, hidden_states: torch.Tensor, deterministic: bool = False
    ) -> bool:
        from sglang.srt.models import deepseek_v2

        execution = SimpleNamespace(
            deterministic=SimpleNamespace(enable_deterministic_inference=deterministic)
        )
        with (
            patch.object(deepseek_v2, "get_exec", lambda: execution),
            patch.object(
                deepseek_v2, "cluster_router_gemm", wraps=cluster_router_gemm
            ) as called,
        ):
            logits = gate(hidden_states)
        if taken := called.call_count == 1:  # what ran without it may round more
            assert_like_fp64(logits, hidden_states, gate.weight)
        return taken

    @pytest.mark.parametrize("num_experts,hidden_size", SHAPES)
    def test_it_takes_its_shapes(self, num_experts: int, hidden_size: int) -> None:
        gate = self.gate(num_experts, hidden_size)
        fewest, most = NUM_TOKENS[num_experts, hidden_size]
        for num_tokens in (1, fewest - 1, fewest, most, most + 1, 200):
            hidden_states = operands(num_tokens, num_experts, hidden_size)[0]
            taken = self.takes_it(gate, hidden_states)
            assert taken == (fewest <= num_tokens <= most), num_tokens

    def test_it_leaves_the_rest_alone(self) -> None:
        hidden_states = operands(8)[0]
        assert self.takes_it(self.gate(), hidden_states)
        assert not self.takes_it(self.gate(), hidden_states, deterministic=True)
        assert not self.takes_it(self.gate(router_fp32=True), hidden_states)
        wide = operands(8, hidden_size=2 * 7168)[0]
        assert not self.takes_it(self.gate(), wide[:, :7168])
        assert not self.takes_it(self.gate(64, 2048), operands(8, 64, 2048)[0])
        with envs.SGLANG_OPT_BF16_FP32_GEMM_ALGO.override("deep_gemm"):
            gate = self.gate()
        assert self.takes_it(gate, hidden_states)
        assert not self.takes_it(gate, operands(17)[0])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
