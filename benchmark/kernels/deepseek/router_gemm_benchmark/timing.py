"""Microseconds of a router GEMM, from replays of CUDA graphs of `LINKS` calls each.

One sample is one replay between two events. All graphs of a mode are replayed in turn,
round after round, so that a drifting clock hits every provider alike, and in another order
each round, so that none always runs in the wake of the same other. Ahead of each sample L2 is
emptied of weights: it may hold those of 58 small gates, and where they are more, it does not drop
the oldest first, and how many an earlier replay leaves to the next depends on the cache hints of
its loads. Then a kernel that only waits, so that the host has enqueued the whole graph before the
first event fires and no launch gap is measured.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import torch

from sglang.srt.layers.moe_router.kernel import Form
from sglang.srt.layers.moe_router.packages import first_line
from sglang_router_gemm.routing import relative_error

from .accuracy import bound, reference
from .providers import BF16, PLAIN, Gemm, Provider, Skip, all_providers, environment

# `num_hidden_layers` and `first_k_dense_replace` in DeepSeek-V3's config.json.
DEEPSEEK_V3_LAYERS, DEEPSEEK_V3_DENSE_LAYERS = 61, 3
# Its MoE layers: the weights of a decode step, 213 MB, more than any L2.
LINKS = DEEPSEEK_V3_LAYERS - DEEPSEEK_V3_DENSE_LAYERS
DO_BENCH = "do_bench"
_BARRIER_TIMEOUT_S = 300


class Mode(NamedTuple):
    """What the `LINKS` calls of one graph have before them, and how they are launched."""

    name: str
    pdl: bool
    produced: bool = False
    """The kernel that SGLang runs before the gate goes ahead of each call."""
    one_weight: bool = False


CHAIN = Mode("chain", pdl=True, produced=True)
MODES = (
    CHAIN,
    Mode("cold", pdl=True),
    Mode("cold, no PDL", pdl=False),
    Mode("warm", pdl=False, one_weight=True),
)
MODE_NAMES = (*(mode.name for mode in MODES), DO_BENCH)


@dataclass
class Timing:
    """Microseconds of one call: quartiles over the rounds, and what they mean.

    `bytes` is what the call must move, read and written once; `floor_us` the time that
    takes at the copy bandwidth of the same run.
    """

    provider: str
    mode: str
    num_tokens: int
    tp_size: int
    q25_us: float
    median_us: float
    q75_us: float
    bytes: int
    gb_s: float
    floor_us: float
    times_floor: float


@dataclass
class Failure:
    """A provider that raised, or was wrong, while it was captured or timed."""

    provider: str
    mode: str
    num_tokens: int
    reason: str


class Candidate(NamedTuple):
    """A provider that is there, and its call."""

    provider: Provider
    gemm: Gemm


def bytes_moved(provider: Provider, num_tokens: int, num_experts: int, hidden_size: int) -> int:
    """Bytes of weight, bf16 tokens and bias, read once, and of the logits, written once."""
    inputs = hidden_size * (num_experts * provider.dtype.itemsize + num_tokens * BF16.itemsize)
    if provider.bias is not None:
        inputs += provider.bias.nbytes
    return inputs + num_tokens * num_experts * provider.output.itemsize


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile, linear between samples."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return low, middle, high


def replay_orders(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """In which order the graphs of each round are replayed: all of them, shuffled anew."""
    shuffle = random.Random(seed)
    return [shuffle.sample(names, len(names)) for _ in range(rounds)]


def per_link(samples: Sequence[float], producer: Sequence[float] | None) -> list[float]:
    """µs of one call: the graph's, less the producer's median where there is one, / LINKS."""
    producer_median = quartiles(producer)[1] if producer else 0.0
    return [(sample - producer_median) / LINKS for sample in samples]


def make_timing(
    provider: Provider,
    mode: str,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
    us: tuple[float, float, float],
    bandwidth: float,
) -> Timing:
    """Adds bytes, GB/s and the floor to quartiles in µs; `bandwidth` is in GB/s."""
    moved = bytes_moved(provider, num_tokens, num_experts, hidden_size)
    floor = moved / bandwidth / 1e3
    return Timing(
        provider.name, mode, num_tokens, 1, *us, moved, moved / us[1] / 1e3, floor, us[1] / floor
    )


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read plus written, of a 1 GiB copy on the device (median of 20)."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    events = [(_event(), _event()) for _ in range(20)]
    for start, end in events:
        start.record()
        target.copy_(source)
        end.record()
    torch.cuda.synchronize(device)
    milliseconds = [start.elapsed_time(end) for start, end in events]
    return 2 * source.numel() / quartiles(milliseconds)[1] / 1e6


@functools.cache
def load_producer(hidden_size: int) -> tuple[Callable[..., None] | None, str]:
    """FlashInfer's `fused_add_rmsnorm` and how it is implemented here, or None and why not.

    FlashInfer compiles it with the CuTe DSL where that is installed. Where that fails,
    the CUDA implementation of the same function is taken, through FlashInfer's switch.
    """
    reasons = []
    for switch in ({}, {"FLASHINFER_USE_CUDA_NORM": "1"}):
        try:
            with environment(**switch):
                norm = importlib.import_module("flashinfer.norm")
                if switch:
                    norm = importlib.reload(norm)
                producer = _tried(norm.fused_add_rmsnorm, hidden_size)
            language = "CUDA" if getattr(norm, "_USE_CUDA_NORM", True) else "CuTe DSL"
            return producer, f"flashinfer.norm.fused_add_rmsnorm in {language}"
        except Exception as error:  # a broken install raises anything
            reasons.append(first_line(error))
    return None, f"fused_add_rmsnorm cannot be built: {'; in CUDA: '.join(reasons)}"


def _tried(norm: Callable[..., None], hidden_size: int) -> Callable[..., None]:
    """`norm`, once it has run eagerly and in a graph.

    Raises:
        RuntimeError: it did not norm, or whatever building and launching it raises.
    """
    rows = torch.randn(1, hidden_size, dtype=torch.bfloat16, device="cuda")
    ones, residual = torch.ones_like(rows[0]), torch.zeros_like(rows)
    norm(rows, residual, ones, 1e-6, enable_pdl=True)
    graph = _capture(lambda: norm(rows, residual, ones, 1e-6, enable_pdl=True))
    rows.normal_().mul_(8)
    graph.replay()
    torch.cuda.synchronize()
    mean_square = float(rows.double().square().mean())
    if not abs(mean_square - 1) < 0.05:
        raise RuntimeError(f"mean square of a normed row is {mean_square:.2f}, must be 1")
    return norm


class Bench:
    """Weights, and everything that lives as long as one run on one GPU."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        rounds: int,
        device: torch.device,
        dtype: torch.dtype = BF16,
    ) -> None:
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.rounds, self.device = rounds, device
        shape = (LINKS, num_experts, hidden_size)
        self.weights = torch.randn(shape, dtype=dtype, device=device)
        self.weights *= hidden_size**-0.5
        # As in the model, each layer norms with a weight of its own. A GEMM that reads
        # its tokens before the producer has written them then reads other numbers. Near
        # 1, so that the residual, which replay after replay adds to, stays random.
        norms = (LINKS, hidden_size)
        self.norm_weights = torch.randn(norms, dtype=torch.bfloat16, device=device) / 10 + 1
        self.producer, self.producer_note = load_producer(hidden_size)
        self.cycles_per_us = _cycles_per_us()
        self.bandwidth = copy_bandwidth(device)
        self._other_memory = torch.zeros(4 * l2_bytes(device), dtype=torch.uint8, device=device)

    def empty_l2(self) -> None:
        """Reads four times what L2 holds, so that nothing that was read before is left in it."""
        self._other_memory.view(torch.int64).amax()

    def measure(
        self,
        candidates: Sequence[Candidate],
        num_tokens: int,
        mode: Mode,
        start_together: Callable[[], object] = lambda: None,
    ) -> tuple[list[Timing], list[Failure]]:
        """Times all `candidates` in one mode at one number of tokens."""
        run = _ModeRun(self, num_tokens, mode)
        failures: list[Failure] = []
        ready: list[Candidate] = []
        for candidate in candidates:
            try:
                run.add(candidate)
                ready.append(candidate)
            except Exception as error:  # this provider is out, the run goes on
                name = candidate.provider.name
                failures.append(Failure(name, mode.name, num_tokens, first_line(error)))
        start_together()
        samples = run.replay(self.rounds, self.cycles_per_us)
        producer = samples.pop("", None)
        timings = [
            make_timing(
                provider,
                mode.name,
                num_tokens,
                self.num_experts,
                self.hidden_size,
                quartiles(per_link(samples[provider.name], producer)),
                self.bandwidth,
            )
            for provider, _ in ready
        ]
        return timings, failures

    def do_bench(self, candidate: Candidate, num_tokens: int) -> Timing:
        """`triton.testing.do_bench`: one eager call, L2 flushed before it, PDL on."""
        from triton.testing import do_bench

        provider, gemm = candidate
        hidden_states = self.random_tokens(num_tokens)
        out = self.empty_logits(provider, num_tokens)
        milliseconds = do_bench(
            lambda: gemm(hidden_states, self.weights[0], out, True),
            warmup=5,
            rep=20,
            quantiles=[0.25, 0.5, 0.75],
        )
        low, middle, high = (1e3 * each for each in milliseconds)
        return make_timing(
            provider,
            DO_BENCH,
            num_tokens,
            self.num_experts,
            self.hidden_size,
            (low, middle, high),
            self.bandwidth,
        )

    def random_tokens(self, num_tokens: int) -> torch.Tensor:
        shape = (num_tokens, self.hidden_size)
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)

    def empty_logits(self, provider: Provider, num_tokens: int) -> torch.Tensor:
        shape = (num_tokens, self.num_experts)
        return torch.empty(shape, dtype=provider.output, device=self.device)


class _ModeRun:
    """The graphs of one mode at one number of tokens; "" is the producer alone."""

    def __init__(self, bench: Bench, num_tokens: int, mode: Mode) -> None:
        self.bench, self.num_tokens, self.mode = bench, num_tokens, mode
        self.hidden_states = bench.random_tokens(num_tokens)
        self.residual = bench.random_tokens(num_tokens)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        # A graph writes to these whenever it is replayed.
        self.outputs: list[torch.Tensor] = []
        self.host_us = 0.0
        self.weights = [bench.weights[0 if mode.one_weight else link] for link in range(LINKS)]
        if mode.produced:
            for link in range(2):
                self._produce(link)
            self._keep("", _capture(self._produce_all))

    def add(self, candidate: Candidate) -> None:
        """Captures the calls, and believes the graph once a replay of it was right."""
        provider, gemm = candidate
        outs = [self.bench.empty_logits(provider, self.num_tokens) for _ in range(LINKS)]
        # Kernels that load at their first launch must not do so in the capture.
        for pdl in (True, False):
            gemm(self.hidden_states, self.weights[0], outs[0], pdl)
        torch.cuda.synchronize()
        logits: list[torch.Tensor] = []

        def calls() -> None:
            for link, (weight, out) in enumerate(zip(self.weights, outs, strict=True)):
                if self.mode.produced:
                    self._produce(link)
                logits.append(gemm(self.hidden_states, weight, out, self.mode.pdl))

        graph = _capture(calls)
        self.outputs += outs + logits
        self._check(graph, logits, provider)
        self._keep(provider.name, graph)

    def replay(self, rounds: int, cycles_per_us: float) -> dict[str, list[float]]:
        """µs of each replay, by graph."""
        # Twice what the host needs to enqueue a graph, and at least 50 µs.
        cycles = int(cycles_per_us * (50 + 2 * self.host_us))
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
        events = {name: [(_event(), _event()) for _ in range(rounds)] for name in self.graphs}
        for each, order in enumerate(replay_orders(list(self.graphs), rounds, self.num_tokens)):
            for name in order:
                start, end = events[name][each]
                if not self.mode.one_weight:
                    self.bench.empty_l2()
                torch.cuda._sleep(cycles)
                start.record()
                self.graphs[name].replay()
                end.record()
        torch.cuda.synchronize()
        return {
            name: [1e3 * start.elapsed_time(end) for start, end in pairs]
            for name, pairs in events.items()
        }

    def _produce_all(self) -> None:
        for link in range(LINKS):
            self._produce(link)

    def _produce(self, link: int) -> None:
        assert self.bench.producer is not None
        self.bench.producer(
            self.hidden_states,
            self.residual,
            self.bench.norm_weights[link],
            1e-6,
            enable_pdl=True,
        )

    def _keep(self, name: str, graph: torch.cuda.CUDAGraph) -> None:
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            graph.replay()
            host_us = 1e6 * (time.perf_counter() - started)
        torch.cuda.synchronize()
        self.host_us = max(self.host_us, host_us)
        self.graphs[name] = graph

    def _check(
        self, graph: torch.cuda.CUDAGraph, logits: list[torch.Tensor], provider: Provider
    ) -> None:
        """Fresh tokens, outputs poisoned, one replay: every link against fp64.

        With a producer only the last link's tokens are still there to compare with.
        """
        self.hidden_states.normal_()
        self.residual.normal_()
        for each in logits:
            each.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for link in (LINKS - 1,) if self.mode.produced else range(LINKS):
            expected = reference(self.hidden_states, self.weights[link], provider.bias)
            error = relative_error(logits[link], expected)
            if not error <= bound(provider):
                raise RuntimeError(f"off by {error:.1e} in the graph's call {link + 1} of {LINKS}")


def _capture(calls: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except BaseException:
        # A capture that breaks leaves its own stream as the current one.
        torch.cuda.set_stream(stream)
        raise
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _cycles_per_us() -> float:
    cycles = 2_000_000
    torch.cuda._sleep(cycles)
    start, end = _event(), _event()
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (1e3 * start.elapsed_time(end))


_ranks_barrier: Barrier | None = None


def _join(barrier: Barrier) -> None:
    global _ranks_barrier
    _ranks_barrier = barrier


class Work(NamedTuple):
    """What every rank measures."""

    names: Mapping[int, Sequence[str]]
    """By number of tokens, the providers to time: those that were right."""
    num_experts: int
    hidden_size: int
    rounds: int
    form: Form = PLAIN
    modes: Sequence[str] = MODE_NAMES


def _measure_rank(rank: int, work: Work) -> list[Timing]:
    assert _ranks_barrier is not None
    try:
        return _time_rank(_ranks_barrier, rank, work)
    except Exception:
        _ranks_barrier.abort()  # the other ranks would wait for this one
        raise


def _time_rank(barrier: Barrier, rank: int, work: Work) -> list[Timing]:
    """One rank's timings. It comes to every barrier, whichever providers fail on it."""
    start_together = functools.partial(barrier.wait, _BARRIER_TIMEOUT_S)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    with torch.no_grad():
        wanted = set().union(*work.names.values())
        candidates = []
        for provider in all_providers(work.num_experts, work.hidden_size, device, work.form):
            if provider.name in wanted:
                try:
                    candidates.append(Candidate(provider, provider.build()))
                except Skip:
                    continue
        bench = Bench(work.num_experts, work.hidden_size, work.rounds, device, work.form.dtype)
        found = []
        for num_tokens, here in work.names.items():
            ready = [each for each in candidates if each.provider.name in here]
            for mode in MODES:
                if mode.name in work.modes and (not mode.produced or bench.producer is not None):
                    timings, _ = bench.measure(ready, num_tokens, mode, start_together)
                    found += timings
    return found


def measure_ranks(tp_size: int, work: Work) -> list[Timing]:
    """Times on `tp_size` GPUs at once and reports the slowest rank of each measurement."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(tp_size)
    with ProcessPoolExecutor(
        tp_size, mp_context=context, initializer=_join, initargs=(barrier,)
    ) as pool:
        ranks = [pool.submit(_measure_rank, rank, work) for rank in range(tp_size)]
        return slowest([rank.result() for rank in ranks])


def slowest(ranks: Sequence[Sequence[Timing]]) -> list[Timing]:
    """The slowest rank's timing of each measurement that all ranks have."""
    by_measurement: dict[tuple[str, str, int], list[Timing]] = {}
    for timing in (timing for rank in ranks for timing in rank):
        key = (timing.provider, timing.mode, timing.num_tokens)
        by_measurement.setdefault(key, []).append(timing)
    found = []
    for timings in by_measurement.values():
        if len(timings) == len(ranks):
            worst = max(timings, key=lambda timing: timing.median_us)
            found.append(replace(worst, tp_size=len(ranks)))
    return found
