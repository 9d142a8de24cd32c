"""Decode step time of SGLang's real server with the patch and without it, interleaved.

    python3 benchmark/server/run_dsv3_decode.py --output-dir results

Needs one Hopper or Blackwell GPU with 80 GB, SGLang and this package, no model files. Two
servers run on the GPU at once, one with the backend and one with `off`, on the model of
run_dsv3_server.py (DeepSeek-V3's full router width) with as many layers as fit twice. They
take turns, so a drifting clock hits both alike: each batch size, one server after the
other, several times over.

A batch of equal prompts is sent in one request and decodes in lockstep. The time of a step is
the difference between a long and a short generation over the difference in tokens, which takes
prefill, HTTP and scheduling of the batch out. A saving of some microseconds a gate is near the
noise of that, so in the end the steps of both are profiled too, for the time from the norm
ahead of a gate to the top-k behind it.

`--backend off` compares SGLang's own gate with itself: what the two servers differ in without it.

Writes `dsv3_decode.json` and `dsv3_decode.md` after each round, so that a run that is cut short
is not lost; exits with 1 where the backend is not `off` and was not taken.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
from dsv3_server import (
    Server,
    argument_parser,
    deepseek_v3_config,
    environment,
    graph_options,
    parse_arguments,
    patch_taken,
    prompts,
    side_by_side,
)
from dsv3_trace import PROFILED_STEPS, profiled_events, routing_us
from router_gemm_benchmark.timing import quartiles
from tabulate import tabulate

BATCH_SIZES = (1, 8, 16, 32, 64)
PROMPT_TOKENS = 16
SHORT = 8
# What one request differs from the next, some milliseconds, is spread over as many steps.
STEPS = 512


def seconds(server: Server, batch: Sequence[list[int]], new_tokens: int) -> float:
    """How long one request of `len(batch)` prompts takes."""
    started = time.perf_counter()
    server.generate(batch, new_tokens)
    return time.perf_counter() - started


def step_us(server: Server, batch: Sequence[list[int]], steps: int) -> float:
    """Microseconds of one decode step, from a generation that has `steps` more than another."""
    short = seconds(server, batch, SHORT)
    return 1e6 * (seconds(server, batch, SHORT + steps) - short) / steps


def measure(servers: Sequence[Server], rounds: int) -> Iterator[dict[int, list[list[float]]]]:
    """By batch size, and for each server, the step times so far; after each round."""
    steps: dict[int, list[list[float]]] = {size: [[] for _ in servers] for size in BATCH_SIZES}
    for each in range(-1, rounds):  # the first one warms up
        for size in BATCH_SIZES:
            lengths = range(PROMPT_TOKENS, PROMPT_TOKENS + 1)
            batch = prompts(size, seed=1000 * (each + 1) + size, lengths=lengths)
            order = range(len(servers)) if each % 2 else reversed(range(len(servers)))
            for server in order:
                step = step_us(servers[server], batch, STEPS)
                if each >= 0:
                    steps[size][server].append(step)
        if each >= 0:
            yield steps


def profile(servers: Sequence[Server]) -> dict[int, list[list[float]]]:
    """By batch size, and for each server, `routing_us` of its steps."""
    spans: dict[int, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in BATCH_SIZES:
            spans[size] = [
                routing_us(
                    profiled_events(server, Path(folder, f"{size}_{index}"), batch_size=size)
                )
                for index, server in enumerate(servers)
            ]
    return spans


def shown_quartiles(values: Sequence[float], digits: int) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def rows(steps: dict[int, list[list[float]]], num_gates: int) -> list[tuple[str, ...]]:
    table = []
    for size, (ours, off) in steps.items():
        saved = [(b - a) / num_gates for a, b in zip(ours, off, strict=True)]
        table.append(
            (
                str(size),
                *(shown_quartiles(each, 0) for each in (ours, off)),
                f"{statistics.median(off) / statistics.median(ours):.3f}",
                shown_quartiles(saved, 2),
            )
        )
    return table


def routing_rows(spans: dict[int, list[list[float]]]) -> list[tuple[str, ...]]:
    return [
        (
            str(size),
            *(shown_quartiles(each, 2) for each in (ours, off)),
            f"{statistics.median(off) - statistics.median(ours):.2f}",
        )
        for size, (ours, off) in spans.items()
        if ours and off
    ]


def write(
    folder: Path,
    where: dict[str, str],
    config: dict[str, Any],
    servers: Sequence[Server],
    steps: dict[int, list[list[float]]],
    spans: dict[int, list[list[float]]],
) -> str:
    """The report so far; its text."""
    num_gates = config["num_hidden_layers"] - config["first_k_dense_replace"]
    backends = [server.backend for server in servers]
    policy = [line for line in servers[0].log.read_text().splitlines() if "Router GEMM" in line]
    num_rounds = len(next(iter(steps.values()))[0])
    headers = ["batch", *(f"{name}, µs" for name in backends)]
    table = partial(tabulate, tablefmt="github", disable_numparse=True)
    profiled = [
        "From the end of the norm ahead of a gate to the end of the top-k behind it, in a "
        f"profile of {PROFILED_STEPS} steps, median and quartiles of the layers:",
        table(routing_rows(spans), [*headers, "saved, µs"]),
    ]
    text = "\n\n".join(
        [
            "# Decode step time of SGLang's server on a DeepSeek-V3-shaped model",
            "\n".join(f"- {name}: {value}" for name, value in where.items()),
            f"{num_gates} MoE layers of {config['n_routed_experts']} experts, hidden "
            f"{config['hidden_size']}, moe_intermediate_size "
            f"{config['moe_intermediate_size']}; `--load-format dummy`. Two servers on one GPU, "
            f"which took turns; median and quartiles of {num_rounds} rounds, {STEPS} steps "
            "each.",
            f"```\n{servers[0].shown_command}\n```",
            table(rows(steps, num_gates), [*headers, "ratio", "saved per gate, µs"]),
            *(profiled if spans else []),
            *(["```\n" + "\n".join(policy) + "\n```"] if policy else []),
        ]
    )
    (folder / "dsv3_decode.md").write_text(text + "\n")
    results = {
        "environment": where,
        "config": config,
        "command": servers[0].shown_command,
        "backends": backends,
        "step_us": steps,
        "routing_us": spans,
        "log_lines": policy,
    }
    (folder / "dsv3_decode.json").write_text(json.dumps(results, indent=1))
    return text


def main() -> int:
    parser = argument_parser(__doc__, backend="auto", num_layers=20)
    parser.add_argument("--moe-intermediate-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parse_arguments(parser)
    config = deepseek_v3_config(arguments.num_layers)
    config["moe_intermediate_size"] = arguments.moe_intermediate_size
    extra = [*graph_options(BATCH_SIZES), *arguments.server_options]
    backends = (arguments.backend, "off")
    with side_by_side(config, backends, arguments.output_dir, arguments.port, extra) as servers:
        where = environment()
        save = partial(write, arguments.output_dir, where, config, servers)
        for steps in measure(servers, arguments.rounds):
            text = save(steps, {})
        text = save(steps, profile(servers))
        log = servers[0].log.read_text()
    print(text)
    return int(arguments.backend != "off" and not patch_taken(log))


if __name__ == "__main__":
    raise SystemExit(main())
