"""Programmatic dependent launch on a real GPU, with neighbours that write late and read early."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import SM, TARGETS, each_target, random_bias, run_of

from sglang.srt.layers.moe_router import cluster_router_gemm as cluster
from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.kernel import Run, Target

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("publish_server_args")]

CSRC = Path(__file__).parent / "csrc"
LAYERS = 58
REPLAYS = 10_000
# Long enough for a gate that does not wait to have read everything, at any clock of an H100;
# LongCat-Flash's, the tokens of its first CTAs.
PRODUCER_CYCLES = 3000


def _chain_module() -> Any:
    return jit.load(jit.Spec("pdl_chain", CSRC / "pdl_chain.cu", SM, ()))


class Chain:
    """`LAYERS` times producer, gate and consumer, on one stream and under PDL."""

    def __init__(self, target: Target, num_tokens: int) -> None:
        self.module = _chain_module()
        rows, (num_experts, hidden_size) = (LAYERS, num_tokens), target.gate[:2]
        self.sources = torch.randn(*rows, hidden_size, dtype=torch.bfloat16, device="cuda")
        self.biases = [random_bias(target) for _ in range(LAYERS)]
        self.hidden_states = torch.empty_like(self.sources[0])
        self.kept = torch.empty(*rows, num_experts, dtype=target.logits_dtype, device="cuda")
        self.logits = torch.full_like(self.kept[0], torch.nan)

    def without_pdl(self, run: Run, weights: torch.Tensor) -> torch.Tensor:
        """Each gate by itself."""
        out = torch.empty_like(self.logits)
        each = zip(self.sources, weights, self.biases, strict=True)
        return torch.stack(
            [run(source, weight, out, False, bias).clone() for source, weight, bias in each]
        )

    def with_pdl(self, run: Run, weights: torch.Tensor) -> None:
        each = zip(self.sources, weights, self.biases, self.kept, strict=True)
        for source, weight, bias, kept in each:
            self.module.produce(source, self.hidden_states, PRODUCER_CYCLES, True)
            logits = run(self.hidden_states, weight, self.logits, True, bias)
            self.module.consume(logits, kept, self.hidden_states, True)


def _mismatches(
    target: Target, run: Run, num_tokens: int, replays: int, chains: int = 1, updates: int = 0
) -> int:
    """Logits that differ from those without PDL.

    Args:
        chains: so many run at once, each on a stream of its own.
        updates: the weights are overwritten so many times, between replays.
    """
    shape = (2, LAYERS, target.num_experts, target.hidden_size)
    generations = torch.randn(shape, dtype=target.dtype, device="cuda")
    weights = generations[0].clone()
    each = [Chain(target, num_tokens) for _ in range(chains)]
    expected = [torch.stack([c.without_pdl(run, g) for g in generations]) for c in each]
    current = [generation[0].clone() for generation in expected]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    streams = [torch.cuda.Stream() for _ in each]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for chain, stream in zip(each, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                chain.with_pdl(run, weights)
        for chain, stream, logits in zip(each, streams, current, strict=True):
            torch.cuda.current_stream().wait_stream(stream)
            wrong += (chain.kept != logits).sum()
    for replay in range(replays):
        if updates and replay % (replays // updates) == 0:
            generation = replay // (replays // updates) % 2
            weights.copy_(generations[generation])
            for logits, all_logits in zip(current, expected, strict=True):
                logits.copy_(all_logits[generation])
        graph.replay()
    return int(wrong)


# Every kernel of the first form. Those of the others for fewer tokens are in the tests below.
@pytest.mark.parametrize(
    ("target", "num_tokens"),
    [(TARGETS[0], 1), (TARGETS[0], 16), *((target, 64) for target in TARGETS)],
    ids=str,
)
def test_cluster(target: Target, num_tokens: int) -> None:
    assert _mismatches(target, run_of("cluster", *target.gate), num_tokens, REPLAYS) == 0


@pytest.mark.parametrize("backend", ["flashinfer", "sgl_kernel"])
def test_the_other_backends(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_ENABLE_PDL", "1")  # which sgl-kernel reads
    assert _mismatches(TARGETS[0], run_of(backend, *TARGETS[0].gate), 16, REPLAYS) == 0


@each_target
def test_weights_that_are_overwritten_between_replays(target: Target) -> None:
    run = run_of("cluster", *target.gate)
    assert _mismatches(target, run, 8, REPLAYS, updates=REPLAYS // 4) == 0


@each_target
def test_two_gates_at_once_on_two_streams(target: Target) -> None:
    assert _mismatches(target, run_of("cluster", *target.gate), 16, REPLAYS, chains=2) == 0


@each_target
def test_these_tests_can_fail(target: Target, tmp_path: Path) -> None:
    """The same kernel without its wait reads tokens before they are written."""
    for file in cluster.SOURCE.parent.iterdir():
        shutil.copy(file, tmp_path)
    broken = tmp_path / "cluster_router_gemm.cuh"
    wait = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
    assert wait in broken.read_text()
    broken.write_text(broken.read_text().replace(wait, ""))
    spec = cluster.spec_of(target)
    module = jit.load(spec._replace(source=tmp_path / cluster.SOURCE.name))
    module.prepare(0)

    def run(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        module.run(hidden_states, weight, logits, pdl, bias)
        return logits

    assert _mismatches(target, run, 16, replays=20) > 0
