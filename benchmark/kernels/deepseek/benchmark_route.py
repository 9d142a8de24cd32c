"""What stands between the gate's GEMM and the first expert GEMM, and how long it takes.

    python3 benchmark_route.py --num-tokens 1 8 64 --save-path results
    python3 benchmark_route.py --model Kimi-K2 --save-path results
    python3 benchmark_route.py --from-json results/route_h200.json

The `chain` of the router-GEMM benchmark: the norm ahead of the gate, the `cluster` GEMM, then the
model's routing, in one CUDA graph of 58 links, the MoE layers of DeepSeek-V3, each with a weight
and a bias of its own. What is printed and saved is a link less one without routing. Before that
everybody is held against SGLang's own: ids, weights and plan of ours bit for bit. What is wrong is
not timed.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_deepgemm_dsv3_router_gemm_blackwell import MAX_NUM_TOKENS, _integer_in, _Parser
from router_gemm_benchmark import how_to_call

if TYPE_CHECKING:
    import torch
    from router_gemm_benchmark.providers import Gemm
    from router_gemm_benchmark.timing import Bench, Candidate, Failure

    from sglang.srt.layers.moe_router.models import Model

NUM_TOKENS, ROUNDS, WIDTH = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128), 30, 100
MODEL, BLOCK_SIZE = "DeepSeek-V3", 16
# What the table of models does not have: `routed_scaling_factor` in config.json, and how many
# shared experts are fused here, each a column behind the others.
SCALE_FUSED = {
    MODEL: (2.5, 1),
    "Kimi-K2": (2.827, 0),
    "GLM-5": (2.5, 1),
    "GLM-4.5": (2.5, 1),
    "GLM-4.5-Air": (1.0, 1),
    "MiniMax-M2": (1.0, 0),
}
WITHOUT_GROUPED_TOPK = {"MiniMax-M2"}  # its class asks for SGLang's other top-k

GATE, VLLM = "gate", "vLLM grouped_topk"
FLASHINFER, TRITON = "FlashInfer fused_topk_deepseek", "SGLang Triton moe_fused_gate"
SGLANG, SGLANG_ALIGN = "SGLang", "SGLang + align"
OURS, OURS_ALIGN = "ours: route", "ours: route + align"
NAMES = (FLASHINFER, TRITON, VLLM, SGLANG, SGLANG_ALIGN, OURS, OURS_ALIGN)
LEGEND = (
    "gate: the GEMM alone; the others: what they add. SGLang and + align: with the fused shared "
    f"expert of {', '.join(name for name, (_, fused) in SCALE_FUSED.items() if fused)}."
)
LEAST_AGREEMENT = 0.95


@dataclass
class Microseconds:
    """Of one link, quartiles over the rounds: the gate's, and of all others less its median."""

    provider: str
    num_tokens: int
    q25_us: float
    median_us: float
    q75_us: float


@dataclass
class Report:
    """What a run leaves, as it is in the JSON file; a failure in mode `check` was not timed."""

    gpu: str
    driver: str | None
    versions: dict[str, str | None]
    date: str
    command: str
    num_tokens: list[int]
    rounds: int
    links: int
    model: str = MODEL  # older files have none
    producer: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    us: list[Microseconds] = field(default_factory=list)


Route = Callable[["torch.Tensor", "torch.Tensor", int, bool], Sequence[Any]]
"""`route(hidden_states, logits, link, pdl)`: weights and ids, and of ours the plan or None."""
Call = tuple[int, "torch.Tensor", "torch.Tensor", Sequence[Any]]
"""A link, its hidden_states, bf16 `[M, K]`, and logits, fp32 `[M, N]`, and what `Route` gave."""


def find_row(model: str) -> Model:
    """The model in the table."""
    from sglang.srt.layers.moe_router.models import MODELS

    return next(each for each in MODELS if each.name == model)


class Layers:
    """SGLang's own functions, and a bias and configs for each of `weights`, `[LINKS, N, K]`."""

    def __init__(self, weights: torch.Tensor, model: str) -> None:
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
        from sglang_router_gemm.hooks import ALIGN, TOPK

        route = find_row(model).route
        assert route is not None
        num_groups, top_groups, self.top_k = route[:3]
        scale, fused = SCALE_FUSED[model]
        self.same: dict[str, Any] = {"num_expert_group": num_groups, "topk_group": top_groups}
        self.same["routed_scaling_factor"] = scale
        self.grouped_topk = model not in WITHOUT_GROUPED_TOPK
        self.is_grouped = num_groups > 1
        # Of two experts that are as good these may choose the other: in one row of thousands, M = 1
        # has 58. With one group SGLang's own is its Triton router.
        self.round_otherwise = {TRITON, VLLM} if self.is_grouped else {VLLM}
        self.device = device = weights.device
        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device=device.type))
        self.topk: Any = importlib.import_module(TOPK)
        self.select = without_plugin(self.topk.select_experts)
        align = without_plugin(importlib.import_module(ALIGN).moe_align_block_size)
        num_experts = weights.shape[1] + fused
        self.align = functools.partial(align, block_size=BLOCK_SIZE, num_experts=num_experts)
        self.links = {weight.data_ptr(): link for link, weight in enumerate(weights)}
        self.biases = list(weights.new_empty(weights.shape[:2]).float().normal_(std=0.1))
        self.configs = [[self._config(each, bias) for bias in self.biases] for each in (0, fused)]

    def _config(self, num_shared: int, bias: torch.Tensor) -> Any:
        fields: dict[str, Any] = {"num_fused_shared_experts": num_shared}
        if not hasattr(self.topk.TopKConfig, "num_fused_shared_experts"):  # SGLang 0.5.23
            fields = {"shared_experts": self.topk.SharedExpertsConfig(**fields)}
        fields |= {"scoring_func": "sigmoid", "use_grouped_topk": self.grouped_topk}
        fields["correction_bias"] = bias
        return self.topk.TopKConfig(self.top_k + num_shared, **fields, **self.same)


def without_plugin(function: Any) -> Any:
    """SGLang's function, where the plugin has put a `functools.partial` in its place."""
    return vars(function)["__wrapped__"] if isinstance(function, functools.partial) else function


def make_route(name: str, layers: Layers) -> Route:
    """Imports or builds a provider; raises `Skip`, or whatever that raises."""
    from router_gemm_benchmark.providers import Skip, _kernel, environment

    from sglang.srt.layers.moe_router.route import make_route_plan

    biases, top_k, same = layers.biases, layers.top_k, layers.same
    if name == FLASHINFER:
        if not layers.is_grouped:
            raise Skip("with one group SGLang's own is its Triton router")
        if getattr(layers.topk, "fused_topk_deepseek", None) is None:
            raise Skip("SGLang has not found FlashInfer's fused_topk_deepseek")
        flashinfer = functools.partial(layers.topk.biased_grouped_topk_gpu, **same)
        return lambda h, logits, link, pdl: flashinfer(h, logits, biases[link], top_k, True)
    if name == TRITON:
        place = ("sglang.kernels.ops.moe.moe_fused_gate", "moe_fused_gate")
        triton = functools.partial(_kernel(layers.device, place), **same)
        return lambda h, logits, link, pdl: triton(logits, biases[link], top_k)
    if name == VLLM:
        module = "vllm.model_executor.layers.fused_moe.router.grouped_topk_router"
        kernel = _kernel(layers.device, (module, "fused_grouped_topk"))
        vllm = functools.partial(kernel, scoring_func="sigmoid", **same)
        return lambda h, logits, link, pdl: vllm(h, logits, top_k, True, biases[link])
    if name in (SGLANG, SGLANG_ALIGN):  # the latter is aligned by the caller
        return lambda h, logits, link, pdl: layers.select(h, logits, layers.configs[1][link])[:2]
    with environment(SGLANG_ROUTER_GEMM_BACKEND="cluster"):
        plan = make_route_plan(layers.configs[name == OURS_ALIGN][0], layers.select)
    if plan is None or plan.kernel is None or plan.variant is None:
        raise Skip(plan.reason if plan is not None else "there is no bias")
    ours, size = plan.kernel, BLOCK_SIZE if name == OURS_ALIGN else 0
    rest = plan.variant, plan.asked.scale_here, plan.asked.shared_weight(plan.variant)
    return lambda h, logits, link, pdl: ours(logits, biases[link], *rest, pdl, size)


def why_wrong(layers: Layers, calls: Sequence[Call], exact: bool) -> str | None:
    """What is not SGLang's own, as a phrase; None if all is, or, unless `exact`, nearly all ids."""
    from sglang_router_gemm.routing import agreement

    shares = []
    for link, h, logits, (weights, ids, *plan) in calls:
        own = layers.select(h, logits, layers.configs[ids.shape[1] - layers.top_k][link])
        shares.append(agreement(ids.sort().values, own.topk_ids.sort().values))
        wrong = why_plan_wrong(plan[0], layers.align(own.topk_ids)) if any(plan) else None
        if exact and not ids.equal(own.topk_ids):
            wrong = "other experts"
        elif exact and not weights.equal(own.topk_weights):  # of numbers above 0: all bits
            wrong = "other weights"
        if wrong is not None:
            return f"{wrong} than SGLang's in link {link + 1}"
    share = sum(shares) / len(shares)
    return None if share >= LEAST_AGREEMENT else f"SGLang's experts in {share:.0%} of the rows only"


def why_plan_wrong(plan: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> str | None:
    """Same blocks of same tokens? They are sorted in ours, and in any order in SGLang's own."""
    (tokens, experts, size), (own_tokens, own_experts, own_size) = plan, own
    blocks = int(own_size[0]) // BLOCK_SIZE
    if int(size[0]) != int(own_size[0]) or not experts[:blocks].equal(own_experts[:blocks]):
        return "other blocks in the plan"
    by_expert = experts[:blocks].long().repeat_interleave(BLOCK_SIZE) << 32
    ours, theirs = (by_expert + each[: len(by_expert)] for each in (tokens, own_tokens))
    return None if ours.equal(theirs.sort().values) else "other tokens or order in the plan"


def measure(report: Report, bench: Bench, gate: Gemm, save: Callable[[], None]) -> None:
    """Builds, compares and times everybody; `report` says what came of it."""
    from router_gemm_benchmark.providers import Provider, Skip
    from router_gemm_benchmark.timing import CHAIN, Candidate, Failure

    from sglang.srt.layers.moe_router.packages import first_line

    layers, routes = Layers(bench.weights, report.model), dict[str, Route]()
    last: dict[str, Call] = {}  # what was called last; of a graph, its memory stays its own

    def candidate(name: str) -> Candidate:
        def call(h: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool) -> Any:
            logits, link = gate(h, weight, out, pdl), layers.links[weight.data_ptr()]
            if name != GATE:
                last[name] = link, h, logits, routes[name](h, logits, link, pdl)
            if name == SGLANG_ALIGN:
                layers.align(last[name][3][1])
            return logits

        return Candidate(Provider(name, lambda: call), call)

    def check(name: str, num_tokens: int) -> str | None:
        """Calls all links in a row, as the graph does, and compares them afterwards."""
        (provider, call), calls = candidate(name), list[Call]()
        h = bench.random_tokens(num_tokens)
        try:
            for weight in bench.weights:
                call(h, weight, bench.empty_logits(provider, num_tokens), True)
                calls.append(last[name])
            return why_wrong(layers, calls, name not in layers.round_otherwise)
        except Exception as error:  # this provider is out, the run goes on
            return first_line(error)

    for name in NAMES:
        try:
            routes[name] = make_route(name, layers)
        except Exception as error:  # a broken install raises anything
            report.skipped[name] = str(error) if isinstance(error, Skip) else first_line(error)
    for m in report.num_tokens:
        reasons = {name: check(name, m) for name in routes}
        right = [name for name, reason in reasons.items() if reason is None]
        timings, failures = bench.measure([candidate(name) for name in (GATE, *right)], m, CHAIN)
        exact = {each.provider for each in timings} - {GATE, *layers.round_otherwise}
        wrong = {name: why_wrong(layers, [last[name]], exact=True) for name in exact}
        failures += [Failure(n, "check", m, reason) for n, reason in reasons.items() if reason]
        failures += [Failure(n, CHAIN.name, m, reason) for n, reason in wrong.items() if reason]
        report.failures += failures
        base = [each.median_us for each in timings if each.provider == GATE]
        for each in timings if base else ():
            if wrong.get(each.provider) is None:
                less = 0.0 if each.provider == GATE else base[0]
                us = (each.q25_us - less, each.median_us - less, each.q75_us - less)
                report.us.append(Microseconds(each.provider, m, *us))
        save()


def table(report: Report) -> str:
    """Medians by M, then who is not there and who failed, in `WIDTH` columns."""
    from tabulate import tabulate

    us = {(each.provider, each.num_tokens): f"{each.median_us:.2f}" for each in report.us}
    names = [name for name in (GATE, *NAMES) if any(name == provider for provider, _ in us)]
    rows = [[str(m), *(us.get((name, m), "") for name in names)] for m in report.num_tokens]
    headers = ["M", *(re.sub(r"(?<!\+) |(?<=topk)_|(?<=moe)_", "\n", name) for name in names)]
    remarks = [
        f"{report.gpu}, {report.model}, SGLang {report.versions.get('sglang')}, µs, "
        f"{report.rounds} rounds",
        LEGEND,
        *(f"{name} is skipped: {reason}" for name, reason in report.skipped.items()),
        *(f"{x.provider} FAILED, {x.mode}, M {x.num_tokens}: {x.reason}" for x in report.failures),
    ]
    lines = [textwrap.fill(each, WIDTH, subsequent_indent="  ") for each in remarks]
    return "\n".join((tabulate(rows, headers, disable_numparse=True), *lines))


def load(path: Path) -> Report:
    """What an earlier run wrote; raises OSError, or ValueError or TypeError if it is not that."""
    from router_gemm_benchmark.timing import Failure

    report: Any = Report(**json.loads(path.read_text()))
    report.us = [Microseconds(**each) for each in report.us]
    report.failures = [Failure(**each) for each in report.failures]
    return report


def run(
    model: str, num_tokens: Sequence[int], rounds: int, command: str, save_path: Path | None
) -> Report:
    """Times everybody on the current GPU, and saves after each M."""
    import torch
    from router_gemm_benchmark import report as reports
    from router_gemm_benchmark.providers import Skip, all_providers
    from router_gemm_benchmark.timing import LINKS, Bench

    device = torch.device("cuda", torch.cuda.current_device())
    where = torch.cuda.get_device_name(device), reports.driver_version(), reports.versions()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report(*where, date, command, sorted(set(num_tokens)), rounds, LINKS, model)
    row = find_row(model)
    shape, form = row.gate[:2], row.form

    def save() -> None:
        if save_path is not None:
            save_path.mkdir(parents=True, exist_ok=True)
            stem = reports.file_stem(report.gpu, *shape, form)
            text = json.dumps(asdict(report), indent=1, allow_nan=False)
            (save_path / f"route_{stem}.json").write_text(text + "\n")

    providers = all_providers(*shape, device, form)
    try:
        gate = next(each for each in providers if each.name == "ours: cluster").build()
        bench = Bench(*shape, rounds, device, form.dtype)
        report.producer = bench.producer_note
        if bench.producer is None:
            raise Skip(report.producer)
        measure(report, bench, gate, save)
    except Skip as reason:
        report.skipped[GATE] = str(reason)
    save()
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where nothing could be timed or ours failed, 2 for a bad argument."""
    parser = _Parser(usage="%(prog)s [options]", description=(__doc__ or "").splitlines()[0])
    add, tokens = parser.add_argument, _integer_in("M", 1, MAX_NUM_TOKENS)
    which = "%(choices)s (default: %(default)s)"
    add("--model", choices=SCALE_FUSED, default=MODEL, metavar="NAME", help=which)
    add("--num-tokens", type=tokens, nargs="+", default=NUM_TOKENS, metavar="M", help="1 to 128")
    many = _integer_in("the number of rounds", 1, 100_000)
    add("--rounds", type=many, default=ROUNDS, help="replays of each graph (default: %(default)s)")
    add("--save-path", type=Path, metavar="DIR", help="write route_<gpu>….json there")
    add("--from-json", type=Path, metavar="FILE", help="print that table again; needs no GPU")
    arguments = parser.parse_args(argv)
    if arguments.save_path is not None and arguments.save_path.is_file():
        parser.error(f"argument --save-path: {arguments.save_path} is a file, must be a folder")
    import torch

    import sglang_router_gemm  # noqa: F401  makes the in-tree modules importable

    if arguments.from_json is not None:
        try:
            print(table(load(arguments.from_json)))
        except (OSError, TypeError, ValueError) as error:
            parser.error(f"argument --from-json: {error}")
        return 0
    if not torch.cuda.is_available():
        print("Nothing was timed: this machine has no CUDA device.")
        return 0
    command = shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    with torch.no_grad():
        given = arguments.model, arguments.num_tokens, arguments.rounds
        report = run(*given, command, arguments.save_path)
    print(table(report))
    return int(not report.us or any(each.provider.startswith("ours") for each in report.failures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(how_to_call(error))
