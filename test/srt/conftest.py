"""What the tests share: real SGLang, a published ServerArgs, and fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sglang_router_gemm  # noqa: F401  makes the in-tree modules importable
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang_router_gemm.check import HIDDEN_SIZE, NUM_EXPERTS

VARIABLES = ("SGLANG_ROUTER_GEMM_BACKEND", "SGLANG_ROUTER_GEMM_PDL", "TRTLLM_ENABLE_PDL")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability >= (9, 0):
        return
    skip = pytest.mark.skip(reason="needs a GPU of SM 90 or newer, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def publish_server_args() -> Iterator[Callable[..., None]]:
    """Publishes a real ServerArgs with the given fields, and a plain one afterwards."""

    def publish(**fields: object) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        server_args = ServerArgs(model_path="dummy", device=device, **fields)
        set_global_server_args_for_scheduler(server_args)

    publish()
    yield publish
    publish()


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs code in a fresh interpreter and returns its stdout and stderr."""

    def run(code: str, python: str = sys.executable, cwd: str | None = None, **env: str) -> str:
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        done = subprocess.run(
            [python, "-W", "ignore", "-c", code],
            env=clean | env,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def write_nvcc(home: Path, script: str) -> None:
    """Makes `home` a CUDA_HOME whose nvcc is a shell script; `$NVCC` in it is the real one."""
    from sglang.srt.layers.moe_router import jit  # needs TVM FFI, which not every test does

    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\nNVCC={jit.find_nvcc()}\n{script}\n")
    nvcc.chmod(0o755)


def random_inputs(
    num_tokens: int,
    device: str = "cpu",
    num_experts: int = NUM_EXPERTS,
    hidden_size: int = HIDDEN_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh bf16 `hidden_states` and `weight`."""
    hidden_states = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16, device=device)
    weight = torch.randn(num_experts, hidden_size, dtype=torch.bfloat16, device=device)
    return hidden_states, weight


def relative_error(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> float:
    """‖logits - fp64‖ / ‖fp64‖; NaN never passes a comparison with a bound."""
    expected = hidden_states.double() @ weight.double().t()
    return float(torch.dist(logits.double(), expected) / expected.norm())
