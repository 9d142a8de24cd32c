"""What the run_dsv3_*.py do apart from the server: requests, counts, comparisons, tables."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import run_dsv3_decode as decode
import run_dsv3_load as load
import run_dsv3_rank as one_rank
import run_dsv3_ranks as ranks
import run_dsv3_whole as whole
import torch
from dsv3_server import SPREAD, TP8_RANKS, Server, full_width_config, patch_taken, script_call
from dsv3_trace import last_step, routing_us
from matplotlib.axes import Axes
from router_gemm_benchmark.timing import LINKS
from transformers import AutoConfig

from sglang.srt.layers.moe_router.cluster_router_gemm import SOURCE


def test_the_load_has_short_and_long_prompts_and_gives_some_up() -> None:
    requests = load.plan(1000, seed=64)
    lengths = [len(request.prompt) for request in requests]
    assert min(lengths) == 1
    assert sorted(lengths)[500] < 100
    assert 2500 < max(lengths) <= load.LONGEST_PROMPT
    assert {request.new_tokens for request in requests} == set(load.NEW_TOKENS)
    assert 50 < sum(request.aborted for request in requests) < 150
    assert requests == load.plan(1000, seed=64)
    assert sum(load.CLIENTS.values()) == 2000


def test_answers_that_were_given_up_are_not_compared() -> None:
    ours, off = load.Pass("cluster"), load.Pass("off")
    ours.answers = {1: [[1, 2], None, [3]], 4: [[5]]}
    off.answers = {1: [[1, 2], [9], None], 4: [[6]]}
    assert load.alike(ours, off) == (1, 2)


def test_a_failed_request_is_counted_and_the_load_goes_on() -> None:
    nobody_listens = Server.__new__(Server)  # no process
    nobody_listens.url = "http://127.0.0.1:9"
    errors: list[str] = []
    for aborted in (False, True):
        request = load.Request([7] * 12, 4, aborted)
        assert load.send(nobody_listens, errors, request) is None
    assert [error.split(": ")[:2] for error in errors] == [["12 tokens", "ConnectionError"]] * 2


@pytest.mark.parametrize(
    ("memory_mib", "flat"),
    [
        ([100], False),
        ([100, 100], False),
        ([100, 100, 100], True),
        ([100, 1060, 1060, 1060], True),
        ([100, 1060, 1060, 1125], False),
        ([100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1100], False),
    ],
)
def test_an_allocator_that_takes_a_block_is_no_leak(memory_mib: list[int], flat: bool) -> None:
    assert load.is_flat(memory_mib) == flat


def test_a_server_that_leaks_is_not_loaded_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(0, 100_000, 1000))
    monkeypatch.setattr(load, "used_mib", lambda: next(used))
    monkeypatch.setattr(
        load, "load", lambda server, done, clients: done.memory_mib.append(next(used))
    )
    done = load.Pass("auto")
    load.load_until_flat(Server.__new__(Server), done)
    assert len(done.memory_mib) == load.MOST_ROUNDS + 1
    text, results = load.report(
        {}, "", [load.Pass(name) for name in ("off", "auto", "off")], [done]
    )
    assert "10000: still growing" in text
    assert results["errors"] == []


def test_the_saving_of_a_step_is_shared_among_the_gates() -> None:
    steps = {8: [[99.0, 100.0, 101.0, 102.0, 103.0], [118.0, 119.0, 120.0, 121.0, 122.0]]}
    [(batch, ours, off, ratio, saved)] = decode.rows(steps, num_gates=19)
    assert (batch, ours, off) == ("8", "101 (100-102)", "120 (119-121)")
    assert ratio == "1.188"
    assert saved == "1.00 (1.00-1.00)"


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "layers"),
    [(2 * 150, "fp8", 22), (2 * 150, "bf16", 12), (2 * 85, "fp8", 13), (8 * 150, "fp8", 61)],
)
def test_layers_that_fit(gigabytes: int, dtype: str, layers: int) -> None:
    assert ranks.layers_that_fit(gigabytes * 10**9, dtype) == layers


def test_all_layers_fit_only_where_deepseek_v3_does() -> None:
    # 671e9 weights (its model card), of which the embedding and the head have 129280 x 7168 each.
    weights = (671e9 - 1.9e9) / ranks.WEIGHTS_SHARE
    assert ranks.layers_that_fit(int(0.99 * weights), "fp8") == 60
    assert ranks.layers_that_fit(int(1.01 * weights), "fp8") == 61


def test_nvcc_is_counted_for_our_kernel_alone(tmp_path: Path) -> None:
    variables, calls = ranks.counted_nvcc(tmp_path, sm=90)
    for source in ("other.cu", SOURCE.name):
        command = ["nvcc", "--dryrun", "-c", str(tmp_path / source)]
        subprocess.run(command, env=os.environ | variables, capture_output=True, check=False)
    assert len(calls.read_text().splitlines()) == 2
    assert ranks.builds(calls) == 1


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [(1.0, 1.0, 2), (1.0, 1.0 + 2.0**-20, 1), (0.0, -0.0, 1), (float("nan"), float("nan"), 2)],
)
def test_one_bit_on_one_rank_is_seen(
    first: float, second: float, same: int, tmp_path: Path
) -> None:
    for rank in (0, 1):
        folder = tmp_path / f"TP{rank}_PP0_Rank{rank}_pid{10 + rank}"
        folder.mkdir()
        for number in (0, 1):
            logits = torch.ones(4, 256)
            logits[3, 77] = second if rank and number else first
            mlp = "model.layers.3.mlp"
            chosen = [logits[:, 70:78].contiguous(), torch.ones(4, 8, dtype=torch.int32)]
            given = {f"{mlp}.gate": logits, f"{mlp}.topk": chosen, mlp: torch.randn(4)}
            torch.save(given, folder / f"Pass{number:05d}.pt")
    bits = ranks.same_bits(ranks.dumped(tmp_path))
    assert bits == {"gate": (same, 2), "topk": (same + 2, 4)}


def test_the_ranks_run_deepseek_v3s_widths() -> None:
    config = full_width_config(61, "fp8")
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (61, 3)
    assert (config["moe_intermediate_size"], config["num_attention_heads"]) == (2048, 128)
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "quantization_config" not in full_width_config(61, "bf16")


def test_the_whole_model_is_deepseek_v3s() -> None:
    config = whole.whole_config(61, "fp8")
    published = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "n_routed_experts": 256,
        "num_attention_heads": 128,
        "max_position_embeddings": 163840,
    }
    assert config | published == config
    assert (config["rope_scaling"]["type"], config["rope_scaling"]["factor"]) == ("yarn", 40)
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert "quantization_config" not in whole.whole_config(61, "bf16")
    small = whole.small_config(20, "fp8")
    assert (small["moe_intermediate_size"], small["num_attention_heads"]) == (128, 16)
    assert small["quantization_config"] == config["quantization_config"]


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        ("M 1-128 cluster, M 129+ SGLang (backend auto, PDL on)", True),
        ("M 1+ SGLang: auto takes cluster on SM 90 only (backend auto, PDL on)", False),
        ("M 1+ torch (backend torch, PDL on)", True),
        ("SGLANG_ROUTER_GEMM_BACKEND=off, SGLang's gate is untouched.", False),
    ],
)
def test_the_log_says_whether_the_patch_was_taken(line: str, taken: bool) -> None:
    assert patch_taken(f"[2026-11-25 03:14:43 TP0] Router GEMM [256, 7168]: {line}") == taken


def kernel(name: str, start: float, us: float, stream: int = 7) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": us, "args": {"stream": stream}}


def trace(steps: int, gates: int) -> list[dict[str, Any]]:
    """Each gate starts 1.5 µs before the norm ends; a kernel of another stream runs beside."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
    for place in range(steps * gates):
        start = 100.0 * place
        events += [
            kernel("void topk_kernel<float>(float*)", start + 8, 2),
            kernel("void (anonymous namespace)::norm<8>(int)", start, 5),
            kernel("void cluster_router_gemm_kernel<Shape<256>, 4>(int)", start + 3.5, 3),
            kernel("shared_experts", start + 1, 9, stream=13),
            {"cat": "cpu_op", "name": "dsv3_router_gemm", "ts": start, "dur": 1},
        ]
    return events


def test_the_gates_of_the_last_whole_step_and_their_neighbours() -> None:
    events = [*trace(steps=2, gates=4), kernel("tiny_n_gemm_kernel", 900, 1)]  # cut short
    gates = last_step(events, num_gates=4, first_layer=3)
    assert [gate.layer for gate in gates] == [3, 4, 5, 6]
    assert {gate.kernel for gate in gates} == {"cluster_router_gemm_kernel"}
    assert {(gate.before, gate.after) for gate in gates} == {("norm", "topk_kernel")}
    assert {(gate.us, gate.overlap_us, gate.stream) for gate in gates} == {(3, 1.5, 7)}
    assert last_step(events, num_gates=10, first_layer=3) == []


def test_a_gate_that_waits_overlaps_nothing() -> None:
    events = [kernel("norm", 0, 5), kernel("tiny_n_gemm_kernel<T>", 6, 3)]
    [gate] = last_step(events, num_gates=1, first_layer=1)
    assert (gate.kernel, gate.overlap_us, gate.after) == ("tiny_n_gemm_kernel", 0.0, "")
    [alone] = last_step(events[1:], num_gates=1, first_layer=1)
    assert (alone.before, alone.overlap_us) == ("", 0.0)


def test_a_gate_is_timed_from_the_norm_to_the_top_k() -> None:
    """Of two steps the first, maybe a prefill, is left out; so is a top-k without a norm."""
    events = trace(steps=2, gates=4)
    assert routing_us(events) == [5.0] * 4  # the norm ends at 5, the top-k at 10
    for event in events:
        if event.get("ts", 0) >= 400 and "topk" in event["name"]:
            event["dur"] = 3
    assert routing_us(events) == [6.0] * 4
    assert routing_us([kernel("topk_kernel", 0, 1), kernel("topk_kernel", 5, 1)]) == []
    [table] = decode.routing_rows({64: [[8.0, 8.5, 9.0], [11.0, 11.25, 11.5]], 1: [[], [9.0]]})
    assert table == ("64", "8.50 (8.25-8.75)", "11.25 (11.12-11.38)", "2.75")


def test_the_benchmark_promises_what_58_gates_save() -> None:
    chain = json.loads((whole.BENCHMARKS / "cluster/h100.json").read_text())
    assert list(whole.promised_us(chain, "SGLang tiny_gemm", num_gates=58)) == [*whole.BATCH_SIZES]
    timings = [
        ("chain", 4, "ours: cluster", 2.5),
        ("chain", 4, "SGLang tiny_gemm", 3.0),
        ("chain", 4, "cuBLAS fp32", 7.0),
        ("cold", 4, "SGLang tiny_gemm", 9.0),
        ("chain", 64, "ours: cluster", 4.5),
        ("chain", 64, "cuBLAS fp32", 7.5),
        ("chain", 8, "cuBLAS fp32", 7.0),
    ]
    keys = ("mode", "num_tokens", "provider", "median_us")
    chain["timings"] = [dict(zip(keys, each, strict=True), tp_size=1) for each in timings]
    promised = whole.promised_us(chain, "SGLang tiny_gemm", num_gates=58)
    assert promised == {4: 58 * 0.5, 64: 58 * 3.0}


LINE = json.dumps(
    {
        "backend": "sglang",
        "max_concurrency": 8,
        "completed": 31,
        "request_throughput": 4.25,
        "output_throughput": 543.5,
        "median_itl_ms": 14.5,
        "p99_itl_ms": 16.25,
        "median_tpot_ms": 14.75,
    }
)


def made_up_results() -> whole.Results:
    steps: dict[int, list[list[float]]] = {size: [[], []] for size in whole.BATCH_SIZES}
    steps[1] = [[14000.0, 14010.0, 14020.0], [14200.0, 14210.0]]  # cut short
    steps[8] = [[15000.0, 15000.0, 15000.0], [15290.0, 15290.0]]
    gates = last_step(trace(steps=1, gates=58), num_gates=58, first_layer=3)
    return {
        "environment": {"GPU": "8 x NVIDIA H200", "sglang": "0.5.23"},
        "small": False,
        "dtype": "fp8",
        "config": whole.whole_config(61, "fp8"),
        "num_gates": 58,
        "backends": ["auto", "off"],
        "chain": {"gpu": "NVIDIA H200", "off": "SGLang tiny_gemm", "promised_us": {8: 93.4}},
        "step_us": steps,
        "up_after_s": [[200.0] * 3, [190.0] * 2],
        "command": "python3 -m sglang.launch_server --model-path MODEL",
        "serving_command": "python3 -m sglang.bench_serving",
        "serving": {
            "auto": {concurrency: whole.served(LINE, 32) for concurrency in whole.CONCURRENCIES},
            "off": {concurrency: {"failed": 32} for concurrency in whole.CONCURRENCIES},
        },
        "profile": {"auto": [vars(gate) for gate in gates], "off": []},
        "log_lines": {"auto": {"Router GEMM [256, 7168] on SM 90: M 1-128 cluster": 8}},
    }


def cells(text: str, *first: str) -> list[str]:
    """The one row of a table that starts with these cells."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    [row] = [row for row in found if row[: len(first)] == [*first]]
    return row


def test_the_report_has_what_both_backends_measured(tmp_path: Path) -> None:
    results = whole.save(made_up_results(), tmp_path)
    text = (tmp_path / "dsv3_whole.md").read_text()
    assert whole.report(results) == text
    assert "of 2 starts of each" in text
    assert cells(text, "8", "15000 (15000-15000)")[2:] == [
        *("15290 (15290-15290)", "1.019"),
        *("5.00 (5.00-5.00)", "290 (290-290)", "93"),
    ]
    assert cells(text, "1", "14005 (14002-14008)")[-2:] == ["200 (200-200)", ""]
    assert cells(text, "64", "auto")[2:] == [
        "4.25",
        "543.50",
        "14.50",
        "16.25",
        "14.75",
        "1 of 256",
    ]
    assert cells(text, "64", "off")[2:] == [*[""] * 5, "32 of 256"]
    assert cells(text, "auto") == [
        *("auto", "58 `cluster_router_gemm_kernel`", "3.00", "1.50", "58 of 58"),
        *("58 `norm`", "58 `topk_kernel`"),
    ]
    assert cells(text, "off")[4] == "0 of 0"
    assert "8 x Router GEMM [256, 7168]" in text
    assert results["profile"]["auto"][0]["layer"] == 3


def test_the_plots_are_written_from_the_json_alone(tmp_path: Path) -> None:
    whole.save(made_up_results() | {"profile": {}, "serving": {}}, tmp_path)
    script = [sys.executable, whole.__file__, "--report-only", "--output-dir", str(tmp_path)]
    subprocess.run(script, check=True)
    plots = [f"dsv3_whole_{name}.png" for name in ("saving", "step")]
    assert sorted(path.name for path in tmp_path.glob("*whole_*")) == plots
    assert all((tmp_path / name).stat().st_size > 1000 for name in plots)
    nothing_yet = made_up_results() | {"step_us": {"1": [[14000.0], []]}}
    saved = whole.save_plots(json.loads(json.dumps(nothing_yet)), tmp_path, svg=True)
    assert [path.suffix for path in saved] == [".png", ".svg"] * 2


@pytest.mark.parametrize(
    ("model", "layers", "moe_layers", "hidden", "experts", "heads", "kv_heads", "vocab"),
    [
        ("DeepSeek-V3", 61, 58, 7168, 256, 128, 128, 129280),
        ("GLM-4.5", 92, 89, 5120, 160, 96, 8, 151552),
        ("MiniMax-M2", 62, 62, 3072, 256, 48, 8, 200064),
        ("Qwen3-235B", 94, 94, 4096, 128, 64, 4, 151936),
    ],
)
def test_a_rank_has_all_layers_and_an_eighth_of_each(
    model: str,
    layers: int,
    moe_layers: int,
    hidden: int,
    experts: int,
    heads: int,
    kv_heads: int,
    vocab: int,
) -> None:
    rank = TP8_RANKS[model]
    assert (rank.num_layers, rank.num_moe_layers) == (layers, moe_layers)
    read = AutoConfig.for_model(**rank.config)
    renamed = ("torch_dtype", "rope_theta")  # by transformers 5
    kept = {key: getattr(read, key, None) for key in rank.config if key not in renamed}
    assert rank.config | kept == rank.config
    assert read.rope_parameters["rope_theta"] == rank.config["rope_theta"]
    assert read.hidden_size == hidden
    assert read.num_local_experts == experts
    assert read.num_experts_per_tok == 8
    assert 8 * read.num_attention_heads == heads
    assert read.num_key_value_heads == max(kv_heads // 8, 1)
    assert 8 * read.vocab_size == vocab
    assert read.quantization_config["weight_block_size"] == [128, 128]
    # Which SGLang asks of its experts; what it has of them, one byte each, has to fit.
    width = getattr(read, "moe_intermediate_size", read.intermediate_size)
    assert width % 128 == 0
    assert ("instead of" in rank.remark) == (model != "DeepSeek-V3")
    assert moe_layers * (experts + 1) * 3 * hidden * width < 90e9


def profiled(events: list[dict[str, Any]], folder: Path) -> Path:
    """The file that the profiler writes."""
    path = folder / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_a_layer_of_a_rank_is_read_off_its_profile(tmp_path: Path) -> None:
    """What comes first, a prefill, is left out; so is the second GEMM of a layer."""
    events = trace(steps=3, gates=LINKS)
    for place in range(3 * LINKS):
        start = 100.0 * place + (20 if place < 10 else 11)
        events += [kernel(one_rank.EXPERT_GEMM, each, 20) for each in (start, start + 30)]
    read = one_rank.read(profiled(events, tmp_path), LINKS)
    assert set(read.step_us) == {100.0 * LINKS}
    assert set(read.routing_us) == {6.0}
    assert read.timeline == [
        ("cluster_router_gemm_kernel", -1.5, 1.5),
        ("topk_kernel", 3, 5),
        (one_rank.EXPERT_GEMM, 6, 26),
    ]


def dual_stream_trace(layers: int) -> list[dict[str, Any]]:
    """GLM-4.5's where the shared expert is not fused: stream 13 has the K norm and the experts."""
    events = []
    for place in range(layers):
        start = 100.0 * place
        events += [
            kernel("k_rmsnorm", start + 1, 3, stream=13),
            kernel("attention", start + 5, 20),
            kernel("void fused_add_rmsnorm<8>(int)", start + 30, 5),
            kernel("shared_expert", start + 35, 20),
            kernel("gate", start + 36, 4, stream=13),
            kernel("topk_kernel", start + 41, 4, stream=13),
            kernel(one_rank.EXPERT_GEMM, start + 46, 10, stream=13),
            kernel(one_rank.EXPERT_GEMM, start + 58, 10, stream=13),
        ]
    return events


def test_the_norm_is_found_on_another_stream_than_the_experts(tmp_path: Path) -> None:
    layers = 7
    read = one_rank.read(profiled(dual_stream_trace(4 * layers), tmp_path), layers)
    assert set(read.step_us) == {100.0 * layers}
    assert set(read.routing_us) == {46.0 - 35.0}
    assert read.timeline == [("gate", 1, 5), ("topk_kernel", 6, 10), (one_rank.EXPERT_GEMM, 11, 21)]


class Started(NamedTuple):
    """What a server was started with."""

    backend: str
    config: dict[str, Any]
    extra: list[str]
    variables: dict[str, str]


def run_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, folder: Path, options: list[str], profiles: list[Path]
) -> tuple[int, list[Started]]:
    """The script, its servers and their profiles being given."""
    servers: list[Started] = []

    @contextmanager
    def running(
        model: Path,
        log: Path,
        port: int,
        backend: str,
        extra: list[str],
        variables: dict[str, str],
        launcher: list[str],
    ) -> Iterator[Namespace]:
        assert launcher == [str(SPREAD)]
        config = json.loads((model / "config.json").read_text())
        servers.append(Started(backend, config, extra, variables))
        log.write_text("Router GEMM [160, 5120] on SM 90: M 1-16 cluster, M 17+ SGLang\n")
        yield Namespace(shown_command="python3 -m sglang.launch_server", wait=lambda: 1.0)

    monkeypatch.setattr(one_rank, "running", running)
    monkeypatch.setattr(one_rank, "profile", lambda *_: profiles[len(servers) - 1])
    monkeypatch.setattr(one_rank, "parse_arguments", ArgumentParser.parse_args)
    where = {"GPU": "NVIDIA H200", "sglang": "0.5.23"}
    monkeypatch.setattr(one_rank, "environment", lambda: where)
    monkeypatch.setattr(sys, "argv", ["", "--output-dir", str(folder), *options])
    return one_rank.main(), servers


def test_another_model_is_run_with_its_config_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = profiled(dual_stream_trace(4 * 89), tmp_path)
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda _, title: titles.append(title))
    options = ["--model", "GLM-4.5", "--batch-sizes", "16", "1", "--", "--disable-radix-cache"]
    result, servers = run_of_a_rank(monkeypatch, tmp_path, options, [path, path])
    assert result == 0
    assert [(each.backend, each.variables) for each in servers] == [("auto", {}), ("off", {})]
    assert servers[1].config == TP8_RANKS["GLM-4.5"].config
    sizes = ["1", "16", "--max-running-requests", "16", "--disable-radix-cache"]
    assert servers[1].extra[-5:] == sizes
    text = (tmp_path / "glm45_rank_h200_0.5.23.md").read_text()
    assert text.startswith("# One rank of GLM-4.5 at TP 8")
    assert "All 92 layers" in text
    assert "256 wide instead of 192" in text
    assert "DeepSeek" not in text
    assert "batch 64" not in text
    assert cells(text, "16", "8900 (8900-8900)")[2:] == ["8900 (8900-8900)", "0.0 %"]
    assert [size in text for size in ("`off`, batch 1:", "`off`, batch 16:")] == [True, True]
    assert titles[-1].endswith("89 times a step")


@pytest.mark.parametrize("taken", [True, False])
def test_a_checkout_runs_in_place_of_the_plugin_and_must_run_its_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    python = tmp_path / "checkout" / "python"
    (python / "sglang").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", "installed")
    profiles = []
    for name, gate in (("new", "cluster" if taken else "gate"), ("own", "gate")):
        (tmp_path / name).mkdir()
        events = [
            each | {"name": gate if each["name"] == "gate" else each["name"]}
            for each in dual_stream_trace(4 * 89)
        ]
        profiles.append(profiled(events, tmp_path / name))
    options = ["--model", "GLM-4.5", "--batch-sizes", "16", "--pull-requests", "gate", "fp32"]
    options += ["--checkout", str(tmp_path / "checkout")]
    result, servers = run_of_a_rank(monkeypatch, tmp_path, options, profiles)
    assert result == (0 if taken else 1)
    assert [each.backend for each in servers] == ["off", "off"]
    first = {"PYTHONPATH": os.pathsep.join([str(python), "installed"])}
    assert [each.variables for each in servers] == [first, {}]
    text = (tmp_path / "glm45_exported_h200_0.5.23.md").read_text()
    assert "| exported, µs " in text
    assert "with --pr gate, fp32. The plugin is off in both." in text
    assert "`exported`, batch 16:" in text


def test_a_checkout_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="must have python/sglang"):
        run_of_a_rank(monkeypatch, tmp_path, ["--checkout", str(tmp_path)], [])


RESULTS = Path(__file__).parent / "results"
RANKS = sorted(RESULTS.glob("*_rank_*.json")) + sorted(RESULTS.glob("*_exported_*.json"))


@pytest.mark.parametrize("path", RANKS, ids=lambda path: path.stem)
def test_the_report_of_a_rank_is_written_from_its_json_alone(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["", "--from-json", str(path), "--output-dir", str(tmp_path / "new")]
    )
    assert one_rank.main() == 0
    names = [f"{path.stem}.{ending}" for ending in ("json", "md", "png")]
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == names
    for name in names[:2]:
        assert (tmp_path / "new" / name).read_text() == (path.parent / name).read_text()
    assert f"]({names[2]})" in (tmp_path / "new" / names[1]).read_text()
    assert (tmp_path / "new" / names[2]).stat().st_size > 1000


def test_a_rank_without_matplotlib_or_cut_short_has_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run = (RESULTS / "dsv3_rank_h200_0.5.23.json").read_text()
    results = json.loads(whole_run)
    del results["us"]["off"][one_rank.DRAWN_SIZE]
    assert "![" not in (text := one_rank.save(results, tmp_path))
    assert text.count(" %") == 2 * 4
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "![" not in one_rank.save(json.loads(whole_run), tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_the_report_says_how_it_was_taken() -> None:
    called = ["somewhere/run_dsv3_decode.py", "--output-dir", "out", "--rounds", "7", "--", "-x y"]
    shown = "python3 benchmark/server/run_dsv3_decode.py --rounds 7 -- '-x y'"
    assert script_call(called) == shown
    assert script_call([called[0], "--rounds", "7", "--output-dir=out", *called[-2:]]) == shown


@pytest.mark.parametrize("script", sorted(Path(__file__).parent.glob("run_dsv3_*.py")))
def test_a_python_that_lacks_a_module_is_told_in_one_line(script: Path) -> None:
    # -S: without site-packages, as the Python of a machine where nothing is installed.
    done = subprocess.run(
        [sys.executable, "-S", str(script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{script.name}: No module named" in done.stderr
    assert ".venv/bin/python" in done.stderr


def test_bench_serving_takes_the_options_and_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.benchmark import serving
    from sglang.benchmark.datasets import get_dataset
    from sglang.benchmark.utils import get_tokenizer

    (tmp_path / "config.json").write_text(json.dumps(whole.whole_config(61, "fp8")))
    whole.save_tokenizer(tmp_path, vocab_size=512)
    command = whole.serving_command(30000, tmp_path, 8, tmp_path / "output.jsonl")
    parsed: list[Namespace] = []
    monkeypatch.setattr(serving, "run_benchmark", parsed.append)
    monkeypatch.setattr(sys, "argv", command[2:])
    serving.cli_main()
    tokenizer = get_tokenizer(parsed[0].tokenizer)
    requests = get_dataset(parsed[0], tokenizer)
    assert len(requests) == whole.num_prompts(8) == 32
    for request in requests:
        assert (len(request.prompt), request.output_len) == (
            whole.INPUT_TOKENS,
            whole.OUTPUT_TOKENS,
        )
        assert 0 <= min(request.prompt) <= max(request.prompt) < 512
    # What SGLang's own warm-up sends, and text for every token, or there is no ITL.
    assert tokenizer.encode("The capital city of France is") == [0] * 6
    assert tokenizer.decode([0, 1, 511], skip_special_tokens=True) == "t0 t1 t511"


LOGITS = """
import serve_spread, torch
from sglang.srt.model_loader import loader
norm, gate = torch.nn.RMSNorm(4096), torch.nn.Linear(4096, 128, bias=False)
mlp = torch.nn.ModuleDict({"norm": norm, "gate": gate})
loader.initialize_dummy_weights(torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({"mlp": mlp})}))
print(float(gate(norm(torch.randn(64, 4096))).std()), float(norm.weight.max()))
"""


def test_the_gates_logits_are_as_large_as_a_trained_models() -> None:
    """Of SGLang's own dummy weights in the norm, and larger ones in the gate."""
    done = subprocess.run(
        [sys.executable, "-c", LOGITS],
        cwd=SPREAD.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    std, norm = map(float, done.stdout.splitlines()[-1].split())
    assert 0.8 < std < 1.25
    assert norm <= 1e-3
