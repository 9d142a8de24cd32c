"""What the run_dsv3_*.py do apart from the server: requests, counts, comparisons, tables."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import run_dsv3_decode as decode
import run_dsv3_load as load
import run_dsv3_ranks as ranks
import torch
from dsv3_server import Server


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


def test_the_saving_of_a_step_is_shared_among_the_gates() -> None:
    steps = {8: [[100.0, 101.0, 102.0], [119.0, 120.0, 121.0]]}
    [(batch, ours, off, ratio, saved)] = decode.rows(steps, num_gates=19)
    assert (batch, ours, off) == ("8", "101 (100-102)", "120 (119-121)")
    assert ratio == "1.188"
    assert saved == "1.00 (1.00-1.00)"


def test_nvcc_is_counted_for_our_kernel_alone(tmp_path: Path) -> None:
    variables, calls = ranks.counted_nvcc(tmp_path)
    for source in ("other.cu", ranks.KERNEL_SOURCE):
        command = ["nvcc", "--dryrun", "-c", str(tmp_path / source)]
        subprocess.run(command, env=os.environ | variables, capture_output=True, check=False)
    assert len(calls.read_text().splitlines()) == 2
    assert ranks.builds(calls) == 1


@pytest.mark.parametrize(("difference", "same"), [(0.0, 2), (2.0**-20, 1)])
def test_one_bit_on_one_rank_is_seen(difference: float, same: int, tmp_path: Path) -> None:
    for rank in (0, 1):
        folder = tmp_path / f"TP{rank}_PP0_Rank{rank}_pid{10 + rank}"
        folder.mkdir()
        for number in (0, 1):
            logits = torch.ones(4, 256)
            logits[3, 77] += rank * number * difference
            gates = {"model.layers.3.mlp.gate": logits, "model.layers.3.mlp": torch.randn(4)}
            torch.save(gates, folder / f"Pass{number:05d}.pt")
    assert ranks.same_bits(ranks.dumped_gates(tmp_path)) == (same, 2)


def test_the_ranks_run_deepseek_v3s_widths() -> None:
    config = ranks.config(61, "fp8")
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (61, 3)
    assert (config["moe_intermediate_size"], config["num_attention_heads"]) == (2048, 128)
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "quantization_config" not in ranks.config(61, "bf16")
