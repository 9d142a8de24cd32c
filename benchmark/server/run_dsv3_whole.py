"""DeepSeek-V3 as it is, on eight GPUs: decode step time, throughput and a profile.

    python3 benchmark/server/run_dsv3_whole.py --output-dir results

Needs one host with eight H200 (1.1 TB of GPU memory), SGLang and this package, no model files:
the model is DeepSeek-V3's own config.json with dummy weights, `--tp 8` and CUDA graphs. `--small
--tp 1 --num-layers 20 --dtype bf16` tries the script on one GPU, which is not the model.

Two such servers do not fit side by side, so the one with the backend and the one with `off`
alternate: `--starts` of each. A start's step time at a batch size, taken as run_dsv3_decode.py
does, is the median of a few; the table has the median and quartiles of the starts, beside what
`chain` of the benchmark's JSON (`--chain`) promises for as many gates. The first start of each
is also served by `sglang.bench_serving` and profiled, batch 1, for what runs before and after
the gates and how far they overlap the kernel before.

Writes `dsv3_whole.json` and `dsv3_whole.md` after each start, so that a run that is cut short is
not lost, and at the end the plots `dsv3_whole_step` and `dsv3_whole_saving`, for which it needs
matplotlib: PNG, with `--svg` SVG too. `--report-only` does that again elsewhere, from the JSON.
Exits with 1 where the patch was not taken.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from operator import sub
from pathlib import Path
from typing import Any

import _setup
import torch
from dsv3_server import (
    Server,
    argument_parser,
    deepseek_v3_config,
    environment,
    full_width_config,
    graph_options,
    parse_arguments,
    patch_taken,
    prompts,
    quantization,
    running,
)
from dsv3_trace import last_step, profiled_events
from router_gemm_benchmark.plots import save_plot
from router_gemm_benchmark.providers import CUBLAS
from router_gemm_benchmark.report import medians
from router_gemm_benchmark.timing import CHAIN, DEEPSEEK_V3_LAYERS, quartiles
from run_dsv3_decode import PROMPT_TOKENS, rows, shown_quartiles, step_us
from tabulate import tabulate
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

BENCHMARKS = _setup.BENCHMARK / "results"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MEASUREMENTS, STEPS = 3, 128  # of each batch size in a start; of a measurement
CONCURRENCIES = (1, 8, 64)
INPUT_TOKENS, OUTPUT_TOKENS = 256, 128
SERVING_TIMEOUT_S = 1200
SERVED = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_itl_ms": "ITL, ms",
    "p99_itl_ms": "p99 ITL, ms",
    "median_tpot_ms": "TPOT, ms",
}
# Providers of the benchmark: ours, and what SGLang runs beyond the M of its own kernel.
CHAIN_OURS, CHAIN_BEYOND = "ours: cluster", CUBLAS

Results = dict[str, Any]


def whole_config(num_layers: int, dtype: str) -> dict[str, Any]:
    """config.json as DeepSeek-V3 has it, but for the number of layers."""
    return full_width_config(num_layers, dtype) | {
        "vocab_size": 129280,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    }


def small_config(num_layers: int, dtype: str) -> dict[str, Any]:
    """The widths of run_dsv3_decode.py."""
    narrow = {"moe_intermediate_size": 128}
    return deepseek_v3_config(num_layers) | narrow | quantization(dtype)


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for each token; text that is not of such words is all token 0.

    bench_serving takes the time between tokens from pieces of text, and a server without a
    tokenizer sends none.
    """
    words = {f"t{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]


def promised_us(chain: Results, off: str, num_gates: int) -> dict[int, float]:
    """µs that a step saves by the benchmark's `chain`, for each batch size that it has."""
    by_num_tokens = medians(chain, CHAIN.name)
    promised = {}
    for size in BATCH_SIZES:
        row = by_num_tokens.get(size, {})
        theirs = row.get(off, row.get(CHAIN_BEYOND))
        if theirs is not None and CHAIN_OURS in row:
            promised[size] = num_gates * (theirs - row[CHAIN_OURS])
    return promised


def start_steps(server: Server) -> dict[int, float]:
    """Microseconds of a decode step by batch size, in one start."""
    steps = {}
    for size in BATCH_SIZES:
        batch = prompts(size, seed=size, lengths=range(PROMPT_TOKENS, PROMPT_TOKENS + 1))
        step_us(server, batch, STEPS)  # warms up
        steps[size] = statistics.median(step_us(server, batch, STEPS) for _ in range(MEASUREMENTS))
    return steps


def num_prompts(concurrency: int) -> int:
    return max(8, 4 * concurrency)


def serving_command(port: int, model: Path, concurrency: int, output: Path) -> list[str]:
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--tokenizer", str(model)]
    command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1"]
    command += ["--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)]
    command += ["--num-prompts", str(num_prompts(concurrency)), "--disable-tqdm"]
    return [*command, "--max-concurrency", str(concurrency), "--output-file", str(output)]


def served(line: str, requests: int) -> dict[str, float]:
    """What is kept of one line of bench_serving's output file."""
    result = json.loads(line)
    return {name: result[name] for name in SERVED} | {"failed": requests - result["completed"]}


def serve(
    port: int, model: Path, folder: Path, logs: Path, backend: str
) -> dict[int, dict[str, float]]:
    """By concurrency; only `failed` where bench_serving itself did, which ends no run."""
    found = {}
    for concurrency in CONCURRENCIES:
        count = num_prompts(concurrency)
        output = folder / f"served_{backend}_{concurrency}.jsonl"
        command = serving_command(port, model, concurrency, output)
        log = logs / f"whole_serving_{backend}_{concurrency}.log"
        with log.open("w") as file, suppress(subprocess.SubprocessError):
            subprocess.run(command, stdout=file, stderr=file, timeout=SERVING_TIMEOUT_S, check=True)
        lines = output.read_text().splitlines() if output.exists() else []
        found[concurrency] = served(lines[-1], count) if lines else {"failed": count}
    return found


def profile_row(backend: str, gates: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = [
        ", ".join(f"{count} `{name}`" for name, count in Counter(names).most_common())
        for names in ([gate[key] for gate in gates] for key in ("kernel", "before", "after"))
    ]
    medians = [
        f"{statistics.median(gate[key] for gate in gates):.2f}" if gates else ""
        for key in ("us", "overlap_us")
    ]
    overlapping = sum(gate["overlap_us"] > 0 for gate in gates)
    return [backend, counts[0], *medians, f"{overlapping} of {len(gates)}", *counts[1:]]


def paired(results: Results) -> dict[int, list[list[float]]]:
    """Step times by batch size, of the starts that have both backends."""
    steps = {}
    for size, both in results["step_us"].items():
        count = min(map(len, both))
        if count:
            steps[int(size)] = [each[:count] for each in both]
    return steps


def savings(pair: Sequence[Sequence[float]]) -> list[float]:
    """Of each pair of starts, how much less the step takes with the backend."""
    return [off - ours for ours, off in zip(*pair, strict=True)]


def step_table(results: Results) -> str:
    steps = paired(results)
    table = []
    for row, (size, pair) in zip(rows(steps, results["num_gates"]), steps.items(), strict=True):
        promised = results["chain"]["promised_us"].get(str(size))
        saved = shown_quartiles(savings(pair), 0)
        table.append((*row, saved, "" if promised is None else f"{promised:.0f}"))
    times = [f"{backend}, µs" for backend in results["backends"]]
    saving = ["saved per gate, µs", "saved per step, µs", "`chain` promises, µs"]
    headers = ["batch", *times, "ratio", *saving]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def report(results: Results) -> str:
    """The text, from what the JSON file holds."""
    config, chain = results["config"], results["chain"]
    count = min(map(len, results["up_after_s"]))
    parts = [
        "# DeepSeek-V3 on SGLang's server" + (", small: a trial" if results["small"] else ""),
        "\n".join(f"- {name}: {value}" for name, value in results["environment"].items()),
        f"{config['num_hidden_layers']} layers, {results['num_gates']} of them with a gate, "
        f"{results['dtype']}, `--load-format dummy`.",
        f"```\n{results['command']}\n```",
        "## Decode step time",
        f"Median and quartiles of {count} starts of each, which alternated; of each start the "
        f"median of {MEASUREMENTS} times {STEPS} steps. `chain` is of the benchmark, "
        f"{chain['gpu']}: {chain['off']}, or {CHAIN_BEYOND} where that was not measured, less "
        f"{CHAIN_OURS}, times the gates.",
        step_table(results),
    ]
    if results["serving"]:
        table = [
            (
                *(concurrency, backend),
                *(f"{found[key]:.2f}" if key in found else "" for key in SERVED),
                f"{found['failed']} of {num_prompts(int(concurrency))}",
            )
            for concurrency in map(str, CONCURRENCIES)
            for backend, by_concurrency in results["serving"].items()
            for found in [by_concurrency[concurrency]]
        ]
        headers = ["concurrency", "backend", *SERVED.values(), "failed"]
        parts.append("## `sglang.bench_serving`, one run of each, medians")
        parts.append(f"```\n{results['serving_command']}\n```")
        parts.append(tabulate(table, headers, tablefmt="github", disable_numparse=True))
    if results["profile"]:
        gates_table = [profile_row(backend, gates) for backend, gates in results["profile"].items()]
        headers = ["backend", "gates", "µs", "overlap, µs", "overlapping", "before", "after"]
        parts.append("## The gates of one decode step, batch 1, rank 0")
        parts.append(
            "From a torch profile; medians. `before` and `after` are the neighbours on the same "
            "stream; the overlap is with the one before."
        )
        parts.append(tabulate(gates_table, headers, tablefmt="github", disable_numparse=True))
    for backend, lines in results["log_lines"].items():
        said = "\n".join(f"{count} x {line}" for line, count in lines.items())
        parts.append(f"## Log, backend {backend}\n\n```\n{said}\n```")
    return "\n\n".join(parts) + "\n"


def save(results: Results, folder: Path) -> Results:
    """Writes what is there so far, and returns it as the JSON file has it."""
    path = folder / "dsv3_whole.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    written: Results = json.loads(path.read_text())
    (folder / "dsv3_whole.md").write_text(report(written))
    return written


def save_plots(results: Results, folder: Path, svg: bool = False) -> list[Path]:
    """Step time and saving by batch size, each as PNG, and SVG on request."""
    steps, chain = paired(results), results["chain"]
    times = {
        backend: {size: quartiles(pair[index]) for size, pair in steps.items()}
        for index, backend in enumerate(results["backends"])
    }
    saving = {
        "measured": {size: quartiles(savings(pair)) for size, pair in steps.items()},
        f"promised by chain, {chain['gpu']}": {
            int(size): (us, us, us) for size, us in chain["promised_us"].items()
        },
    }
    where = results["environment"]
    title = f"{where['GPU']}, SGLang {where['sglang']}, {results['num_gates']} gates"
    return [
        *plot(times, f"{title}: decode step", folder / "dsv3_whole_step", svg),
        *plot(saving, f"{title}: saved per decode step", folder / "dsv3_whole_saving", svg),
    ]


def plot(
    series: Mapping[str, Mapping[int, tuple[float, float, float]]],
    title: str,
    path: Path,
    svg: bool,
) -> list[Path]:
    """Medians by batch size, with their quartiles."""

    def add_lines(axes: Any) -> None:
        for (name, points), style in zip(series.items(), ("--s", "-o"), strict=True):
            low, middle, high = zip(*points.values(), strict=True) if points else ((), (), ())
            spread = [list(map(sub, middle, low)), list(map(sub, high, middle))]
            axes.errorbar(
                list(points), middle, spread, fmt=style, markersize=4, capsize=3, label=name
            )

    return save_plot(
        path,
        add_lines,
        title=f"{title}\nmedian and quartiles of the starts",
        labels=("batch size", "µs"),
        ticks=BATCH_SIZES,
        powers_of_two=True,
        svg=svg,
    )


def main() -> int:
    parser = argument_parser(__doc__, backend="auto", num_layers=DEEPSEEK_V3_LAYERS)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--starts", type=int, default=5, help="of each backend")
    parser.add_argument("--chain", type=Path, default=BENCHMARKS / "cluster/h200.json")
    chosen = f"the provider that SGLang runs; {CHAIN_BEYOND} for the M that it lacks"
    parser.add_argument("--chain-off", default="SGLang tiny_gemm", help=chosen)
    parser.add_argument("--startup-timeout", type=int, default=1800, help="seconds")
    parser.add_argument("--small", action="store_true", help="trying it, not the model")
    parser.add_argument("--skip-serving", action="store_true")
    parser.add_argument("--skip-profile", action="store_true")
    parser.add_argument("--svg", action="store_true", help="the plots as SVG, too")
    parser.add_argument("--report-only", action="store_true", help="from the JSON, without a GPU")
    arguments = parser.parse_args()
    if arguments.report_only:
        folder = arguments.output_dir
        results = save(json.loads((folder / "dsv3_whole.json").read_text()), folder)
        save_plots(results, folder, arguments.svg)
        return 0
    arguments = parse_arguments(parser)
    if torch.cuda.device_count() < arguments.tp:
        parser.error(f"--tp {arguments.tp}: there are {torch.cuda.device_count()} CUDA devices")
    make = small_config if arguments.small else whole_config
    config = make(arguments.num_layers, arguments.dtype)
    num_gates = config["num_hidden_layers"] - config["first_k_dense_replace"]
    chain = json.loads(arguments.chain.read_text())
    where = environment()
    backends = [arguments.backend, "off"]
    results = {
        "environment": where | {"GPU": f"{arguments.tp} x {where['GPU']}"},
        "small": arguments.small,
        "dtype": arguments.dtype,
        "config": config,
        "num_gates": num_gates,
        "backends": backends,
        "chain": {
            "gpu": chain["gpu"],
            "off": arguments.chain_off,
            "promised_us": promised_us(chain, arguments.chain_off, num_gates),
        },
        "step_us": {size: [[], []] for size in BATCH_SIZES},
        "up_after_s": [[], []],
        "serving": {},
        "profile": {},
        "log_lines": {},
    }
    extra = ["--tp", str(arguments.tp), "--mem-fraction-static", "0.85"]
    extra += [*graph_options(BATCH_SIZES), *arguments.server_options]
    output, port = arguments.output_dir, arguments.port
    taken = True
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config, indent=2))
        if not arguments.skip_serving:
            save_tokenizer(model, config["vocab_size"])
            shown = serving_command(port, Path("MODEL"), CONCURRENCIES[-1], Path("OUTPUT"))
            results["serving_command"] = " ".join(["python3", *shown[1:]])
        for index in range(2 * arguments.starts):
            which = (index + index // 2) % 2  # neither is always the first of a pair
            backend = backends[which]
            log = output / f"whole_{index}_{backend}.log"
            with running(model, log, port, backend, extra) as server:
                up_after = server.wait(arguments.startup_timeout)
                for size, step in start_steps(server).items():
                    results["step_us"][size][which].append(step)
                results["up_after_s"][which].append(up_after)
                results["command"] = server.shown_command
                said = log.read_text()
                taken &= backend == "off" or patch_taken(said)
                if index < 2:
                    lines = re.findall(r"Router GEMM[^\n]*", said)
                    results["log_lines"][backend] = Counter(lines)
                written = save(results, output)
                if index < 2 and not arguments.skip_profile:
                    events = profiled_events(server, Path(temporary) / backend, "*TP-0*.gz")
                    gates = last_step(events, num_gates, config["first_k_dense_replace"])
                    results["profile"][backend] = list(map(asdict, gates))
                if index < 2 and not arguments.skip_serving:
                    found = serve(port, model, Path(temporary), output, backend)
                    results["serving"][backend] = found
                written = save(results, output)
            print(f"{backend}: up after {up_after:.0f} s", flush=True)
    print(report(written))
    try:
        save_plots(written, output, arguments.svg)
    except ImportError:
        print("No plots: matplotlib is not installed; --report-only draws them elsewhere.")
    return int(not taken)


if __name__ == "__main__":
    sys.exit(main())
