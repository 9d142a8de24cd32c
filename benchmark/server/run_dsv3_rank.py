"""What a decode step gains on one of a model's eight ranks: SGLang's server, from its traces.

    python3 benchmark/server/run_dsv3_rank.py --output-dir results
    python3 benchmark/server/run_dsv3_rank.py --model GLM-4.5 --output-dir results
    python3 benchmark/server/run_dsv3_rank.py --checkout DIR --pull-requests gate routing
    python3 benchmark/server/run_dsv3_rank.py --from-json FILE --output-dir results

Needs one Hopper GPU with 100 GB, SGLang and this package, no model files. The server has all
layers of one rank at TP 8, by default DeepSeek-V3's, with FP8 dummy weights of DeepSeek-V3's
block quantisation; what is missing is the all-reduce. It runs once with each backend, one after
the other, and each batch size is profiled over some hundred decode steps. With `--checkout` the
plugin is off, and SGLang as it was exported runs against SGLang as it is installed. Kernels are
timed by the GPU's own clock:

- a step: from a layer's first expert GEMM to the same layer's in the next step;
- the routing: from the end of the norm ahead of a gate to the start of the first expert GEMM.

The server is serve_spread.py's, whose tokens go to all experts, as a trained model's do.

Writes `dsv3_rank_<GPU>_<SGLang's version>.json`, `.md` and, with matplotlib, `.png`, of another
model with its name, of a checkout with `exported` for `rank`; `--from-json` does that again from
such a JSON, without a GPU. Exits with 1 where a backend other than `off` was not taken, or a
checkout runs no kernel of its own.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import _setup  # noqa: F401
import requests
from dsv3_server import (
    SPREAD,
    TP8_RANKS,
    Rank,
    Server,
    argument_parser,
    environment,
    graph_options,
    parse_arguments,
    patch_taken,
    prompts,
    running,
)
from dsv3_trace import read_trace, short_name
from router_gemm_benchmark.report import file_stem
from router_gemm_benchmark.timing import quartiles
from tabulate import tabulate

from sglang.srt.layers.moe_router.models import DEEPSEEK_V3

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH_SIZES = (1, 8, 16, 32, 64)
STEPS = 200
EXPERT_GEMM = "fused_moe_kernel"
DRAWN_SIZE = "16"
SPREAD_TEXT = "The gates' dummy weights are such that tokens go to all experts (serve_spread.py)."
GATHERED_TEXT = (
    "SGLang's own dummy weights: all tokens of a batch get nearly the same experts, so from batch "
    "8 on expert GEMMs are shorter than with trained weights, and what is saved is a larger part."
)
EXPORTED = "exported"
"""Stands for a backend where SGLang has a pull request, and not the plugin."""
COLORS = ("tab:purple", "tab:orange")  # of the backend and of `off`

Results = dict[str, Any]


class Kernel(NamedTuple):
    """One kernel between a norm and the first expert GEMM, in µs after the norm's end."""

    name: str
    start: float
    end: float


class Trace(NamedTuple):
    """What is read off one profile."""

    step_us: list[float]
    routing_us: list[float]
    timeline: list[Kernel]
    """Of the layer whose routing takes the median."""


def read(path: Path, num_moe_layers: int) -> Trace:
    """Reads a profile; empty where it has no expert GEMM.

    The norm is the last one of all streams: a gate may run beside a shared expert, with its
    experts on another stream than the norm. The timeline has the experts' stream alone.
    """
    starts: list[float] = []
    spans: list[tuple[float, list[Kernel]]] = []
    norm: float | None = None
    since: list[dict[str, Any]] = []
    kernels = [event for event in read_trace(path) if event.get("cat") == "kernel"]
    for kernel in sorted(kernels, key=itemgetter("ts")):
        if "norm" in kernel["name"].lower():
            norm, since = kernel["ts"] + kernel["dur"], []
        elif norm is not None:
            since.append(kernel)
            if EXPERT_GEMM in kernel["name"]:
                starts.append(kernel["ts"])
                between = [
                    Kernel(
                        short_name(each["name"]),
                        each["ts"] - norm,
                        each["ts"] + each["dur"] - norm,
                    )
                    for each in since
                    if each["args"]["stream"] == kernel["args"]["stream"]
                ]
                spans.append((kernel["ts"] - norm, between))
                norm = None  # the second GEMM of the layer is not counted
    steps = [
        later - earlier for earlier, later in zip(starts, starts[num_moe_layers:], strict=False)
    ]
    spans = sorted(spans[len(spans) // 10 :], key=itemgetter(0))  # the prefill comes first
    timeline = spans[len(spans) // 2][1] if spans else []
    return Trace(steps[len(steps) // 10 :], [span for span, _ in spans], timeline)


def profile(server: Server, folder: Path, batch_size: int, steps: int) -> Path:
    """Decodes a batch for so many steps under the profiler, and returns its file."""
    folder.mkdir(parents=True)
    batch = prompts(batch_size, seed=batch_size, lengths=range(16, 17))
    server.generate(batch, 16)  # warm
    body = {"output_dir": str(folder), "num_steps": steps, "activities": ["GPU"]}
    requests.post(f"{server.url}/start_profile", json=body, timeout=60)
    server.generate(batch, steps + 40)
    size = -1
    for _ in range(120):
        files = [path for path in folder.rglob("*.gz") if path.stat().st_size]
        if files and files[0].stat().st_size == size:  # written to the end
            return files[0]
        size = files[0].stat().st_size if files else -1
        time.sleep(0.5)
    raise RuntimeError(f"the server wrote no profile of batch size {batch_size}")


def as_json(trace: Trace) -> Results:
    return {
        "step": quartiles(trace.step_us) if trace.step_us else None,
        "routing": quartiles(trace.routing_us) if trace.routing_us else None,
        "timeline": trace.timeline,
    }


def measured(us: Results, of: str) -> dict[str, list[Sequence[float]]]:
    """By batch size the quartiles with each backend, where all of them have some."""
    found = {
        size: [by_size.get(size, {}).get(of) for by_size in us.values()]
        for size in next(iter(us.values()))
    }
    return {size: each for size, each in found.items() if all(each)}


def shorter_by(each: Sequence[Sequence[float]]) -> float:
    """How many % the first median is below the last."""
    return 100 * (1 - each[0][1] / each[-1][1])


def rows(us: Results, of: str, digits: int) -> list[tuple[str, ...]]:
    """A row a batch size: median and quartiles with each backend, and what the first one saves."""
    return [
        (
            size,
            *(f"{m:.{digits}f} ({a:.{digits}f}-{b:.{digits}f})" for a, m, b in each),
            f"{shorter_by(each):.1f} %",
        )
        for size, each in measured(us, of).items()
    ]


def timelines(us: Results, size: str) -> str:
    found = []
    for backend, by_size in us.items():
        if size not in by_size:
            continue
        lines = [(name, f"{a:.1f}", f"{b:.1f}") for name, a, b in by_size[size]["timeline"]]
        table = tabulate(lines, ("kernel", "start", "end"), "github", disable_numparse=True)
        found.append(f"`{backend}`, batch {size}:\n\n{table}")
    return "\n\n".join(found)


def took_other_kernels(us: Results) -> bool:
    """Whether what was exported runs a kernel that SGLang as it is does not."""
    new, own = (
        {name for each in by_size.values() for name, *_ in each["timeline"]}
        for by_size in us.values()
    )
    return bool(new - own)


def shown_sizes(us: Results) -> list[str]:
    """The smallest, the middle and the largest batch size, as far as they are there."""
    sizes = list(next(iter(us.values())))
    return [*dict.fromkeys(sizes[:1] + sizes[len(sizes) // 2 :][:1] + sizes[-1:])]


def ran(results: Results) -> tuple[str, Rank]:
    """The model's name, which older files of DeepSeek-V3 lack, and what was run of it."""
    model = results.get("model", DEEPSEEK_V3.name)
    return model, TP8_RANKS[model]


def report(results: Results, picture: str | None) -> str:
    """The text, from what the JSON file holds."""
    us = results["us"]
    model, rank = ran(results)
    remark = f" {rank.remark}" if rank.remark else ""
    headers = ("batch", *(f"{name}, µs" for name in us), "shorter by")
    table = partial(tabulate, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n\n".join(
        [
            f"# One rank of {model} at TP 8: SGLang's server, decode steps",
            *(
                [f"![Decode steps, and what runs ahead of the experts]({picture})"]
                if picture
                else []
            ),
            "\n".join(f"- {name}: {value}" for name, value in results["environment"].items()),
            f"All {rank.num_layers} layers, FP8 dummy weights, no all-reduce; {results['steps']} "
            f"steps a profile, one server after the other. Median and quartiles.{remark}",
            SPREAD_TEXT if results.get("spread") else GATHERED_TEXT,
            *(
                [f"`{EXPORTED}`: SGLang with --pr {', '.join(names)}. The plugin is off in both."]
                if (names := results.get("pull_requests"))
                else []
            ),
            f"```\n{results['command']}\n```",
            "A step, from a layer's first expert GEMM to the same layer's in the next step:",
            table(rows(us, "step", 0)),
            "From the end of the norm ahead of a gate to the start of the first expert GEMM:",
            table(rows(us, "routing", 2)),
            "The layer in the middle, µs after the end of the norm:",
            *(timelines(us, size) for size in shown_sizes(us)),
            *(["\n".join(["```", *lines, "```"])] if (lines := results["log_lines"]) else []),
        ]
    )


def draw_steps(axes: Axes, steps: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """A bar a batch size."""
    shorter = [shorter_by(each) for each in steps.values()]
    bars = axes.bar([f"batch {size}" for size in steps], shorter, width=0.6, color=COLORS[0])
    percents = [f"{each:.1f} %" for each in shorter]
    white = {"color": "white", "fontsize": "large", "fontweight": "bold"}
    axes.bar_label(bars, percents, label_type="center", **white)
    times = [f"{each[-1][1] / 1000:.1f} → {each[0][1] / 1000:.1f} ms" for each in steps.values()]
    axes.bar_label(bars, times, padding=3)
    axes.margins(y=0.2)
    axes.set_ylabel("shorter by, %")
    axes.set_title(f"Decode step: {min(shorter):.0f} to {max(shorter):.0f} % shorter")


def draw_timelines(
    axes: Axes, us: Results, routing: Sequence[Sequence[float]], num_moe_layers: int
) -> None:
    """A row a kernel, `off` above; what lies ahead of the expert GEMM is shaded."""
    medians = [median for _, median, _ in routing]
    limit = 1.15 * max(medians)
    row, middles = 0, []
    for backend, color in zip(reversed(us), reversed(COLORS[: len(us)]), strict=True):
        *ahead, (_, experts, _) = us[backend][DRAWN_SIZE]["timeline"]
        bars = [(name.rsplit("::", 1)[-1].removesuffix("_kernel"), *span) for name, *span in ahead]
        bars.append(("expert GEMM", experts, limit))
        middles.append(row + (len(bars) - 1) / 2)
        axes.barh(middles[-1], experts, len(bars), color=color, alpha=0.15)
        for at, (name, start, end) in enumerate(bars, row):
            axes.barh(at, end - start, left=start, color="grey" if end == limit else color)
            on_left = end == limit or start > limit / 2
            axes.annotate(
                name,
                (start if on_left else end, at),
                (-4 if on_left else 4, 0),
                textcoords="offset points",
                horizontalalignment="right" if on_left else "left",
                verticalalignment="center",
            )
        row += len(bars) + 1
    labels = [f"{name}\n{median:.1f} µs" for name, median in zip(us, medians, strict=True)]
    axes.set_yticks(middles, labels[::-1], fontsize="large", fontweight="bold")
    axes.tick_params("y", length=0)
    axes.set_ylim(row - 1, -1)
    axes.set_xlim(-0.03 * limit, limit)
    axes.set_xlabel("µs after the end of the norm")
    less = f"{medians[-1] - medians[0]:.1f} µs less, {num_moe_layers} times a step"
    axes.set_title(f"From the norm to the first expert GEMM, batch {DRAWN_SIZE}: {less}")


def save_plot(results: Results, path: Path) -> bool:
    """Whether there was enough to draw, and matplotlib."""
    us = results["us"]
    model, rank = ran(results)
    routing = measured(us, "routing").get(DRAWN_SIZE)
    if routing is None:
        return False
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is not installed; --from-json draws it elsewhere.")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, figsize=(9, 7), height_ratios=(2, 5), layout="constrained"
    )
    where = results["environment"]
    names = ", ".join(results.get("pull_requests", []))
    what_runs = f"pull requests {names}" if names else f"the plugin ({next(iter(us))})"
    title = f"{model} with {what_runs} and without (off)"
    what = f"one rank of TP 8, no all-reduce; {where['GPU']}, SGLang {where['sglang']}"
    figure.suptitle(f"{title}\n{what}", fontweight="bold")
    draw_steps(upper, measured(us, "step"))
    draw_timelines(lower, us, routing, rank.num_moe_layers)
    for axes, along in ((upper, "y"), (lower, "x")):
        axes.grid(axis=along, alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def save(results: Results, folder: Path) -> str:
    """Writes what is there so far; the text of the report."""
    where = results["environment"]
    gpu = file_stem(where["GPU"], DEEPSEEK_V3.num_experts, DEEPSEEK_V3.hidden_size)
    _, rank = ran(results)
    what = EXPORTED if EXPORTED in results["us"] else "rank"
    name = f"{rank.stem}_{what}_{gpu}_{where['sglang']}"
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1))
    drawn = save_plot(results, folder / f"{name}.png")
    text = report(results, f"{name}.png" if drawn else None)
    (folder / f"{name}.md").write_text(text + "\n")
    return text


def import_first(checkout: Path) -> dict[str, str]:
    """The variable with which a server imports this checkout's SGLang, not the installed one."""
    python = checkout.resolve() / "python"
    if not (python / "sglang").is_dir():
        raise SystemExit(f"--checkout is {checkout}, must have python/sglang")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(python), os.getenv("PYTHONPATH")]))}


def main() -> int:
    parser = argument_parser(__doc__, backend="auto", num_layers=None)
    parser.add_argument("--model", choices=TP8_RANKS, default=DEEPSEEK_V3.name)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a profile")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=BATCH_SIZES,
        help=f"the picture needs {DRAWN_SIZE} (default: {' '.join(map(str, BATCH_SIZES))})",
    )
    parser.add_argument(
        "--checkout", type=Path, help="SGLang's, as `export` edited it, instead of the plugin"
    )
    parser.add_argument(
        "--pull-requests", nargs="+", default=[], help="what it has, for the report"
    )
    redrawn = "write the report again, without a GPU"
    parser.add_argument("--from-json", type=Path, metavar="FILE", help=redrawn)
    arguments = parser.parse_args()
    if arguments.from_json is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        print(save(json.loads(arguments.from_json.read_text()), arguments.output_dir))
        return 0
    arguments = parse_arguments(parser)
    rank = TP8_RANKS[arguments.model]
    batch_sizes = sorted(set(arguments.batch_sizes))
    extra = ["--mem-fraction-static", "0.9", "--max-total-tokens", "65536"]
    extra += [*graph_options(batch_sizes), *arguments.server_options]
    runs: list[tuple[str, str, dict[str, str]]]  # the name, the setting, other variables
    if arguments.checkout:
        runs = [(EXPORTED, "off", import_first(arguments.checkout)), ("off", "off", {})]
    else:
        runs = [(arguments.backend, arguments.backend, {}), ("off", "off", {})]
    log_lines: list[str] = []
    results: Results = {
        "model": arguments.model,
        "environment": environment(),
        "command": "",
        "steps": arguments.steps,
        "spread": True,
        "pull_requests": arguments.pull_requests,
        "log_lines": log_lines,
        "us": {},
    }
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(4) as pool:
        model = Path(folder, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(rank.config, indent=2))
        for backend, setting, variables in runs:
            log = arguments.output_dir / f"server_{backend}.log"
            futures: dict[str, Future[Trace]] = {}

            def save_what_is_read(
                backend: str = backend, futures: dict[str, Future[Trace]] = futures
            ) -> str:
                # After each profile: a run that is cut short is not lost.
                results["us"][backend] = {
                    size: as_json(each.result()) for size, each in futures.items() if each.done()
                }
                return save(results, arguments.output_dir)

            given = model, log, arguments.port, setting, extra, variables
            with running(*given, launcher=[str(SPREAD)]) as server:
                results["command"] = server.shown_command
                print(f"{backend}: up after {server.wait():.0f} s", flush=True)
                lines = log.read_text().splitlines()
                log_lines.extend(
                    each for each in lines if "Router GEMM" in each or "Routing," in each
                )
                for size in batch_sizes:
                    path = profile(server, Path(folder, backend, str(size)), size, arguments.steps)
                    futures[str(size)] = pool.submit(read, path, rank.num_moe_layers)
                    save_what_is_read()
                    print(f"{backend}: batch {size} is profiled", flush=True)
            wait(futures.values())
            text = save_what_is_read()
    print(text)
    if arguments.checkout:
        return int(not took_other_kernels(results["us"]))
    return int(arguments.backend != "off" and not patch_taken("\n".join(log_lines)))


if __name__ == "__main__":
    raise SystemExit(main())
