"""Writes the tables of README.md and docs: from the committed results, and from the code.

python3 docs/fill_figures.py            rewrites the blocks between the markers
python3 docs/fill_figures.py --check    exits with 1 where a block is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmark" / "kernels" / "deepseek"
sys.path.insert(0, str(BENCHMARK))

from router_gemm_benchmark import how_to_call  # noqa: E402

try:
    import pull_request_figures
    import torch
    from router_gemm_benchmark.providers import CUBLAS, FP32_LINEAR, LINEAR, TF32_LINEAR
    from router_gemm_benchmark.report import form_of, headline_mode, mode_table, plot_stem
    from tables import NO_RESULTS, Results, chain, github, is_deepseek_v3, medians

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
except ModuleNotFoundError as error:
    sys.exit(how_to_call(error))


BLOCK = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
NAMED = ("torch", "sglang", "flashinfer-python")
RANKS = ROOT / "benchmark" / "server" / "results"
# The pull requests for SM 90 in one server, and what their own benchmarks printed.
EXPORTED_RUN = "dsv3_exported_h200_0.5.23.json"
GATE_BENCHMARK = "bench_cluster_router_gemm_h200.json"
ROUTING_BENCHMARK = "bench_moe_route_warp_h200.json"
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
        if is_deepseek_v3(run):
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
    return github(rows, ("backend", "kernel", "SM", "N", "K", "M", "weight", "logits", "tensors"))


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
    return github(rows, ("model", "gate", "SM", "M", "`auto` takes", "measured"))


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
    return github(rows, ("variable", "values", "default"))


def routing(run: Results) -> str:
    """µs behind the gate's GEMM, by M, of everybody in a run of benchmark_route.py."""
    us = medians(run["us"])
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
            github(rows, ("M", *names)),
        ]
    )


def gates(runs: Sequence[Results]) -> str:
    """µs of a call of each gate, and its peers'."""
    rows = []
    for run in runs:
        shape = run["num_experts"], run["hidden_size"]
        gate = str(Target(torch.device("cuda"), None, *shape, *form_of(run)))
        of_run = chain(run)
        for m in run["num_tokens"]:
            us = {name: median for (name, each), median in of_run.items() if each == m}
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
            github(rows, headers),
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
            github(rows, ("N x K", "M", *names, "error")),
        ]
    )


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
    own = arguments.benchmarks / "pull_requests"
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
        "route": "\n\n".join(map(routing, routes)) or NO_RESULTS,
        "settings": settings_table(),
        "shapes": speed([run for run in benchmarks if not is_deepseek_v3(run)]),
        "speed": speed(benchmarks),
        **pull_request_figures.blocks(
            pull_request_figures.Runs(
                gates=benchmarks + other_gates,
                routes=routes,
                gate_benchmark=_read(own / GATE_BENCHMARK),
                routing_benchmark=_read(own / ROUTING_BENCHMARK),
                rank=_read(RANKS / EXPORTED_RUN),
            )
        ),
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


def _values(values: Sequence[int] | None) -> str:
    """What a rule allows, in a cell."""
    return "any" if values is None or values[-1] > 10**9 else either(values)


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
