"""The fast path on a real Hopper or Blackwell GPU, with the real FlashInfer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_inputs, relative_error
from on_gpu import gate_with, run_of
from torch._dynamo.testing import CompileCounterWithBackend

from sglang.srt.layers.moe_router import backends, plan
from sglang.srt.layers.moe_router.kernel import Target
from sglang.srt.layers.moe_router.ops import flashinfer_dsv3_router_gemm
from sglang.srt.models.deepseek_v2_gate import router_logits
from sglang_router_gemm.check import deepseek_v2_gate, sglang_gate

pytestmark = pytest.mark.gpu

MAX_RELATIVE_ERROR = 1e-6
# cuBLAS, which serves the rest: 1.4e-6 on an H100 with torch 2.11 (2026-11-22).
MAX_RELATIVE_ERROR_CUBLAS = 3e-6


def _bound(num_tokens: int) -> float:
    return MAX_RELATIVE_ERROR if num_tokens <= 16 else MAX_RELATIVE_ERROR_CUBLAS


@pytest.fixture
def flashinfer_backend(monkeypatch: pytest.MonkeyPatch, publish_server_args: object) -> None:
    """The backend forced and its kernel loaded, as after a model load."""
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "flashinfer")
    run_of("flashinfer")


@pytest.fixture
def kernel_calls(
    flashinfer_backend: None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, bool]]:
    """(M, PDL) of each call that reaches FlashInfer's kernel, which still runs."""
    calls: list[tuple[int, bool]] = []
    real = run_of("flashinfer")

    def recorded(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        pdl: bool,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        calls.append((hidden_states.shape[0], pdl))
        return real(hidden_states, weight, logits, pdl)

    target = Target(torch.device("cuda", torch.cuda.current_device()), None, 256, 7168)
    key = backends._key(backends.BACKENDS["flashinfer"], target)
    monkeypatch.setitem(backends._loaded, key, recorded)
    monkeypatch.setattr(plan, "_plans", {})
    return calls


@pytest.mark.usefixtures("flashinfer_backend")
@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("num_tokens", range(1, 17))
def test_numbers(
    num_tokens: int,
    pdl: bool,
    monkeypatch: pytest.MonkeyPatch,
    kernel_calls: list[tuple[int, bool]],
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", str(int(pdl)))
    hidden_states, weight = random_inputs(num_tokens, "cuda")
    logits = torch.full((num_tokens, 256), torch.nan, device="cuda")
    flashinfer_dsv3_router_gemm(logits, hidden_states, weight)
    assert kernel_calls == [(num_tokens, pdl)]
    assert relative_error(logits, hidden_states, weight) < MAX_RELATIVE_ERROR


@pytest.mark.usefixtures("flashinfer_backend")
def test_what_the_kernel_does_not_take_goes_elsewhere(
    kernel_calls: list[tuple[int, bool]],
) -> None:
    """A padded view and a storage offset are where an unchecked kernel reads wrong rows."""
    _, weight = random_inputs(1, "cuda")
    gate = gate_with(weight)
    padded = torch.randn(8, 7168 + 64, dtype=torch.bfloat16, device="cuda")[:, :7168]
    offset = torch.randn(8 * 7168 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(8, 7168)
    seventeen = torch.randn(17, 7168, dtype=torch.bfloat16, device="cuda")
    for hidden_states in (padded, offset, seventeen, seventeen[:0]):
        with torch.no_grad():
            assert router_logits(gate, hidden_states) is None
        logits = torch.full((len(hidden_states), 256), torch.nan, device="cuda")
        flashinfer_dsv3_router_gemm(logits, hidden_states, weight)
        if len(hidden_states):
            assert relative_error(logits, hidden_states, weight) < MAX_RELATIVE_ERROR_CUBLAS
    assert kernel_calls == []


@pytest.mark.usefixtures("flashinfer_backend")
def test_the_hooked_gate_of_sglang_takes_it(kernel_calls: list[tuple[int, bool]]) -> None:
    gate = sglang_gate(torch.device("cuda"))
    assert kernel_calls == [(16, False)] * 2  # held against SGLang's own forward, 32 tokens
    kernel_calls.clear()
    with torch.no_grad():
        for num_tokens in (1, 16, 17):
            hidden_states, _ = random_inputs(num_tokens, "cuda")
            logits = gate(hidden_states)
            assert relative_error(logits, hidden_states, gate.weight) < _bound(num_tokens)
    assert kernel_calls == [(1, True), (16, True)]


@pytest.mark.usefixtures("flashinfer_backend")
@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 8, 16])
def test_cuda_graph_replays(num_tokens: int, pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 replays, inputs changed before each, outputs poisoned by the graph itself."""
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", str(int(pdl)))
    hidden_states, weight = random_inputs(num_tokens, "cuda")
    source = hidden_states.clone()
    logits = torch.empty(num_tokens, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits.fill_(torch.nan)
        hidden_states.copy_(source)
        flashinfer_dsv3_router_gemm(logits, hidden_states, weight)
    worst = torch.zeros((), dtype=torch.float64, device="cuda")
    for _ in range(1000):
        source.normal_()
        graph.replay()
        expected = source.double() @ weight.double().t()
        worst = torch.maximum(worst, torch.dist(logits.double(), expected) / expected.norm())
    assert float(worst) < MAX_RELATIVE_ERROR


@pytest.mark.usefixtures("flashinfer_backend")
@pytest.mark.parametrize("build", [sglang_gate, deepseek_v2_gate])
def test_torch_compile_dispatches_on_m_without_recompiling(
    build: Callable[[torch.device], torch.nn.Module], kernel_calls: list[tuple[int, bool]]
) -> None:
    gate = build(torch.device("cuda"))
    kernel_calls.clear()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(gate, fullgraph=True, backend=counter)
    with torch.no_grad():
        for num_tokens in range(1, 65):
            hidden_states, _ = random_inputs(num_tokens, "cuda")
            logits = compiled(hidden_states)
            assert logits.dtype == torch.float32
            assert relative_error(logits, hidden_states, gate.weight) < _bound(num_tokens)
    assert counter.frame_count <= 2
    assert [num_tokens for num_tokens, _ in kernel_calls] == list(range(1, 17))


@pytest.mark.usefixtures("flashinfer_backend")
def test_opcheck() -> None:
    hidden_states, weight = random_inputs(4, "cuda")
    logits = torch.empty(4, 256, device="cuda")
    torch.library.opcheck(
        torch.ops.sglang.flashinfer_dsv3_router_gemm_out.default, (logits, hidden_states, weight)
    )


BUILD = """
import logging, os, time, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
import sglang_router_gemm
from sglang_router_gemm.check import deepseek_v2_gate
from sglang.srt.layers.moe_router.plan import find_plan, make_plan
torch.set_grad_enabled(False)
hidden_states = torch.randn(4, 7168, dtype=torch.bfloat16, device="cuda")
weight = torch.randn(256, 7168, dtype=torch.bfloat16, device="cuda")
"""


def _built(workspace: Path) -> list[str]:
    """The compile and link steps that ninja has run for FlashInfer's router GEMM."""
    logs = list(workspace.rglob("dsv3_router_gemm/.ninja_log"))
    return [line for log in logs for line in log.read_text().splitlines()[1:]]


def test_several_ranks_build_once_at_load_and_not_in_a_capture(tmp_path: Path) -> None:
    """Four processes start with an empty cache; each then captures a graph at once."""
    code = BUILD + (
        "gate = deepseek_v2_gate(torch.device('cuda'))\n"
        "before = sorted(str(p) for p in __import__('pathlib').Path("
        "os.environ['FLASHINFER_WORKSPACE_BASE']).rglob('*.so'))\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "started = time.perf_counter()\n"
        "with torch.cuda.graph(graph):\n"
        "    logits = gate(hidden_states)\n"
        "assert time.perf_counter() - started < 5\n"
        "graph.replay()\n"
        "expected = hidden_states.double() @ gate.weight.double().t()\n"
        "assert torch.dist(logits.double(), expected) / expected.norm() < 1e-6\n"
        "assert gate.router_plan.run is not None\n"
        "print('SERVES', len(before))\n"
    )
    env = os.environ | {
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "SGLANG_ROUTER_GEMM_BACKEND": "flashinfer",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(4)
    ]
    outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    for output in outputs:
        assert "loading FlashInfer's mm_M1_16_K7168_N256" in output, output
        assert "is ready after" in output, output
        assert "M 1-16 flashinfer, M 17+ SGLang" in output, output
        assert "SERVES 1" in output, output
    steps = _built(tmp_path)
    assert len(steps) == len({step.split("\t")[3] for step in steps}) > 0, steps


def test_nothing_is_built_on_a_request(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """A call for which nothing was loaded must not start nvcc: SGLang's path serves it."""
    code = BUILD + (
        "before = make_plan(weight, 'off')\n"
        "assert find_plan(weight, before).logits(hidden_states, weight) is None\n"
        "print('ELSEWHERE')\n"
    )
    output = run_python(
        code,
        FLASHINFER_WORKSPACE_BASE=str(tmp_path),
        SGLANG_ROUTER_GEMM_BACKEND="flashinfer",
    )
    assert "ELSEWHERE" in output
    assert "was not loaded with the model" in output
    assert _built(tmp_path) == []


def test_a_build_that_fails_is_one_warning(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """CUDA_HOME points to an nvcc that does not run."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    code = BUILD + (
        "for _ in range(3):\n"
        "    gate = deepseek_v2_gate(torch.device('cuda'))\n"
        "expected = hidden_states.double() @ gate.weight.double().t()\n"
        "assert torch.dist(gate(hidden_states).double(), expected) / expected.norm() < 3e-6\n"
        "print('ANSWERS')\n"
    )
    output = run_python(
        code,
        FLASHINFER_WORKSPACE_BASE=str(tmp_path),
        FLASHINFER_NVCC=str(nvcc),
        CUDA_HOME=str(tmp_path / "cuda"),
        SGLANG_ROUTER_GEMM_BACKEND="flashinfer",
    )
    assert "ANSWERS" in output
    assert output.count("install the CUDA toolkit") == 1
