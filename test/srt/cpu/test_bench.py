"""`sglang-router-gemm bench`, as far as it goes without a GPU: the table, and the advice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang.srt.layers.moe_router.kernel import Target
from sglang_router_gemm import bench
from sglang_router_gemm.cli import main
from sglang_router_gemm.model_config import read_gate

HOPPER = Target(torch.device("cuda", 0), 90, 256, 7168)
BLACKWELL = HOPPER._replace(sm=100)
OWN = dict.fromkeys(bench.NUM_TOKENS, 4.0)


def _scaled(factor: float, *num_tokens: int) -> dict[int, float]:
    return {m: factor * OWN[m] for m in num_tokens or OWN}


@pytest.mark.parametrize(
    ("us", "target", "setting"),
    [
        ({"cluster": _scaled(0.6)}, HOPPER, "auto"),  # which takes cluster there
        ({"cluster": _scaled(0.6)}, BLACKWELL, "cluster"),
        ({"cluster": _scaled(1.3), "flashinfer": _scaled(0.9, 1, 8, 16)}, BLACKWELL, "auto"),
        ({"cluster": _scaled(1.3), "flashinfer": _scaled(1.2, 1, 8, 16)}, BLACKWELL, "off"),
        ({"cluster": _scaled(1.01)}, BLACKWELL._replace(sm=120), "auto"),  # no worse than off
        ({"flashinfer": _scaled(0.5, 1)}, BLACKWELL._replace(sm=120), "flashinfer"),
    ],
)
def test_the_setting_is_the_fastest_over_all_m(
    us: dict[str, dict[int, float]], target: Target, setting: str
) -> None:
    assert bench.recommend({bench.OWN: OWN} | us, target) == setting


def test_without_sglangs_own_time_there_is_nothing_to_compare_with() -> None:
    assert bench.recommend({"cluster": _scaled(0.1)}, BLACKWELL) == "auto"


def test_the_table_fits_a_terminal_and_counts_the_layers() -> None:
    us = {bench.OWN: OWN, "cluster": _scaled(0.5), "flashinfer": _scaled(0.75, 1, 8, 16)}
    us["torch"] = _scaled(2.0)
    findings = {
        "gpu": "NVIDIA B300",
        "sm": 103,
        "num_experts": 256,
        "hidden_size": 7168,
        "layers": 58,
        "us": us,
        "skipped": {"sgl_kernel": "sglang-kernel 0.4.10 has no dsv3_router_gemm"},
        "setting": "cluster",
    }
    lines = bench.as_text(findings).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("16 ")]
    assert row.split() == ["16", "4.00", "2.00", "3.00", "8.00", "+116", "µs", "a", "step"]
    (row,) = [line for line in lines if line.startswith("32 ")]
    assert "3.00" not in row
    assert lines[-2] == "Use SGLANG_ROUTER_GEMM_BACKEND=cluster"
    assert "SM 103: please send what --json prints" in lines[-1]
    assert "please send" not in bench.as_text(findings | {"sm": 90})
    assert "fp32" not in "".join(lines)
    glm = bench.as_text(findings | {"num_experts": 160, "hidden_size": 5120})
    assert "With bf16 weights. GLM-4.5 keeps fp32 ones, which are not timed here." in glm


def test_the_layers_are_those_with_experts(tmp_path: Path) -> None:
    config = {"n_routed_experts": 256, "hidden_size": 7168, "num_hidden_layers": 61}
    (tmp_path / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 3}))
    assert read_gate(tmp_path) == (256, 7168, 58)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_gate(tmp_path).layers == 61


@pytest.mark.skipif(torch.cuda.is_available(), reason="the failure is that there is no GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "this machine has no CUDA device"),
        (["--model", "nowhere"], "nowhere cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"sglang-router-gemm bench: {said}\n"
