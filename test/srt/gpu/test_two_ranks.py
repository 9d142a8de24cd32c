"""Two ranks on two GPUs, in SGLang's own tensor-parallel group: both take `cluster`, or neither."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RANK = """
import hashlib, json, logging, os, pathlib, torch
import sglang_router_gemm
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.moe_router import jit
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang_router_gemm.check import deepseek_v2_gate

rank = int(os.environ["RANK"])
logging.basicConfig(level=logging.WARNING, format="%(message)s")
if os.environ["WITHOUT_NVCC"] == str(rank):
    jit.nvcc_candidates = lambda: iter([pathlib.Path("/nowhere/nvcc")])
torch.cuda.set_device(rank)
set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", tp_size=2))
parallel_state.init_distributed_environment(
    world_size=2, rank=rank, local_rank=rank, backend="nccl",
    distributed_init_method=f"tcp://127.0.0.1:{os.environ['PORT']}",
)
group = parallel_state.init_model_parallel_group(
    [[0, 1]], rank, "nccl", use_pynccl=False, use_custom_allreduce=False, group_name="tp"
)
try:
    from sglang.srt.runtime_context import get_parallel
    get_parallel().override_permanently(tp_group=group)
except (ImportError, AttributeError):  # an older release keeps it in a name of its own
    parallel_state._TP = group
gate = deepseek_v2_gate(torch.device("cuda", rank))
torch.manual_seed(0)
gate.weight.data = torch.randn(256, 7168, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    logits = gate(torch.randn(16, 7168, device="cuda", dtype=torch.bfloat16))
decision = gate.router_plan.decision
print("FOUND", json.dumps([
    decision.backend.name if decision.backend else None,
    decision.reason,
    hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest(),
]), flush=True)
"""


def _ranks(folder: Path, without_nvcc: str) -> list[list[str | None]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "PORT": str(port), "WITHOUT_NVCC": without_nvcc}
        env |= {"TVM_FFI_CACHE_DIR": str(folder / str(rank))}  # as on two nodes
        env |= {"SGLANG_ROUTER_GEMM_BACKEND": "cluster"}
        command = [sys.executable, "-W", "ignore", "-c", RANK]
        ranks.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    found = []
    for output in [rank.communicate(timeout=300)[0] for rank in ranks]:
        lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
        assert lines, output
        found.append(json.loads(lines[0].removeprefix("FOUND ")))
    return found


def test_both_take_it_and_have_the_same_bits(tmp_path: Path) -> None:
    first, second = _ranks(tmp_path, without_nvcc="none")
    assert first[0] == second[0] == "cluster"
    assert first[2] == second[2]


def test_what_one_cannot_build_the_other_does_not_take(tmp_path: Path) -> None:
    first, second = _ranks(tmp_path, without_nvcc="1")
    assert first[0] is second[0] is None
    assert first[1] is not None
    assert first[1].startswith("rank 1 takes none: cluster_router_gemm [256, 7168] did not load")
    assert "/nowhere/nvcc is missing" in (second[1] or "")
    assert first[2] == second[2]
