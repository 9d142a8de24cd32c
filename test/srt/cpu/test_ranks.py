"""Three ranks in SGLang's own tensor-parallel group, on a CPU: one path for all, or none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

# What each rank asks for, shape by shape; None: this rank makes no plan, as without the plugin.
ROUNDS = {
    "all alike": ("torch", "torch", "torch"),
    "one has none": ("torch", "auto", "torch"),
    "one has another": ("torch", "torch", "sgl_kernel"),
    "one is not there": ("torch", "torch", None),
    "nor is it waited for again": ("torch", "torch", None),
}

RANK = """
import json, logging, os, sys, time
import torch
import sglang_router_gemm
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.moe_router import plan, ranks
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

rank, rounds = int(os.environ["RANK"]), json.loads(os.environ["ROUNDS"])
logging.basicConfig(level=logging.WARNING, format="%(message)s")
set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu", tp_size=3))
parallel_state.init_distributed_environment(
    world_size=3, rank=rank, local_rank=rank, backend="gloo",
    distributed_init_method=f"tcp://127.0.0.1:{os.environ['PORT']}",
)
group = parallel_state.init_model_parallel_group(
    [[0, 1, 2]], rank, "gloo", use_pynccl=False, use_custom_allreduce=False, group_name="tp"
)
get_parallel().override_permanently(tp_group=group)  # as initialize_model_parallel does
ranks.PRESENCE_LIMIT_S, ranks.ANSWER_LIMIT_S = 4.0, 60.0
found = []
for index, asked in enumerate(rounds.values()):
    torch.distributed.barrier()
    started = time.monotonic()
    if asked[rank] is None:
        found.append(None)
        continue
    os.environ["SGLANG_ROUTER_GEMM_BACKEND"] = asked[rank]
    weight = torch.empty(16 * (index + 1), 64, dtype=torch.bfloat16)
    made = plan.make_plan(weight)
    backend = made.decision.backend
    served = made.logits(torch.zeros(2, 64, dtype=torch.bfloat16), weight) is not None
    assert served == (backend is not None)
    found.append([backend.name if backend else None, made.decision.reason,
                  time.monotonic() - started])
torch.distributed.barrier()
print("FOUND", json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def rounds() -> dict[str, list[list[object] | None]]:
    """By round, what each rank came to: the backend's name, the reason and the seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"ROUNDS": json.dumps(ROUNDS), "PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK],
            env=env | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    found = []
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
        assert lines, output
        found.append(json.loads(lines[0].removeprefix("FOUND ")))
    return {name: [rank[index] for rank in found] for index, name in enumerate(ROUNDS)}


def _backends(ranks: list[list[object] | None]) -> list[object]:
    return [None if rank is None else rank[0] for rank in ranks]


def _reasons(ranks: list[list[object] | None]) -> list[str]:
    return [str(rank[1]) for rank in ranks if rank is not None]


def test_ranks_that_have_the_same_take_it(rounds: dict[str, list[list[object] | None]]) -> None:
    assert _backends(rounds["all alike"]) == ["torch"] * 3


def test_what_one_cannot_have_none_takes(rounds: dict[str, list[list[object] | None]]) -> None:
    ranks = rounds["one has none"]
    assert _backends(ranks) == [None] * 3
    reasons = _reasons(ranks)
    assert reasons[0].startswith("rank 1 takes none: device is cpu, must be cuda, rank 0 torch")
    assert reasons[1] == "device is cpu, must be cuda"
    assert reasons[2].startswith("rank 1 takes none: device is cpu, must be cuda, rank 2 torch")
    assert _backends(rounds["one has another"]) == [None] * 3


def test_a_rank_without_the_plugin_is_noticed(
    rounds: dict[str, list[list[object] | None]],
) -> None:
    ranks = rounds["one is not there"]
    assert _backends(ranks) == [None] * 3
    assert all("rank 2 has no part in it: is the plugin installed" in r for r in _reasons(ranks))
    seconds = [rank[2] for rank in rounds["nor is it waited for again"] if rank is not None]
    assert _backends(rounds["nor is it waited for again"]) == [None] * 3
    assert all(isinstance(each, float) and each < 3 for each in seconds)
