"""What a decode step of DeepSeek-V3 gains on one of eight ranks: SGLang's server, from its traces.

    python3 benchmark/server/run_dsv3_rank.py --output-dir results

Needs one Hopper GPU with 100 GB, SGLang and this package, no model files. The server has all
61 layers of one rank at TP 8, FP8 dummy weights of DeepSeek-V3's block quantisation; what is
missing is the all-reduce. It runs once with each backend, one after the other, and each batch
size is profiled over some hundred decode steps. Kernels are timed by the GPU's own clock:

- a step: from a layer's first expert GEMM to the same layer's in the next step;
- the routing: from the end of the norm ahead of a gate to the start of the first expert GEMM.

Writes `dsv3_rank_<SGLang's version>.json` and `.md`; exits with 1 where a backend other than
`off` was not taken.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

import _setup  # noqa: F401
import requests
from dsv3_server import (
    Server,
    argument_parser,
    environment,
    graph_options,
    parse_arguments,
    patch_taken,
    prompts,
    running,
    tp8_rank_config,
)
from dsv3_trace import by_stream, read_trace, short_name
from router_gemm_benchmark.timing import LINKS, quartiles
from tabulate import tabulate

BATCH_SIZES = (1, 8, 16, 32, 64)
STEPS = 200
EXPERT_GEMM = "fused_moe_kernel"


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


def read(path: Path) -> Trace:
    """Reads a profile; empty where it has no expert GEMM."""
    starts: list[float] = []
    spans: list[tuple[float, list[Kernel]]] = []
    for kernels in by_stream(read_trace(path)).values():
        norm, since = None, 0
        for index, kernel in enumerate(kernels):
            if "norm" in kernel["name"].lower():
                norm, since = kernel["ts"] + kernel["dur"], index + 1
            elif EXPERT_GEMM in kernel["name"] and norm is not None:
                starts.append(kernel["ts"])
                between = [
                    Kernel(
                        short_name(each["name"]),
                        each["ts"] - norm,
                        each["ts"] + each["dur"] - norm,
                    )
                    for each in kernels[since : index + 1]
                ]
                spans.append((kernel["ts"] - norm, between))
                norm = None  # the second GEMM of the layer is not counted
    starts.sort()
    steps = [later - earlier for earlier, later in zip(starts, starts[LINKS:], strict=False)]
    spans = sorted(spans[len(spans) // 10 :], key=lambda span: span[0])  # the prefill comes first
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


def rows(traces: dict[str, dict[int, Trace]], of: str, digits: int) -> list[tuple[str, ...]]:
    """A row a batch size: median and quartiles with each backend, and what the first one saves."""
    table = []
    for size in BATCH_SIZES:
        values = [getattr(each[size], of) for each in traces.values() if size in each]
        if len(values) < len(traces) or not all(values):
            continue
        shown = [quartiles(each) for each in values]
        first, last = shown[0][1], shown[-1][1]
        texts = [f"{m:.{digits}f} ({a:.{digits}f}-{b:.{digits}f})" for a, m, b in shown]
        table.append((str(size), *texts, f"{100 * (1 - first / last):.1f} %"))
    return table


def timelines(traces: dict[str, dict[int, Trace]], size: int) -> str:
    found = []
    for backend, by_size in traces.items():
        if size not in by_size:
            continue
        lines = [(k.name, f"{k.start:.1f}", f"{k.end:.1f}") for k in by_size[size].timeline]
        table = tabulate(lines, ("kernel", "start", "end"), "github", disable_numparse=True)
        found.append(f"`{backend}`, batch {size}:\n\n{table}")
    return "\n\n".join(found)


def save(
    folder: Path,
    where: dict[str, str],
    server: Server,
    steps: int,
    log_lines: Sequence[str],
    traces: dict[str, dict[int, Trace]],
) -> str:
    """The report so far; its text."""
    headers = ("batch", *(f"{name}, µs" for name in traces), "shorter by")
    table = partial(tabulate, headers=headers, tablefmt="github", disable_numparse=True)
    text = "\n\n".join(
        [
            "# One rank of DeepSeek-V3 at TP 8: SGLang's server, decode steps",
            "\n".join(f"- {name}: {value}" for name, value in where.items()),
            f"All 61 layers, FP8 dummy weights, no all-reduce; {steps} steps a profile, one server "
            "after the other. Median and quartiles.",
            f"```\n{server.shown_command}\n```",
            "A step, from a layer's first expert GEMM to the same layer's in the next step:",
            table(rows(traces, "step_us", 0)),
            "From the end of the norm ahead of a gate to the start of the first expert GEMM:",
            table(rows(traces, "routing_us", 2)),
            "The layer in the middle, µs after the end of the norm:",
            *(timelines(traces, size) for size in (1, 16, 64)),
            "```\n" + "\n".join(log_lines) + "\n```",
        ]
    )
    results = {
        "environment": where,
        "command": server.shown_command,
        "steps": steps,
        "log_lines": log_lines,
        "us": {
            backend: {
                size: {
                    "step": quartiles(trace.step_us) if trace.step_us else None,
                    "routing": quartiles(trace.routing_us) if trace.routing_us else None,
                    "timeline": trace.timeline,
                }
                for size, trace in by_size.items()
            }
            for backend, by_size in traces.items()
        },
    }
    name = f"dsv3_rank_{where['sglang']}"
    (folder / f"{name}.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1))
    return text


def main() -> int:
    parser = argument_parser(__doc__, backend="auto", num_layers=None)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a profile")
    arguments = parse_arguments(parser)
    where = environment()
    extra = ["--mem-fraction-static", "0.9", "--max-total-tokens", "65536"]
    extra += [*graph_options(BATCH_SIZES), *arguments.server_options]
    traces: dict[str, dict[int, Trace]] = {}
    log_lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(4) as pool:
        model = Path(folder, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(tp8_rank_config(), indent=2))
        for backend in (arguments.backend, "off"):
            log = arguments.output_dir / f"server_{backend}.log"
            futures: dict[int, Future[Trace]] = {}
            traces[backend] = {}

            def save_what_is_read(
                server: Server, backend: str = backend, futures: dict[int, Future[Trace]] = futures
            ) -> str:
                # After each profile: a run that is cut short is not lost.
                read_by_now = {size: each.result() for size, each in futures.items() if each.done()}
                traces[backend] = read_by_now
                return save(arguments.output_dir, where, server, arguments.steps, log_lines, traces)

            with running(model, log, arguments.port, backend, extra) as server:
                print(f"{backend}: up after {server.wait():.0f} s", flush=True)
                lines = log.read_text().splitlines()
                log_lines.extend(
                    each for each in lines if "Router GEMM" in each or "Routing," in each
                )
                for size in BATCH_SIZES:
                    path = profile(server, Path(folder, backend, str(size)), size, arguments.steps)
                    futures[size] = pool.submit(read, path)
                    save_what_is_read(server)
                    print(f"{backend}: batch {size} is profiled", flush=True)
            wait(futures.values())
            text = save_what_is_read(server)
    print(text)
    return int(arguments.backend != "off" and not patch_taken("\n".join(log_lines)))


if __name__ == "__main__":
    raise SystemExit(main())
