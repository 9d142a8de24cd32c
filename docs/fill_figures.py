"""Writes the tables of README.md and docs: from the committed results, and from the code.

python3 docs/fill_figures.py            rewrites the blocks between the markers
python3 docs/fill_figures.py --check    exits with 1 where a block is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmark" / "kernels" / "deepseek"
sys.path.insert(0, str(BENCHMARK))

from router_gemm_benchmark import how_to_call  # noqa: E402

try:
    import torch
    from router_gemm_benchmark.providers import CUBLAS, FP32_LINEAR, LINEAR, TF32_LINEAR
    from router_gemm_benchmark.report import form_of, headline_mode, mode_table, plot_stem
    from tabulate import tabulate

    import sglang_router_gemm  # noqa: F401  makes the in-tree modules importable
    from sglang.srt.layers.moe_router.backends import BACKENDS, Backend, either
    from sglang.srt.layers.moe_router.environ import (
        AUTO,
        CHOICES,
        SGLANG_ROUTER_GEMM_BACKEND,
        SGLANG_ROUTER_GEMM_PDL,
    )
    from sglang.srt.layers.moe_router.kernel import Target, dtype_name
    from sglang.srt.layers.moe_router.models import DEEPSEEK_V3, MODELS, Auto, Model
    from sglang_router_gemm.pull_requests import gate as pr_gate
    from sglang_router_gemm.pull_requests import routing as pr_routing
except ModuleNotFoundError as error:
    sys.exit(how_to_call(error))

Results = Mapping[str, Any]

BLOCK = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
BLACKWELL = re.compile(r"\bG?B\d00\b")
NAMED = ("torch", "sglang", "flashinfer-python")
CLUSTER, TINY_GEMM = "ours: cluster", "SGLang tiny_gemm"
FLASHINFER = "FlashInfer"
# Of benchmark_route.py.
SGLANG_ROUTE, OWN_ROUTE = "SGLang", "ours: route"
GROUPED_ROUTE, UNGROUPED_ROUTE = "FlashInfer fused_topk_deepseek", "SGLang Triton moe_fused_gate"
RANKS = ROOT / "benchmark" / "server" / "results"
# The pull requests for SM 90 in one server, and what their own benchmarks printed.
EXPORTED_RUN = "dsv3_exported_h200_0.5.23.json"
GEMM_BENCHMARK, GEMM_NUM_TOKENS = "bench_cluster_router_gemm_h200.json", (1, 8, 16, 64, 128)
ROUTING_BENCHMARK = "bench_moe_route_warp_h200.json"
# Up to which M SGLang 0.5.23's MoEGate calls it.
TINY_GEMM_MAX_NUM_TOKENS = 16
# What SGLang 0.5.23's gates with fp32 weights call: enable_tf32_matmul is set for these models.
TF32_MODELS = frozenset({"GLM-4.5", "GLM-4.5-Air", "MiniMax-M2"})
# What SGLang has for a gate, and none of those with fp32 weights calls.
OTHERS_OF_SGLANG = (TINY_GEMM, "SGLang router_gemv", "SGLang router_gate_matvec", "SGLang bf16x3")
NO_RESULTS = "No results of the benchmark are committed yet."
# As a page in docs/ links to it.
PLOTS = "../benchmark/kernels/deepseek/results/cluster"
HEADLINE_RUN, HEADLINE_NUM_TOKENS = "h200.json", (1, 4, 8, 16, 64)


def speed(benchmarks: Sequence[Results]) -> str:
    """The benchmark's headline table of each GPU and shape."""
    if not benchmarks:
        return NO_RESULTS
    return "\n\n".join(map(_speed_of, benchmarks))


def speed_with_plots(benchmarks: Sequence[Results]) -> str:
    """The headline table and plot of each GPU, for DeepSeek-V3's shape alone."""
    parts = []
    for run in benchmarks:
        if _is_deepseek_v3(run):
            mode = headline_mode(dict(run))
            plot = f"{PLOTS}/{plot_stem(dict(run), mode)}.png"
            parts += [f"### {run['gpu']}", _speed_of(run), f"![{mode} on {run['gpu']}]({plot})"]
    return "\n\n".join(parts)


def headline(run: Results | None) -> str:
    """A few rows of one run's headline table."""
    if run is None:
        return NO_RESULTS
    mode = headline_mode(dict(run))
    table = mode_table(dict(run), mode, tablefmt="github", only=HEADLINE_NUM_TOKENS)
    return f"µs of one call (`{mode}`) on {_benchmark(run)}:\n\n{table}"


def backends_table(backends: Iterable[Backend]) -> str:
    """What each backend's kernel takes, as its rule says."""
    rows = []
    for backend in backends:
        rule, sms = backend.rule, backend.measured_sms
        sm = "any" if rule.min_sm is None else f"{rule.min_sm} or newer"
        if "cpu" in rule.device_types:
            sm += ", and the CPU"
        layout = "any" if rule.any_layout else "dense, row-major, 16-byte aligned"
        rows.append(
            (
                f"`{backend.name}`" + (f" (measured on SM {either(sms)})" if sms else ""),
                backend.kernel,
                sm,
                *map(_values, (rule.num_experts, rule.hidden_sizes, rule.num_tokens)),
                " or ".join(map(dtype_name, rule.dtypes)),
                " or ".join(map(dtype_name, rule.logits_dtypes))
                + (", with a bias or without" if rule.bias else ""),
                layout,
            )
        )
    return _github(rows, ("backend", "kernel", "SM", "N", "K", "M", "weight", "logits", "tensors"))


def auto_table(models: Iterable[Model]) -> str:
    """What `auto` takes, for each model and the SMs that are alike."""
    rows = []
    for model in models:
        alike: dict[Auto, list[str]] = {}
        for sm, auto in model.auto.items():
            alike.setdefault(auto, []).append(str(sm))
        for auto, sms in alike.items():
            taken = f"{auto.num_tokens[0]}-{auto.num_tokens[-1]}"
            gate = str(Target(torch.device("cuda"), None, *model.gate))
            measured = auto.measured or "no"
            rows.append((model.name, gate, ", ".join(sms), taken, f"`{auto.backend}`", measured))
    return _github(rows, ("model", "gate", "SM", "M", "`auto` takes", "measured"))


def settings_table() -> str:
    """The environment variables and their values."""
    rows = [
        (
            f"`{SGLANG_ROUTER_GEMM_BACKEND.name}`",
            ", ".join(f"`{choice}`" for choice in CHOICES) + "; `,fp32` behind each but `off`",
            f"`{AUTO}`",
        ),
        (
            f"`{SGLANG_ROUTER_GEMM_PDL.name}`",
            "`true`, `1`, `yes`, `y`; `false`, `0`, `no`, `n`",
            "on; off under `TRTLLM_ENABLE_PDL=0`",
        ),
    ]
    return _github(rows, ("variable", "values", "default"))


def routing(run: Results) -> str:
    """µs behind the gate's GEMM, by M, of everybody in a run of benchmark_route.py."""
    us = {(each["provider"], each["num_tokens"]): each["median_us"] for each in run["us"]}
    names = list(dict.fromkeys(each["provider"] for each in run["us"]))
    rows = [
        (str(m), *(f"{us[name, m]:.2f}" if (name, m) in us else "" for name in names))
        for m in run["num_tokens"]
    ]
    model = run.get("model", DEEPSEEK_V3.name)
    return "\n\n".join(
        [
            f"{model} on {_run_where(run)}, `{run['command']}`: µs of the GEMM, and what each adds "
            "behind it:",
            _github(rows, ("M", *names)),
        ]
    )


def gates(runs: Sequence[Results]) -> str:
    """µs of a call of each gate, and its peers'."""
    rows = []
    for run in runs:
        shape = run["num_experts"], run["hidden_size"]
        gate = str(Target(torch.device("cuda"), None, *shape, *form_of(run)))
        for m in run["num_tokens"]:
            us = {
                each["provider"]: each["median_us"]
                for each in run["timings"]
                if each["num_tokens"] == m and each["mode"] == "chain"
            }
            linear = next(name for name in (FP32_LINEAR, CUBLAS, LINEAR) if name in us)
            tf32, others = us.get(TF32_LINEAR), set(us) - {linear, TF32_LINEAR, "SGLang MoEGate"}
            others -= {name for name in us if name.startswith("ours")}
            best = min(others, key=us.__getitem__, default=None)
            rows.append(
                (
                    gate,
                    str(m),
                    f"{us[linear]:.2f}",
                    f"{tf32:.2f}" if tf32 is not None else "",
                    f"{us[best]:.2f} {best}" if best is not None else "",
                    f"{us['ours: cluster']:.2f}",
                )
            )
    if not rows:
        return NO_RESULTS
    headers = ("gate", "M", "cuBLAS", "in TF32", "best of the others", "cluster")
    return "\n\n".join(
        [
            f"µs of one call (`chain`) on {_run_where(runs[0])}, median of {runs[0]['rounds']} "
            "rounds:",
            _github(rows, headers),
        ]
    )


def fp32_weights(run: Results, shown: Collection[tuple[int, int]] = ()) -> str:
    """µs of a call with fp32 weights, by shape and M, and the error against fp64.

    Args:
        run: of a prototype.
        shown: shapes that the benchmark has measured since.
    """
    names = ("ours: cluster", "F.linear", "F.linear, TF32")
    errors = {(each["num_experts"], each["hidden_size"]): each for each in run["relative_error"]}
    rows = []
    for each in run["us"]:
        shape = each["num_experts"], each["hidden_size"]
        if shape in shown:
            continue
        error = errors[shape]
        rows.append(
            (
                f"{shape[0]} x {shape[1]}",
                str(each["num_tokens"]),
                *(f"{each[name]:.2f}" for name in names),
                f"{error[names[0]]:.0e}, {error[names[1]]:.0e}",
            )
        )
    return "\n\n".join(
        [
            f"µs of one call (`chain`) on {_run_where(run)}, median of {run['rounds']} rounds; "
            "error of the first two against fp64:",
            _github(rows, ("N x K", "M", *names, "error")),
        ]
    )


def pr_gate_speed(runs: Sequence[Results]) -> str:
    """µs of the kernel, and of what `MoEGate` runs without it, where the pull request takes it."""
    rows = []
    for run, model, taken in _of_gates(runs):
        us = _chain(run)
        for m in run["num_tokens"]:
            if m in taken and m & (m - 1) == 0:
                now = TINY_GEMM if m <= TINY_GEMM_MAX_NUM_TOKENS else CUBLAS
                cells = us[now, m], us[CLUSTER, m]
                gate = f"{model}, {run['num_experts']} x {run['hidden_size']}"
                shown = f"{cells[0]:.2f}", f"{cells[1]:.2f}", f"{cells[0] / cells[1]:.2f}"
                rows.append((run["gpu"], gate, str(m), now, *shown))
    headers = ("GPU", "gate, N x K", "M", "runs now", "now", "this PR", "now / this PR")
    return _github(rows, headers) if rows else NO_RESULTS


def pr_gate_accuracy(runs: Sequence[Results]) -> str:
    """The worst of the kernel and of what it replaces, where the pull request takes it."""
    names = {CLUSTER: "this PR", TINY_GEMM: TINY_GEMM, CUBLAS: CUBLAS}
    return _accuracy((run, f"{model}, ", names) for run, model, _ in _of_gates(runs))


def pr_fp32_speed(runs: Sequence[Results]) -> str:
    """µs of the kernel, of what the gates with fp32 weights run, and of what they might."""
    rows = []
    for run, model, taken in _of_gates(runs, torch.float32):
        us = _chain(run)
        now, called = FP32_LINEAR, "cuBLAS fp32"
        if model in TF32_MODELS:
            now, called = TF32_LINEAR, "cuBLAS TF32"
        for m in (m for m in run["num_tokens"] if m in taken):
            others = {us[name, m]: name for name in OTHERS_OF_SGLANG if (name, m) in us}
            best = min(others)
            shown = f"{us[now, m]:.2f}", f"{us[CLUSTER, m]:.2f}"
            ratio = f"{us[now, m] / us[CLUSTER, m]:.2f}"
            gate = f"{model}, {run['num_experts']} x {run['hidden_size']}"
            rest = f"{best:.2f} {others[best].removeprefix('SGLang ')}"
            rows.append((run["gpu"], gate, str(m), called, *shown, ratio, rest))
    headers = ("GPU", "gate, N x K", "M", "runs now", "now", "this PR", "now / this PR")
    return _github(rows, (*headers, "best that no gate calls")) if rows else NO_RESULTS


def pr_fp32_accuracy(runs: Sequence[Results]) -> str:
    """The worst of the kernel and of cuBLAS, where the pull request takes it."""
    names = {CLUSTER: "this PR", FP32_LINEAR: "cuBLAS fp32", TF32_LINEAR: "cuBLAS TF32"}
    wide = _of_gates(runs, torch.float32)
    return _accuracy((run, f"{model}, ", names) for run, model, _ in wide)


def pr_flashinfer_accuracy(runs: Sequence[Results]) -> str:
    """The worst of FlashInfer's kernel and of what `MoEGate` runs, for DeepSeek-V3."""
    names = {FLASHINFER: FLASHINFER, TINY_GEMM: TINY_GEMM}
    return _accuracy((run, "", names) for run in runs if _is_deepseek_v3(run))


def _accuracy(runs: Iterable[tuple[Results, str, Mapping[str, str]]]) -> str:
    """The worst M of a GPU's kernels, by provider and what it is called, against fp64."""
    checks: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    changes: dict[tuple[str, str, str], list[int]] = {}
    for run, model, names in runs:
        for provider, name in names.items():
            row = run["gpu"], f"{model}{run['num_experts']} x {run['hidden_size']}", name
            of_run = [each for each in run["accuracy"] if each["provider"] == provider]
            if of_run:
                checks.setdefault(row, []).extend(of_run)
                changes.setdefault(row, []).extend(run["bits_change_at"].get(provider, ()))
    rows = [
        (
            *row,
            *(
                f"{max(each['relative'][kind] for each in of_row):.0e}"
                for kind in ("random", "scale", "hot")
            ),
            f"{100 * min(each['top8_agreement'] for each in of_row):.1f} %",
            f"no, at M = {', '.join(map(str, changes[row]))}" if changes[row] else "yes",
        )
        for row, of_row in checks.items()
    ]
    headers = ("GPU", "N x K", "kernel", "random", "scale", "hot", "same top 8", "batch-invariant")
    return _github(rows, headers) if rows else NO_RESULTS


def pr_not_measured(runs: Sequence[Results], weight: torch.dtype) -> str:
    """The gates that a pull request takes on a GPU where they were not measured."""
    measured: dict[str, set[str]] = {}
    for run, model, _ in _of_gates(runs, weight):
        measured.setdefault(run["gpu"], set()).add(model)
    names = [name for name, _ in pr_gate.taken(weight).values()]
    lines = [f"- Measured on: {', '.join(measured) or 'no GPU'}. No other GPU of SM 90 was."]
    for gpu, seen in measured.items():
        missing = [name for name in names if name not in seen]
        if missing:
            lines.append(f"- On {gpu}: not the gates of {', '.join(missing)}.")
    return "\n".join(lines)


def pr_flashinfer_speed(runs: Sequence[Results]) -> str:
    """µs of FlashInfer's kernel and of what `MoEGate` runs, for DeepSeek-V3 on each GPU."""
    rows = []
    for run in runs:
        us = _chain(run)
        for m in run["num_tokens"] if _is_deepseek_v3(run) else ():
            if (FLASHINFER, m) in us and (TINY_GEMM, m) in us:
                cells = us[TINY_GEMM, m], us[FLASHINFER, m]
                rows.append((run["gpu"], str(m), *(f"{each:.2f}" for each in cells)))
    return _github(rows, ("GPU", "M", TINY_GEMM, "FlashInfer")) if rows else NO_RESULTS


def pr_flashinfer_not_measured(runs: Sequence[Results]) -> str:
    """Whether the pull request's kernel was timed on a GPU where it takes it."""
    gpus = sorted({run["gpu"] for run in runs if _is_deepseek_v3(run)})
    blackwell = [gpu for gpu in gpus if BLACKWELL.search(gpu)]
    if blackwell:
        return f"- On Blackwell, it was timed on: {', '.join(blackwell)}."
    return (
        "- **No Blackwell GPU was at hand.** On SM 100 and 103, where this PR takes the kernel, "
        "nothing was run: not the kernel, not what `MoEGate` calls there today. That FlashInfer's "
        "is faster there rests on PRs 17707 and 23285; no result here compares the two. "
        f"Timed on: {', '.join(gpus) or 'no GPU'}."
    )


def pr_routing_speed(runs: Sequence[Results]) -> str:
    """µs that ids and weights add behind the gate: SGLang's own, its top-k alone, and ours."""
    rows = []
    for run in runs:
        us = {(each["provider"], each["num_tokens"]): each["median_us"] for each in run["us"]}
        alone = GROUPED_ROUTE if (GROUPED_ROUTE, run["num_tokens"][0]) in us else UNGROUPED_ROUTE
        for m in run["num_tokens"]:
            if m & (m - 1) == 0:
                shown = (f"{us[name, m]:.2f}" for name in (SGLANG_ROUTE, alone, OWN_ROUTE))
                rows.append((run["gpu"], run["model"], str(m), *shown))
    headers = ("GPU", "routing of", "M", "select_experts", "its top-k kernel alone", "this kernel")
    return _github(rows, headers) if rows else NO_RESULTS


def pr_rank(run: Results | None) -> str:
    """Decode steps of one rank, with the pull requests and as SGLang is."""
    if run is None:
        return NO_RESULTS
    new, own = run["us"]["exported"], run["us"]["off"]
    rows = []
    for batch in new:
        step, routing = ((own[batch][what][1], new[batch][what][1]) for what in ("step", "routing"))
        shorter = f"{100 * (1 - step[1] / step[0]):.1f} %"
        cells = [f"{each:.0f}" for each in step], [f"{each:.1f}" for each in routing]
        rows.append((batch, *cells[0], shorter, *cells[1]))
    with_all = f"with {', '.join(run['pull_requests'])}"
    headers = ("batch", "step now", with_all, "shorter", "norm to experts now", with_all)
    return _github(rows, headers)


def pr_gemm_benchmark(run: Results | None, weight: torch.dtype = torch.bfloat16) -> str:
    """What the pull request's own benchmark measured of the gates that it takes."""
    if run is None:
        return NO_RESULTS
    taken = pr_gate.taken(weight)
    rows = []
    for each in run["rows"]:
        shape, m = (each["num_experts"], each["hidden_size"]), each["num_tokens"]
        if each["weight"] != dtype_name(weight) or m not in GEMM_NUM_TOKENS:
            continue
        model, num_tokens = taken[shape]
        if m not in num_tokens:
            continue
        if weight == torch.float32:
            now = "cublas_tf32" if model in TF32_MODELS else "cublas"
        else:
            now = "tiny_gemm" if m <= TINY_GEMM_MAX_NUM_TOKENS else "cublas"
        before, ours = each[f"{now}_us"], each["cluster_us"]
        gate = f"{model}, {shape[0]} x {shape[1]}"
        rows.append((gate, str(m), now, f"{before:.2f}", f"{ours:.2f}", f"{before / ours:.2f}"))
    return _github(rows, ("gate, N x K", "M", "runs now", "now", "this PR", "now / this PR"))


def pr_routing_benchmark(run: Results | None) -> str:
    """What the pull request's own benchmark measured, of the models that the table names."""
    if run is None:
        return NO_RESULTS
    names = {
        (model.num_experts, *model.route[:3]): model.name
        for model in reversed(MODELS)
        if model.route is not None
    }
    rows = [
        (
            names[tuple(each["routing"])],
            each["num_shared"],
            each["num_tokens"],
            f"{each['without_us']:.2f}",
            f"{each['warp_us']:.2f}",
        )
        for each in run["rows"]
        if each["num_tokens"] in HEADLINE_NUM_TOKENS
    ]
    return _github(rows, ("routing of", "shared experts", "M", "without", "with this kernel"))


def pr_routing_not_measured(runs: Sequence[Results]) -> str:
    """The routings that the pull request takes, of models that were not measured."""
    gpus = list(dict.fromkeys(run["gpu"] for run in runs))
    names = [name for each in pr_routing.taken().values() for name in each]
    missing = [name for name in names if name not in {run["model"] for run in runs}]
    lines = [
        f"- Timed on: {', '.join(gpus) or 'no GPU'}. No other GPU of SM 90 was, H100 among them."
    ]
    if missing:
        lines.append(f"- Not timed apart from a server: the routing of {', '.join(missing)}.")
    return "\n".join(lines)


def _of_gates(
    runs: Sequence[Results], weight: torch.dtype = torch.bfloat16
) -> Iterator[tuple[Results, str, range]]:
    """The runs of the gates that are taken with such weights, whose they are, and for which M."""
    taken = pr_gate.taken(weight)
    for run in runs:
        shape = run["num_experts"], run["hidden_size"]
        dtypes = run.get("weight", "bfloat16"), run.get("logits", "float32"), run.get("bias", False)
        if shape in taken and dtypes == (str(weight).removeprefix("torch."), "float32", False):
            yield (run, *taken[shape])


def _chain(run: Results) -> dict[tuple[str, int], float]:
    """µs in the mode `chain`, by provider and M."""
    return {
        (each["provider"], each["num_tokens"]): each["median_us"]
        for each in run["timings"]
        if each["mode"] == "chain" and each["tp_size"] == 1
    }


def _read(path: Path) -> Results | None:
    return json.loads(path.read_text()) if path.exists() else None


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with the content of each of its blocks replaced.

    Raises:
        ValueError: `text` has no block, a block twice, or one that is not in `blocks`.
    """
    found = sorted(name for _, name, _ in BLOCK.findall(text))
    if not found or len(set(found)) < len(found) or not blocks.keys() >= set(found):
        raise ValueError(f"the blocks are {found}, must be some of {sorted(blocks)}, once each")
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--texts", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--benchmarks", type=Path, default=BENCHMARK / "results")
    arguments = parser.parse_args(argv)
    # The runs with this project's kernel; those beside the folder have more of the peers.
    cluster = arguments.benchmarks / "cluster"
    benchmarks = [run for run in _load(cluster) if run.get("timings")]
    headline_run = cluster / HEADLINE_RUN
    other_gates = _load(arguments.benchmarks / "gates")
    gemms = _read(arguments.benchmarks / "pull_requests" / GEMM_BENCHMARK)
    prototypes = _load(arguments.benchmarks / "fp32")
    measured = {
        (run["num_experts"], run["hidden_size"])
        for run in other_gates
        if run["weight"] == "float32"
    }
    plotted = speed_with_plots(benchmarks)
    routes = _load(arguments.benchmarks / "route")
    blocks = {
        "auto": auto_table(MODELS),
        "backends": backends_table(BACKENDS.values()),
        "benchmark": plotted,
        "cluster": plotted,
        "fp32": "\n\n".join(fp32_weights(run, measured) for run in prototypes) or NO_RESULTS,
        "gates": gates(other_gates),
        "headline": headline(_read(headline_run)),
        "pr_flashinfer_accuracy": pr_flashinfer_accuracy(benchmarks),
        "pr_flashinfer_not_measured": pr_flashinfer_not_measured(benchmarks),
        "pr_flashinfer_speed": pr_flashinfer_speed(benchmarks),
        "pr_fp32_accuracy": pr_fp32_accuracy(other_gates),
        "pr_fp32_benchmark": pr_gemm_benchmark(gemms, torch.float32),
        "pr_fp32_not_measured": pr_not_measured(other_gates, torch.float32),
        "pr_fp32_speed": pr_fp32_speed(other_gates),
        "pr_gate_accuracy": pr_gate_accuracy(benchmarks + other_gates),
        "pr_gate_benchmark": pr_gemm_benchmark(gemms),
        "pr_gate_not_measured": pr_not_measured(benchmarks + other_gates, torch.bfloat16),
        "pr_gate_speed": pr_gate_speed(benchmarks + other_gates),
        "pr_rank": pr_rank(_read(RANKS / EXPORTED_RUN)),
        "pr_routing_benchmark": pr_routing_benchmark(
            _read(arguments.benchmarks / "pull_requests" / ROUTING_BENCHMARK)
        ),
        "pr_routing_not_measured": pr_routing_not_measured(routes),
        "pr_routing_speed": pr_routing_speed(routes),
        "route": "\n\n".join(map(routing, routes)) or NO_RESULTS,
        "settings": settings_table(),
        "shapes": speed([run for run in benchmarks if not _is_deepseek_v3(run)]),
        "speed": speed(benchmarks),
    }
    stale = False
    for path in arguments.texts or texts():
        old = path.read_text()
        try:
            new = fill(old, blocks)
        except ValueError as error:
            parser.error(f"{path}: {error}")
        if old == new:
            continue
        stale = True
        if arguments.check:
            print(f"{path} is stale: run {Path(__file__).name}", file=sys.stderr)
        else:
            path.write_text(new)
            print(f"wrote {path}")
    return int(stale and arguments.check)


def texts() -> list[Path]:
    """README.md and the pages under docs/, where they have a block."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if BLOCK.search(page.read_text())]


def _load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _is_deepseek_v3(run: Results) -> bool:
    shape = DEEPSEEK_V3.num_experts, DEEPSEEK_V3.hidden_size
    return (run["num_experts"], run["hidden_size"]) == shape


def _values(values: Sequence[int] | None) -> str:
    """What a rule allows, in a cell."""
    return "any" if values is None or values[-1] > 10**9 else either(values)


def _github(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _speed_of(run: Results) -> str:
    mode = headline_mode(dict(run))
    table = mode_table(dict(run), mode, tablefmt="github")
    return f"`{mode}` on {_benchmark(run)}: µs by M, median of {run['rounds']} rounds.\n\n{table}"


def _benchmark(run: Results) -> str:
    return f"{_run_where(run)}, weight [{run['num_experts']}, {run['hidden_size']}]"


def _run_where(run: Results) -> str:
    return _where({"GPU": run["gpu"], "date": run["date"][:10]}, run["versions"])


def _where(environment: Results, versions: Results) -> str:
    installed = ", ".join(f"{name} {versions[name]}" for name in NAMED if versions.get(name))
    return f"{environment['GPU']} ({environment['date']}; {installed})"


if __name__ == "__main__":
    sys.exit(main())
