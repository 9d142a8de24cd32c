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
from operator import itemgetter
from pathlib import Path
from typing import Any

import requests
from dsv3_server import Server, prompts

PROFILED_STEPS = 8
ROUTER_KERNEL = re.compile(r"[\w:]*(router_gemm|tiny_\w*gemm|RouterGemm|TinyGemm)\w*")


def profiled_events(server: Server, folder: Path, traces: str = "*.gz") -> list[dict[str, Any]]:
    """The profile of a few steps while one request decodes from CUDA graphs.

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
    server.generate(prompts(1, seed=99), 4 * PROFILED_STEPS)
    for _ in range(60):
        with suppress(EOFError, ValueError, gzip.BadGzipFile):  # still being written
            events = [
                event
                for path in folder.rglob(traces)
                if path.stat().st_size
                for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
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


def last_step(events: Sequence[dict[str, Any]], num_gates: int, first_layer: int) -> list[Gate]:
    """The gates of the last step of a trace that has all of them; none where no step has."""
    streams: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            streams[event["args"]["stream"]].append(event)
    nothing = {"name": "", "ts": float("-inf"), "dur": 0.0}
    launches = []
    for kernels in streams.values():
        row = [nothing, *sorted(kernels, key=itemgetter("ts")), nothing]
        neighbours = zip(row, row[1:], row[2:], strict=False)
        launches += [each for each in neighbours if ROUTER_KERNEL.search(each[1]["name"])]
    launches.sort(key=lambda launch: launch[1]["ts"])
    full = len(launches) - len(launches) % num_gates
    return [
        Gate(
            first_layer + index,
            short_name(gate["name"]),
            gate["dur"],
            max(0.0, before["ts"] + before["dur"] - gate["ts"]),
            gate["args"]["stream"],
            short_name(before["name"]),
            short_name(after["name"]),
        )
        for index, (before, gate, after) in enumerate(launches[max(full - num_gates, 0) : full])
    ]
