"""SGLang's real server on several GPUs of one host, at DeepSeek-V3's widths.

    python3 benchmark/server/run_dsv3_ranks.py --tp 2 --output-dir results

Needs that many Hopper or Blackwell GPUs, nvcc, SGLang and this package, no model files: 128
heads, MoE intermediate size 2048, FP8 weights in blocks (bf16 with `--dtype bf16`), dummy, as
many layers as fit or `--num-layers` says; 61 layers on eight H200 are DeepSeek-V3 as it is.

1. Starts with an empty JIT cache: how long, how often nvcc compiled our kernel, and what each
   rank says that it takes.
2. Starts again, with that cache: nvcc must not run for it.
3. Serves the same prompts with the backend, with `off`, and with that `off` again: same tokens.
4. Dumps what gates and top-k give with CUDA graphs off: on all ranks it must have the same bits.
   `--bits-only` does this alone.

Writes `dsv3_ranks.json` and `dsv3_ranks.md`; exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _setup  # noqa: F401
import torch
from dsv3_server import (
    Server,
    argument_parser,
    environment,
    full_width_config,
    graph_options,
    parse_arguments,
    prompts,
    running,
)
from router_gemm_benchmark.timing import DEEPSEEK_V3_LAYERS
from tabulate import tabulate

from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.cluster_router_gemm import SOURCE
from sglang.srt.layers.moe_router.kernel import device_sm

# Of the GPUs' memory: what the weights may take, and what they and the KV cache take together.
WEIGHTS_SHARE, STATIC_SHARE = 0.75, 0.85
PROMPTS, NEW_TOKENS = 32, 32
DUMPED_PROMPTS = range(1, 17)


def layers_that_fit(memory: int, dtype: str) -> int:
    """How many of DeepSeek-V3's layers have their weights in `WEIGHTS_SHARE` of `memory` bytes."""
    config = SimpleNamespace(**full_width_config(DEEPSEEK_V3_LAYERS, dtype))
    query_key = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = config.hidden_size * (
        config.q_lora_rank
        + config.kv_lora_rank
        + config.qk_rope_head_dim
        + config.num_attention_heads * config.v_head_dim
    ) + config.num_attention_heads * (
        config.q_lora_rank * query_key
        + config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    )
    experts = config.n_routed_experts + config.n_shared_experts
    dense = attention + 3 * config.hidden_size * config.intermediate_size
    sparse = attention + 3 * config.hidden_size * config.moe_intermediate_size * experts
    budget = WEIGHTS_SHARE * memory / (1 if dtype == "fp8" else 2)
    num_dense = config.first_k_dense_replace
    fit = num_dense + int((budget - num_dense * dense) // sparse)
    return max(num_dense + 1, min(fit, DEEPSEEK_V3_LAYERS))


def counted_nvcc(folder: Path, sm: int) -> tuple[dict[str, str], Path]:
    """A CUDA_HOME whose nvcc writes down each call and then is the one for `sm`."""
    real = jit.find_nvcc(sm).resolve()
    calls = folder / "nvcc_calls.txt"
    calls.touch()
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    for each in real.parents[1].iterdir():
        if each.name != "bin":
            (home / each.name).symlink_to(each)
    for each in real.parent.iterdir():
        if each.name != "nvcc":
            (home / "bin" / each.name).symlink_to(each)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {real} "$@"\n')
    nvcc.chmod(0o755)
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    return {"CUDA_HOME": str(home), "PATH": path}, calls


def builds(calls: Path) -> int:
    """How often nvcc compiled our kernel, so far."""
    return sum(SOURCE.name in line for line in calls.read_text().splitlines())


def policy_lines(server: Server) -> list[str]:
    """What each rank says that it takes, without the time."""
    said = re.findall(r"Router GEMM \[[^\n]*", server.log.read_text())
    return [line for line in said if "backend" in line]


DUMPED = {"gate": "logits", "topk": "weights and ids"}  # of an MoE layer's parts

Dumped = dict[str, tuple[torch.Tensor, ...]]


def dumped(folder: Path) -> dict[str, list[Dumped]]:
    """By rank, what each part of `DUMPED` gave in each forward pass."""
    ranks = {}
    for rank in sorted(path for path in folder.iterdir() if path.is_dir()):
        ranks[rank.name.split("_")[0]] = [
            {
                name: (given,) if isinstance(given, torch.Tensor) else tuple(given[:2])
                for name, given in torch.load(path, weights_only=True).items()
                if name.endswith(tuple(f".mlp.{part}" for part in DUMPED))
            }
            for path in sorted(rank.glob("Pass*.pt"))
        ]
    return ranks


def same_bits(ranks: Mapping[str, list[Dumped]]) -> dict[str, tuple[int, int]]:
    """By part, tensors of the other ranks that are the first one's to the bit, of all."""
    first, *others = ranks.values()
    found = {}
    for part in DUMPED:
        calls = [
            (given, [other[index][name] for other in others])
            for index, by_name in enumerate(first)
            for name, given in by_name.items()
            if name.endswith(part)
        ]
        # As bytes: a NaN is the same as itself.
        same = sum(
            torch.equal(*(each.contiguous().view(torch.uint8) for each in pair))
            for given, theirs in calls
            for other in theirs
            for pair in zip(given, other, strict=True)
        )
        found[part] = same, sum(len(given) * len(theirs) for given, theirs in calls)
    return found


def main() -> int:
    parser = argument_parser(__doc__, backend="cluster", num_layers=None)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--bits-only", action="store_true", help="step 4 alone")
    arguments = parse_arguments(parser)
    if torch.cuda.device_count() < arguments.tp:
        parser.error(f"--tp {arguments.tp}: there are {torch.cuda.device_count()} CUDA devices")
    memory = sum(
        torch.cuda.get_device_properties(rank).total_memory for rank in range(arguments.tp)
    )
    num_layers = arguments.num_layers or layers_that_fit(memory, arguments.dtype)
    batch = prompts(PROMPTS, seed=0)
    extra = ["--tp", str(arguments.tp), "--mem-fraction-static", str(STATIC_SHARE)]
    extra += arguments.server_options
    graphs = [*extra, *graph_options((1, 8, 16, PROMPTS))]
    starts: list[tuple[Any, ...]] = []
    tokens: list[list[list[int]]] = []
    said: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(
            json.dumps(full_width_config(num_layers, arguments.dtype))
        )
        sm = device_sm(torch.device("cuda", 0))
        assert sm is not None
        variables, calls = counted_nvcc(folder, sm)
        cache = folder / "tvm_ffi"
        cache.mkdir(mode=0o700)
        variables["TVM_FFI_CACHE_DIR"] = str(cache)

        def server(name: str, backend: str, options: list[str]) -> Any:
            log = arguments.output_dir / f"ranks_{name}.log"
            return running(model, log, arguments.port, backend, options, variables)

        runs = [("cold", arguments.backend), ("warm", arguments.backend), ("off", "off")]
        if arguments.bits_only:
            runs = []
        command = ""
        for name, backend in runs:
            before = builds(calls)
            with server(name, backend, graphs) as up:
                seconds = up.wait()
                tokens += [up.generate(batch, NEW_TOKENS) for _ in range(1 + (backend == "off"))]
                starts.append((name, backend, f"{seconds:.0f}", builds(calls) - before))
                said += policy_lines(up)
                command = command or up.shown_command
            print(*starts[-1], flush=True)
        dump = folder / "dump"
        options = [*extra, "--debug-tensor-dump-output-folder", str(dump)]
        with server("dump", arguments.backend, options) as up:
            up.wait()
            for length in DUMPED_PROMPTS:
                up.generate(prompts(1, seed=length, lengths=range(length, length + 1)), 4)
            said += policy_lines(up)
            command = command or up.shown_command.replace(str(dump), "DUMP")
        ranks = dumped(dump)
        bits = same_bits(ranks)
        shutil.rmtree(dump)
    alike = {}
    if runs:
        _, ours, off, again = tokens
        alike[f"{arguments.backend} and off"] = sum(map(list.__eq__, ours, off))
        alike["off and off"] = sum(map(list.__eq__, off, again))
    where = environment()
    headers = ("start", "backend", "up after, s", "our kernel compiled")
    text = "\n\n".join(
        [
            "# SGLang's server on several GPUs, DeepSeek-V3's widths",
            "\n".join(f"- {name}: {value}" for name, value in where.items()),
            f"{num_layers} layers, {arguments.dtype}, `--load-format dummy`.",
            f"```\n{command}\n```",
            *([tabulate(starts, headers, "github", disable_numparse=True)] if runs else []),
            "```\n" + "\n".join(said) + "\n```",
            *(f"The same tokens, of {PROMPTS} requests: {name} {n}." for name, n in alike.items()),
            f"The same bits on all of {', '.join(ranks)}: "
            + "; ".join(
                f"{same} of {count} tensors of {DUMPED[part]}"
                for part, (same, count) in bits.items()
            )
            + ".",
        ]
    )
    (arguments.output_dir / "dsv3_ranks.md").write_text(text + "\n")
    results = {
        "environment": where,
        "command": command,
        "starts": starts,
        "log_lines": said,
        "alike": alike,
        "same_bits": bits,
    }
    (arguments.output_dir / "dsv3_ranks.json").write_text(json.dumps(results, indent=1))
    print(text)
    compiled = [start[-1] for start in starts[:2]]
    one_path = len({line for line in said if f"backend {arguments.backend}" in line}) == 1
    all_same = all(0 < count == same for same, count in bits.values())
    holds = (not runs or compiled == [1, 0]) and one_path and all_same
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
