"""Router kernels in a torch profile of SGLang's server, for the run_dsv3_*.py beside this."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import requests
from dsv3_server import Server, prompts

PROFILED_STEPS = 8
ROUTER_KERNEL = re.compile(r"[\w:]*(router_gemm|tiny_\w*gemm|RouterGemm|TinyGemm)\w*")
NORM_KERNEL, TOP_K_KERNEL = re.compile("norm", re.IGNORECASE), re.compile("topk", re.IGNORECASE)
MOST_BETWEEN = 3


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of one file that PyTorch's profiler wrote."""
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events


def profiled_events(
    server: Server, folder: Path, traces: str = "*.gz", batch_size: int = 1
) -> list[dict[str, Any]]:
    """The profile of a few steps while a batch decodes from CUDA graphs.

    Args:
        traces: the files to read; each rank writes one. No events where none is written.
    """
    folder.mkdir(parents=True)
    requests.post(
        f"{server.url}/start_profile",
        json={
            "output_dir": str(folder),
            "num_steps": PROFILED_STEPS,
            "activities": ["CPU", "GPU"],
            "with_stack": False,  # Python's frames would be most of the file
        },
        timeout=60,
    )
    server.generate(prompts(batch_size, seed=99), 4 * PROFILED_STEPS)
    for _ in range(60):
        with suppress(EOFError, ValueError, gzip.BadGzipFile):  # still being written
            events = [
                event
                for path in folder.rglob(traces)
                if path.stat().st_size
                for event in read_trace(path)
            ]
            if events:
                return events
        time.sleep(1)
    return []


@dataclass
class Gate:
    """One launch of a gate's kernel, between its neighbours on the same stream."""

    layer: int
    kernel: str
    us: float
    overlap_us: float
    """How long it ran while the kernel before still did."""
    stream: int
    before: str
    after: str


def short_name(kernel: str) -> str:
    """A C++ kernel's name without its result, template arguments and parameters."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0][:60]


def routing_us(events: Sequence[dict[str, Any]]) -> list[float]:
    """Of each MoE layer, from the end of the norm ahead of its gate to the end of its top-k.

    What a gate is worth: kernels overlap, so one that starts early is not a slow one. Of a
    trace of one generation only the second half is taken, for a prefill comes first.
    """
    spans = []
    for kernels in by_stream(events).values():
        for index, top_k in enumerate(kernels):
            if TOP_K_KERNEL.search(top_k["name"]):
                # The gate lies between, and with cuBLAS the sum of its parts.
                before = reversed(kernels[max(index - MOST_BETWEEN - 1, 0) : index])
                if norm := next(
                    (each for each in before if NORM_KERNEL.search(each["name"])), None
                ):
                    spans.append((top_k["ts"], _end(top_k) - _end(norm)))
    return [us for _, us in sorted(spans)][len(spans) // 2 :]


def by_stream(events: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The kernels of each stream, in the order in which they started."""
    streams: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") == "kernel":
            streams[event["args"]["stream"]].append(event)
    return streams


def _end(kernel: dict[str, Any]) -> float:
    return float(kernel["ts"] + kernel["dur"])


def last_step(events: Sequence[dict[str, Any]], num_gates: int, first_layer: int) -> list[Gate]:
    """The gates of the last step of a trace that has all of them; none where no step has."""
    nothing = {"name": "", "ts": float("-inf"), "dur": 0.0}
    launches = []
    for kernels in by_stream(events).values():
        row = [nothing, *kernels, nothing]
        neighbours = zip(row, row[1:], row[2:], strict=False)
        launches += [each for each in neighbours if ROUTER_KERNEL.search(each[1]["name"])]
    launches.sort(key=lambda launch: launch[1]["ts"])
    full = len(launches) - len(launches) % num_gates
    return [
        Gate(
            first_layer + index,
            short_name(gate["name"]),
            gate["dur"],
            max(0.0, _end(before) - gate["ts"]),
            gate["args"]["stream"],
            short_name(before["name"]),
            short_name(after["name"]),
        )
        for index, (before, gate, after) in enumerate(launches[max(full - num_gates, 0) : full])
    ]
