"""The tables of docs/upstream, by the name of their block: from the committed results."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from router_gemm_benchmark.providers import CUBLAS, FP32_LINEAR, TF32_LINEAR
from router_gemm_benchmark.report import form_of
from tables import NO_RESULTS, Results, by_num_tokens, chain, github, is_deepseek_v3, medians

from sglang.srt.layers.moe_router.kernel import Form, dtype_name
from sglang.srt.layers.moe_router.models import MODELS
from sglang_router_gemm.pull_requests import gate, routing

BLACKWELL = re.compile(r"\bG?B\d00\b")
CLUSTER, TINY_GEMM, FLASHINFER = "ours: cluster", "SGLang tiny_gemm", "FlashInfer"
# Of benchmark_route.py.
SELECT_EXPERTS, ROUTE = "SGLang", "ours: route"
GROUPED_TOP_K, UNGROUPED_TOP_K = "FlashInfer fused_topk_deepseek", "SGLang Triton moe_fused_gate"
# Up to which M SGLang 0.5.23's MoEGate calls tiny_gemm.
TINY_GEMM_MAX_NUM_TOKENS = 16
# What SGLang 0.5.23's gates with fp32 weights call: enable_tf32_matmul is set for these models.
TF32_MODELS = frozenset({"GLM-4.5", "GLM-4.5-Air", "MiniMax-M2"})
# What SGLang has for a gate, and none of those with fp32 weights calls.
OTHERS_OF_SGLANG = (TINY_GEMM, "SGLang router_gemv", "SGLang router_gate_matvec", "SGLang bf16x3")

# Of the benchmark's operands. Where sums cancel, an error relative to the sum says nothing.
KINDS = ("random", "scale", "hot")

Cells = defaultdict[tuple[str, ...], dict[int, str]]


class Runs(NamedTuple):
    """The committed results that the texts are made of; None or empty where there are none."""

    gates: Sequence[Results]
    routes: Sequence[Results]
    gate_benchmark: Results | None
    """What the benchmark of `gate` and `fp32` printed."""
    routing_benchmark: Results | None
    """What that of `routing` printed."""
    rank: Results | None
    """One rank with the pull requests in SGLang's server, and without."""


def blocks(runs: Runs) -> dict[str, str]:
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "pr_flashinfer_accuracy": flashinfer_accuracy(runs.gates),
        "pr_flashinfer_not_measured": flashinfer_not_measured(runs.gates),
        "pr_flashinfer_speed": flashinfer_speed(runs.gates),
        "pr_fp32_accuracy": fp32_accuracy(runs.gates),
        "pr_fp32_benchmark": gate_benchmark(runs.gate_benchmark, fp32),
        "pr_fp32_not_measured": gates_not_measured(runs.gates, fp32),
        "pr_fp32_others": fp32_others(runs.gates),
        "pr_fp32_speed": gate_speed(runs.gates, fp32),
        "pr_gate_accuracy": gate_accuracy(runs.gates),
        "pr_gate_benchmark": gate_benchmark(runs.gate_benchmark, bf16),
        "pr_gate_not_measured": gates_not_measured(runs.gates, bf16),
        "pr_gate_speed": gate_speed(runs.gates, bf16),
        "pr_rank": rank(runs.rank),
        "pr_routing_benchmark": routing_benchmark(runs.routing_benchmark),
        "pr_routing_not_measured": routing_not_measured(runs.routes),
        "pr_routing_speed": routing_speed(runs.routes),
    }


# `gate` and `fp32` --------------------------------------------------------------------------


class _Measured(NamedTuple):
    """A run of a gate that a pull request takes."""

    run: Results
    model: str
    num_tokens: range
    """For which M it is taken."""

    @property
    def gate(self) -> str:
        return f"{self.model}, {_size(self.run)}"


def gate_speed(runs: Sequence[Results], weight: torch.dtype) -> str:
    """µs of a call without the pull request and with it, for the M that it takes."""
    cells: Cells = defaultdict(dict)
    for each in _taken(runs, weight):
        us = chain(each.run)
        for m in each.run["num_tokens"]:
            if m in each.num_tokens and m & (m - 1) == 0:
                before = us[_runs_now(each.model, weight, m), m]
                cells[each.run["gpu"], each.gate][m] = _change(before, us[CLUSTER, m])
    return by_num_tokens(cells, ("GPU", "gate, N x K"))


def fp32_others(runs: Sequence[Results]) -> str:
    """µs of the fastest kernel that SGLang has, and that no gate with fp32 weights calls."""
    cells: Cells = defaultdict(dict)
    for each in _taken(runs, torch.float32):
        us = chain(each.run)
        for m in (m for m in each.run["num_tokens"] if m in each.num_tokens):
            others = {us[name, m]: name for name in OTHERS_OF_SGLANG if (name, m) in us}
            name = others[min(others)].removeprefix("SGLang ")
            cells[each.run["gpu"], each.gate][m] = f"{min(others):.2f} {name}"
    return by_num_tokens(cells, ("GPU", "gate, N x K"))


def gate_benchmark(run: Results | None, weight: torch.dtype) -> str:
    """The same as `gate_speed`, by the benchmark that the pull requests bring.

    With fp32 weights tiny_gemm, too, which takes them and which no gate calls.
    """
    if run is None:
        return NO_RESULTS
    taken = gate.taken(weight)
    columns = {TINY_GEMM: "tiny_gemm_us", TF32_LINEAR: "cublas_tf32_us"}
    cells: Cells = defaultdict(dict)
    for each in run["rows"]:
        shape, m = (each["num_experts"], each["hidden_size"]), each["num_tokens"]
        if each["weight"] == dtype_name(weight):
            model, num_tokens = taken[shape]
            if m in num_tokens:
                now = columns.get(_runs_now(model, weight, m), "cublas_us")
                cells[(f"{model}, {_size(each)}",)][m] = _change(each[now], each["cluster_us"])
                if weight == torch.float32 and "tiny_gemm_us" in each:
                    cells[(f"tiny_gemm, {_size(each)}",)][m] = f"{each['tiny_gemm_us']:.2f}"
    return by_num_tokens(cells, ("gate, N x K",))


def gate_accuracy(runs: Sequence[Results]) -> str:
    names = {CLUSTER: "this PR", TINY_GEMM: TINY_GEMM, CUBLAS: CUBLAS}
    return _accuracy(((each.run, each.gate) for each in _taken(runs, torch.bfloat16)), names)


def fp32_accuracy(runs: Sequence[Results]) -> str:
    names = {CLUSTER: "this PR", FP32_LINEAR: "cuBLAS fp32", TF32_LINEAR: "cuBLAS TF32"}
    return _accuracy(((each.run, each.gate) for each in _taken(runs, torch.float32)), names)


def gates_not_measured(runs: Sequence[Results], weight: torch.dtype) -> str:
    """The gates that a pull request takes where they were not measured, or not for every M."""
    most: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for each in _taken(runs, weight):
        of_gpu = most[each.run["gpu"]]
        of_gpu[each.model] = max(of_gpu.get(each.model, 0), *each.run["num_tokens"])
    lines = [f"- Measured on: {', '.join(most) or 'no GPU'}. No other GPU of SM 90 was."]
    for gpu, of_gpu in most.items():
        missing: defaultdict[int, list[str]] = defaultdict(list)
        for name, num_tokens in gate.taken(weight).values():
            if of_gpu.get(name, 0) < num_tokens[-1]:
                missing[of_gpu.get(name, 0)].append(name)
        for largest, names in sorted(missing.items()):
            beyond = f", beyond M = {largest}" if largest else ""
            lines.append(f"- On {gpu}{beyond}: not the gates of {', '.join(names)}.")
    return "\n".join(lines)


def _taken(runs: Sequence[Results], weight: torch.dtype) -> Iterator[_Measured]:
    taken = gate.taken(weight)
    for run in runs:
        shape = run["num_experts"], run["hidden_size"]
        if shape in taken and form_of(run) == Form(weight):
            yield _Measured(run, *taken[shape])


def _runs_now(model: str, weight: torch.dtype, num_tokens: int) -> str:
    """The provider that SGLang 0.5.23's gate calls."""
    if weight == torch.float32:
        return TF32_LINEAR if model in TF32_MODELS else FP32_LINEAR
    return TINY_GEMM if num_tokens <= TINY_GEMM_MAX_NUM_TOKENS else CUBLAS


def _size(of: Results) -> str:
    return f"{of['num_experts']} x {of['hidden_size']}"


def _change(before: float, after: float) -> str:
    return f"{before:.2f} → {after:.2f}"


def _accuracy(runs: Iterable[tuple[Results, str]], names: Mapping[str, str]) -> str:
    """The largest error against fp64 of each kernel, and what else was compared.

    Args:
        runs: each with the gate that it is of; a gate may have several on a GPU.
        names: of the kernels, by provider.
    """
    checks: defaultdict[tuple[str, str], defaultdict[str, list[Any]]]
    checks = defaultdict(lambda: defaultdict(list))
    changing: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for run, what in runs:
        row = run["gpu"], what
        for each in run["accuracy"]:
            checks[row][each["provider"]].append(each)
        for provider, name in names.items():
            if changes := run["bits_change_at"].get(provider):
                changing[row].append(f"{name}, at {', '.join(map(str, changes))}")
    rows = []
    for row, by_provider in checks.items():
        found = [by_provider.get(provider, []) for provider in names]
        errors = [
            f"{max(each['relative'][kind] for each in of_one for kind in KINDS):.0e}"
            if of_one
            else ""
            for of_one in found
        ]
        same = ", ".join(
            f"{100 * min(each['top8_agreement'] for each in of_one):.1f}" if of_one else "-"
            for of_one in found
        )
        rows.append((*row, *errors, same, "; ".join(changing[row]) or "none"))
    headers = ("GPU", "N x K", *names.values(), "same top 8, %", "bits change with M")
    return github(rows, headers) if rows else NO_RESULTS


# `flashinfer` --------------------------------------------------------------------------------


def flashinfer_accuracy(runs: Sequence[Results]) -> str:
    """Of FlashInfer's kernel and of what `MoEGate` runs, for DeepSeek-V3."""
    of_deepseek = ((run, _size(run)) for run in _with_flashinfer(runs))
    return _accuracy(of_deepseek, {FLASHINFER: FLASHINFER, TINY_GEMM: TINY_GEMM})


def flashinfer_speed(runs: Sequence[Results]) -> str:
    """µs of what `MoEGate` runs, and of FlashInfer's kernel, for DeepSeek-V3 on each GPU."""
    cells: Cells = defaultdict(dict)
    for run in _with_flashinfer(runs):
        us = chain(run)
        for provider in (TINY_GEMM, FLASHINFER):
            cells[run["gpu"], provider] = {
                m: f"{us[provider, m]:.2f}" for m in run["num_tokens"] if (provider, m) in us
            }
    return by_num_tokens(cells, ("GPU", "kernel"))


def flashinfer_not_measured(runs: Sequence[Results]) -> str:
    """Whether the pull request's kernel was timed on a GPU where it takes it."""
    gpus = sorted({run["gpu"] for run in _with_flashinfer(runs)})
    blackwell = [gpu for gpu in gpus if BLACKWELL.search(gpu)]
    if blackwell:
        return f"- On Blackwell, it was timed on: {', '.join(blackwell)}."
    return (
        "- **No Blackwell GPU was at hand.** On SM 100 and 103, where this PR takes the kernel, "
        "nothing was run: not the kernel, not what `MoEGate` calls there today. That FlashInfer's "
        "is faster there rests on PRs 17707 and 23285; no result here compares the two. "
        f"Timed on: {', '.join(gpus) or 'no GPU'}."
    )


def _with_flashinfer(runs: Sequence[Results]) -> Iterator[Results]:
    for run in runs:
        if is_deepseek_v3(run) and any(name == FLASHINFER for name, _ in chain(run)):
            yield run


# `routing` -----------------------------------------------------------------------------------


def routing_speed(runs: Sequence[Results]) -> str:
    """µs that ids and weights add behind the gate: SGLang's own, its top-k alone, and ours."""
    cells: Cells = defaultdict(dict)
    for run in runs:
        us = medians(run["us"])
        top_k = GROUPED_TOP_K if (GROUPED_TOP_K, run["num_tokens"][0]) in us else UNGROUPED_TOP_K
        for provider, name in (
            (SELECT_EXPERTS, "select_experts"),
            (top_k, "its top-k kernel alone"),
            (ROUTE, "this kernel"),
        ):
            cells[run["gpu"], run["model"], name] = {
                m: f"{us[provider, m]:.2f}" for m in run["num_tokens"] if m & (m - 1) == 0
            }
    return by_num_tokens(cells, ("GPU", "routing of", ""))


def routing_benchmark(run: Results | None) -> str:
    """What the pull request's own benchmark measured, of the models that the table names."""
    if run is None:
        return NO_RESULTS
    names = {
        (model.num_experts, *model.route[:3]): model.name
        for model in reversed(MODELS)
        if model.route is not None
    }
    cells: Cells = defaultdict(dict)
    for each in run["rows"]:
        row = names[tuple(each["routing"])], "yes" if each["num_shared"] else "no"
        cells[row][each["num_tokens"]] = _change(each["without_us"], each["warp_us"])
    return by_num_tokens(cells, ("routing of", "a shared expert"))


def routing_not_measured(runs: Sequence[Results]) -> str:
    """The routings that the pull request takes, of models that were not measured."""
    gpus = list(dict.fromkeys(run["gpu"] for run in runs))
    names = [name for each in routing.taken().values() for name in each]
    missing = [name for name in names if name not in {run["model"] for run in runs}]
    lines = [
        f"- Timed on: {', '.join(gpus) or 'no GPU'}. No other GPU of SM 90 was, H100 among them."
    ]
    if missing:
        lines.append(f"- Not timed apart from a server: the routing of {', '.join(missing)}.")
    return "\n".join(lines)


# A server with them --------------------------------------------------------------------------


def rank(run: Results | None) -> str:
    """Decode steps of one rank, with the pull requests and as SGLang is."""
    if run is None:
        return NO_RESULTS
    new, own = run["us"]["exported"], run["us"]["off"]
    rows = []
    for batch in new:
        step, between = ((own[batch][what][1], new[batch][what][1]) for what in ("step", "routing"))
        shorter = f"{100 * (1 - step[1] / step[0]):.1f} %"
        cells = [f"{each:.0f}" for each in step], [f"{each:.1f}" for each in between]
        rows.append((batch, *cells[0], shorter, *cells[1]))
    with_all = f"with {', '.join(run['pull_requests'])}"
    headers = ("batch", "step now", with_all, "shorter", "norm to experts now", with_all)
    return github(rows, headers)
