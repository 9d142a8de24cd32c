"""SGLang's real server on a DeepSeek-V3-shaped model, with and without the patch.

    python3 benchmark/server/run_dsv3_server.py --output-dir results

Needs a Hopper or Blackwell GPU, SGLang and this package, no model files: the model has
DeepSeek-V3's full router width (hidden 7168, 256 experts in 8 groups, top 8 of 4 groups,
sigmoid and bias), few layers, narrow experts, and the weights of `--load-format dummy`.

It launches the server four times: with CUDA graphs, once with the backend and once with
`off`, to serve requests at several concurrencies; and twice more with SGLang's tensor
dump, which needs graphs off, to compare router logits and chosen experts. It writes
`dsv3_server.json` and `dsv3_server.md`, and exits with 1 where a request failed or the
patch was not taken.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import torch
from dsv3_server import (
    Server,
    argument_parser,
    deepseek_v3_config,
    environment,
    graph_options,
    parse_arguments,
    prompts,
    running,
)
from dsv3_trace import PROFILED_STEPS, ROUTER_KERNEL, profiled_events
from tabulate import tabulate

from sglang_router_gemm.routing import agreement, grouped_topk, relative_error

CONCURRENCIES = (1, 8, 16)
REQUESTS_PER_CLIENT = 4
NEW_TOKENS = 32
CAPTURED_BATCH_SIZES = range(1, 17)


@dataclass
class Serving:
    """What one server with CUDA graphs did."""

    backend: str
    startup_s: float
    log_lines: list[str]
    kernels_in_replays: dict[str, int]
    outputs: dict[int, list[list[int]]]
    seconds: dict[int, float]


def generate(server: Server, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    [tokens] = server.generate([prompt], new_tokens)
    return tokens


def serve(server: Server, backend: str, profile_dir: Path) -> Serving:
    startup = server.wait()
    outputs, seconds = {}, {}
    for concurrency in CONCURRENCIES:
        batch = prompts(concurrency * REQUESTS_PER_CLIENT, seed=concurrency)
        started = time.monotonic()
        with ThreadPoolExecutor(concurrency) as pool:
            outputs[concurrency] = list(pool.map(partial(generate, server), batch))
        seconds[concurrency] = time.monotonic() - started
    kernels = profiled_router_kernels(server, profile_dir)
    interesting = re.compile(r"Router GEMM|CUDA graph (begin|end)|ready to roll")
    lines = [line for line in server.log.read_text().splitlines() if interesting.search(line)]
    return Serving(backend, startup, lines, kernels, outputs, seconds)


def profiled_router_kernels(server: Server, folder: Path) -> dict[str, int]:
    """Launches of router kernels on the GPU in the profiled steps."""
    kernels = [each for each in profiled_events(server, folder) if each.get("cat") == "kernel"]
    names = [ROUTER_KERNEL.search(kernel["name"]) for kernel in kernels]
    return dict(Counter(name[0] for name in names if name))


def dump(server: Server, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Gate logits and chosen experts of each forward pass, graphs off, one request at a time.

    Prompts of 1 to 16 tokens make prefills with M = 1 to 16; decode steps have M = 1.
    """
    server.wait()
    for length in CAPTURED_BATCH_SIZES:
        generate(server, prompts(1, seed=length, lengths=range(length, length + 1))[0], 4)
    time.sleep(2)
    files = sorted(folder.rglob("Pass*.pt"))
    passes = []
    for path in files:
        tensors = torch.load(path, weights_only=True)
        passes.append({name: value for name, value in tensors.items() if ".mlp." in name})
    return passes


@dataclass
class LayerComparison:
    """Router logits and chosen experts of one layer, backend against `off`."""

    layer: str
    rows: int
    relative_difference: float
    same_experts: float | None
    same_experts_by_logits: float


def compare_dumps(
    ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]
) -> list[LayerComparison]:
    names = sorted({name for tensors in ours for name in tensors if name.endswith(".mlp.gate")})
    comparisons = []
    for name in names:
        pairs = [
            (a, b)
            for a, b in zip(ours, theirs, strict=False)
            if name in a and name in b and a[name].shape == b[name].shape
        ]
        logits = [torch.cat([pair[side][name].double() for pair in pairs]) for side in (0, 1)]
        topk = name.replace(".gate", ".topk")
        chosen = None
        if all(topk in tensors for pair in pairs for tensors in pair):
            ids = [
                torch.cat([pair[side][topk][1].sort(-1).values for pair in pairs])
                for side in (0, 1)
            ]
            chosen = agreement(*ids)
        comparisons.append(
            LayerComparison(
                name,
                len(logits[0]),
                relative_error(*logits),
                chosen,
                agreement(grouped_topk(logits[0]), grouped_topk(logits[1])),
            )
        )
    return comparisons


def report(
    where: dict[str, str],
    command: str,
    config: dict[str, Any],
    servings: list[Serving],
    layers: list[LayerComparison],
) -> str:
    ours, off = servings
    serving_rows = [
        (
            concurrency,
            len(outputs),
            sum(map(len, outputs)),
            f"{serving.seconds[concurrency]:.2f}",
            serving.backend,
            f"{sum(a == b for a, b in zip(outputs, off.outputs[concurrency], strict=True))}"
            f" of {len(outputs)}",
        )
        for concurrency in CONCURRENCIES
        for serving in servings
        for outputs in [serving.outputs[concurrency]]
    ]
    layer_rows = [
        (
            layer.layer,
            layer.rows,
            f"{layer.relative_difference:.1e}",
            "-" if layer.same_experts is None else f"{layer.same_experts:.2%}",
            f"{layer.same_experts_by_logits:.2%}",
        )
        for layer in layers
    ]
    parts = ["# SGLang's server on a DeepSeek-V3-shaped model"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in where.items()))
    shape = ("num_hidden_layers", "first_k_dense_replace", "moe_intermediate_size")
    parts.append(
        f"Model: hidden {config['hidden_size']}, {config['n_routed_experts']} experts in 8 groups, "
        "top 8 of 4 groups, sigmoid and bias; "
        + ", ".join(f"{name} {config[name]}" for name in shape)
        + "; `--load-format dummy`."
    )
    parts.append(f"Command, with `SGLANG_ROUTER_GEMM_BACKEND={ours.backend}`, then `off`:")
    parts.append(f"```\n{command}\n```")
    parts.append("## Served over HTTP, CUDA graphs on")
    headers = ["concurrency", "requests", "tokens", "seconds", "backend", "same tokens as off"]
    parts.append(tabulate(serving_rows, headers, tablefmt="github", disable_numparse=True))
    for serving in servings:
        parts.append(f"## Log, backend {serving.backend} (up after {serving.startup_s:.0f} s)")
        parts.append("```\n" + "\n".join(serving.log_lines) + "\n```")
        parts.append(
            f"Router kernels in {PROFILED_STEPS} profiled steps: "
            + (
                "; ".join(
                    f"{count} of `{name}`" for name, count in serving.kernels_in_replays.items()
                )
                or "no trace was written"
            )
        )
    parts.append(f"## Router logits and experts, backend {ours.backend} against off")
    parts.append(
        "From SGLang's tensor dump, CUDA graphs off: prompts of 1 to 16 tokens, 4 new tokens "
        "each. Rows count tokens. `experts` is what SGLang's top-k chose; with dummy weights "
        "the correction bias decides most of it, so `experts by logits` leaves the bias out. "
        "From the second MoE layer on, the inputs differ too."
    )
    headers = ["gate", "rows", "relative difference", "same experts", "same experts by logits"]
    parts.append(tabulate(layer_rows, headers, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argument_parser(__doc__, backend="flashinfer", num_layers=5)
    arguments = parse_arguments(parser)
    config = deepseek_v3_config(arguments.num_layers)
    graphs = [*graph_options(CAPTURED_BATCH_SIZES), *arguments.server_options]
    servings, dumps, command = [], [], ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for backend in (arguments.backend, "off"):
            log = arguments.output_dir / f"server_{backend}.log"
            with running(folder, log, arguments.port, backend, graphs) as server:
                servings.append(serve(server, backend, folder / f"profile_{backend}"))
                command = server.shown_command
            print(f"{backend}: served, up after {servings[-1].startup_s:.0f} s", flush=True)
        for backend in (arguments.backend, "off"):
            log = arguments.output_dir / f"dump_{backend}.log"
            target = folder / f"dump_{backend}"
            extra = ["--debug-tensor-dump-output-folder", str(target), *arguments.server_options]
            with running(folder, log, arguments.port, backend, extra) as server:
                dumps.append(dump(server, target))
            print(f"{backend}: dumped {len(dumps[-1])} passes", flush=True)
    layers = compare_dumps(*dumps)
    where = environment()
    text = report(where, command, config, servings, layers)
    (arguments.output_dir / "dsv3_server.md").write_text(text)
    (arguments.output_dir / "dsv3_server.json").write_text(
        json.dumps(
            {
                "environment": where,
                "config": config,
                "servings": [asdict(serving) for serving in servings],
                "layers": [asdict(layer) for layer in layers],
            },
            indent=1,
        )
    )
    print(text)
    taken = re.compile(rf"M 1-\d+ {arguments.backend}\b")
    return int(not any(map(taken.search, servings[0].log_lines)))


if __name__ == "__main__":
    sys.exit(main())
