"""What a call of SGLang's gate costs the host, with the plugin and without, eagerly.

    python3 benchmark_gate_host_time.py
    python3 benchmark_gate_host_time.py --save-path results

Two gates with one weight take turns: SGLang's `MoEGate` as the plugin hooks it, and the same
with the release's own `forward`. A sample is one call by the host's clock, 58 in a row as in the
layers of a forward, without waiting for the GPU. No CUDA graph: this is what prefill, batches
beyond the captured sizes and `--disable-cuda-graph` pay, once for each MoE layer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from router_gemm_benchmark import how_to_call

NUM_TOKENS = (1, 2, 4, 8, 16, 17, 24, 32, 64, 96, 128, 129, 200, 2000)
FORWARDS, WARM_UP = 20, 3


def measure(num_tokens: Sequence[int], forwards: int) -> dict[str, Any]:
    """Median microseconds of the host by M, of both gates.

    Raises:
        RuntimeError: a gate's logits are wrong.
    """
    import torch
    from router_gemm_benchmark import providers  # noqa: F401  makes the in-tree modules importable
    from router_gemm_benchmark.accuracy import reference
    from router_gemm_benchmark.report import versions
    from router_gemm_benchmark.timing import quartiles

    from sglang_router_gemm.check import sglang_gate
    from sglang_router_gemm.routing import relative_error

    device = torch.device("cuda", 0)
    gate = sglang_gate(device)
    hooked = type(gate)
    own = sglang_gate(device)
    own.weight = gate.weight
    own.__class__ = type("OwnGate", (hooked,), {"forward": hooked.forward.__wrapped__})
    gates = {"plugin": gate, "sglang": own}
    rows = []
    with torch.no_grad():
        for m in num_tokens:
            hidden_states = torch.randn(
                m, gate.weight.shape[1], dtype=torch.bfloat16, device=device
            )
            expected = reference(hidden_states, gate.weight)
            for name, each in gates.items():
                error = relative_error(each(hidden_states), expected)
                if not error < 1e-5:
                    raise RuntimeError(f"{name} is off by {error:.1e} at M = {m}")
            samples: dict[str, list[float]] = {name: [] for name in gates}
            for forward in range(forwards + WARM_UP):
                # In turn, and the other one first each time.
                for name in sorted(gates, reverse=forward % 2 == 1):
                    us = _host_us(gates[name], hidden_states)
                    if forward >= WARM_UP:
                        samples[name] += us
            row: dict[str, Any] = {"num_tokens": m}
            for name in gates:
                low, middle, high = quartiles(samples[name])
                row |= {f"{name}_us": middle, f"{name}_quartiles_us": [low, high]}
            rows.append(row)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plan": [
            f"M {tokens} {name or 'SGLang'}" for tokens, name in gate.router_plan.decision.ranges()
        ],
        "forwards": forwards,
        "rows": rows,
    }


def _host_us(gate: Callable[..., Any], hidden_states: Any) -> list[float]:
    """The calls of one forward, `LINKS` layers; nobody waits for the GPU in between."""
    import torch
    from router_gemm_benchmark.timing import LINKS

    torch.cuda.synchronize()
    us = []
    for _ in range(LINKS):
        started = time.perf_counter_ns()
        gate(hidden_states)
        us.append((time.perf_counter_ns() - started) / 1e3)
    return us


def table(results: dict[str, Any]) -> str:
    from tabulate import tabulate

    rows = [
        (
            row["num_tokens"],
            f"{row['plugin_us']:.1f}",
            f"{row['sglang_us']:.1f}",
            f"{row['plugin_us'] - row['sglang_us']:+.1f}",
        )
        for row in results["rows"]
    ]
    headers = ("M", "plugin, µs", "SGLang's own, µs", "difference")
    return tabulate(rows, headers, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-tokens", type=int, nargs="+", default=NUM_TOKENS, metavar="M")
    parser.add_argument("--forwards", type=int, default=FORWARDS, help="default: %(default)s")
    parser.add_argument("--save-path", type=Path, metavar="DIR", help="write JSON there")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("This needs a CUDA device.", file=sys.stderr)
        return 1
    results = measure(arguments.num_tokens, arguments.forwards)
    if arguments.save_path is not None:
        arguments.save_path.mkdir(parents=True, exist_ok=True)
        release = results["versions"]["sglang"]
        path = arguments.save_path / f"gate_host_time_sglang_{release}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{results['gpu']}, SGLang {results['versions']['sglang']}, {', '.join(results['plan'])}")
    print(table(results))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(how_to_call(error))
