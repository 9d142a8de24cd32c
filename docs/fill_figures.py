"""Writes the figures of README.md, upstream_pr.md and kernel.md, from the committed results.

python3 fill_figures.py            rewrites the blocks between the markers
python3 fill_figures.py --check    exits with 1 where a block is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmark" / "kernels" / "deepseek"
sys.path.insert(0, str(BENCHMARK))

from router_gemm_benchmark.report import (  # noqa: E402
    accuracy_table,
    headline_mode,
    mode_table,
    plot_stem,
)

Results = Mapping[str, Any]

BLOCK = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
BLACKWELL = re.compile(r"\bG?B\d00\b")
NAMED = ("torch", "sglang", "flashinfer-python")
DEEPSEEK_V3 = (256, 7168)
RESULTS = "benchmark/kernels/deepseek/results"
TEXTS = (
    ROOT / "README.md",
    ROOT / "docs" / "upstream_pr.md",
    ROOT / "docs" / "kernel.md",
)


def accuracy(servers: Sequence[Results], benchmarks: Sequence[Results]) -> str:
    """The logits of the server's gates and of each kernel, and the tokens served."""
    parts = []
    for run in servers:
        ours, off = run["servings"]
        same = sum(a == b for a, b in zip(_requests(ours), _requests(off), strict=True))
        rows = [
            (
                layer["layer"],
                layer["rows"],
                f"{layer['relative_difference']:.1e}",
                f"{100 * layer['same_experts']:.2f} %",
            )
            for layer in run["layers"]
        ]
        headers = ("gate", "tokens", "relative difference of logits", "same experts")
        parts += [
            f"The server with backend `{ours['backend']}` against `{off['backend']}` on "
            f"{_where(run['environment'], run['environment'])}, a model of "
            f"{run['config']['num_hidden_layers']} layers with dummy weights: the same tokens in "
            f"{same} of {len(_requests(off))} requests.",
            tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        ]
    for run in benchmarks:
        parts += [
            f"Each kernel's logits against fp64 on {_benchmark(run)}, the worst M:",
            f"```\n{accuracy_table(dict(run))}\n```",
        ]
    return "\n\n".join(parts)


def speed(benchmarks: Sequence[Results]) -> str:
    """The benchmark's headline table of each GPU and shape."""
    if not benchmarks:
        return "No results of the benchmark are committed yet."
    return "\n\n".join(map(_speed_of, benchmarks))


def speed_with_plots(benchmarks: Sequence[Results], folder: str) -> str:
    """The headline table and plot of each GPU, for DeepSeek-V3's shape alone.

    Args:
        benchmarks: results of the benchmark.
        folder: where their plots are, as the text that is filled links to it.
    """
    parts = []
    for run in benchmarks:
        if _shape(run) == DEEPSEEK_V3:
            mode = headline_mode(dict(run))
            plot = f"{folder}/{plot_stem(dict(run), mode)}.png"
            parts += [f"### {run['gpu']}", _speed_of(run), f"![{mode} on {run['gpu']}]({plot})"]
    return "\n\n".join(parts)


def not_measured(servers: Sequence[Results], benchmarks: Sequence[Results]) -> str:
    """What the committed results do not have."""
    gpus = sorted(
        {run["environment"]["GPU"] for run in servers} | {run["gpu"] for run in benchmarks}
    )
    missing = [f"- Measured on: {', '.join(gpus) or 'no GPU'}. Nothing else was."]
    if not any(map(BLACKWELL.search, gpus)):
        missing.append(
            "- No Blackwell GPU: `auto` has not been seen taking FlashInfer's kernel on SM 100 or "
            "103. That it does rests on PRs 17707 and 23285; no result here compares it with "
            "the kernel that `MoEGate` calls today."
        )
    for run in servers:
        ours, off = (set(serving["kernels_in_replays"]) for serving in run["servings"])
        if ours == off:
            missing.append(
                f"- The profile of the server run on {run['environment']['GPU']} names no kernel "
                "that tells its two backends apart; only its log says which one served."
            )
    if not benchmarks:
        missing.append("- The time of one call, of any kernel.")
    return "\n".join(missing)


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
    parser.add_argument("--texts", type=Path, nargs="+", default=TEXTS, metavar="FILE")
    parser.add_argument("--servers", type=Path, default=ROOT / "test" / "srt" / "results")
    parser.add_argument("--benchmarks", type=Path, default=BENCHMARK / "results")
    arguments = parser.parse_args(argv)
    servers = [run for run in _load(arguments.servers) if "servings" in run]
    # The runs with this project's kernel; those beside the folder have more of the peers.
    benchmarks = [run for run in _load(arguments.benchmarks / "cluster") if run.get("timings")]
    blocks = {
        "accuracy": accuracy(servers, benchmarks),
        "benchmark": speed_with_plots(benchmarks, f"{RESULTS}/cluster"),
        "cluster": speed_with_plots(benchmarks, f"../{RESULTS}/cluster"),
        "not_measured": not_measured(servers, benchmarks),
        "shapes": speed([run for run in benchmarks if _shape(run) != DEEPSEEK_V3]),
        "speed": speed(benchmarks),
    }
    stale = False
    for path in arguments.texts:
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


def _load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _shape(run: Results) -> tuple[int, int]:
    return run["num_experts"], run["hidden_size"]


def _speed_of(run: Results) -> str:
    mode = headline_mode(dict(run))
    table = mode_table(dict(run), mode, tablefmt="github")
    return f"`{mode}` on {_benchmark(run)}: µs by M, median of {run['rounds']} rounds.\n\n{table}"


def _requests(serving: Results) -> list[Any]:
    return [tokens for outputs in serving["outputs"].values() for tokens in outputs]


def _benchmark(run: Results) -> str:
    shape = f"[{run['num_experts']}, {run['hidden_size']}]"
    environment = {"GPU": run["gpu"], "date": run["date"][:10]}
    return f"{_where(environment, run['versions'])}, weight {shape}"


def _where(environment: Results, versions: Results) -> str:
    installed = ", ".join(f"{name} {versions[name]}" for name in NAMED if versions.get(name))
    return f"{environment['GPU']} ({environment['date']}; {installed})"


if __name__ == "__main__":
    sys.exit(main())
