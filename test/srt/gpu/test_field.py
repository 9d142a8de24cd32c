"""Faults of the field on a real GPU: threads, modes and memory regions of somebody else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from conftest import random_inputs, relative_error
from on_gpu import run_of

from sglang.srt.layers.moe_router import backends, plan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("publish_server_args")]

CALLS = 50_000


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process, but for what lies in the cache on disk."""
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(plan, "_plans", {})


def test_threads_with_different_m_do_not_disturb_each_other() -> None:
    """Four threads, four streams: a call must change no state that another call needs."""
    run = run_of("cluster")
    hidden_states, weight = random_inputs(128, "cuda")
    failed: list[str] = []
    errors: dict[int, float] = {}

    def work(num_tokens: int) -> None:
        rows = hidden_states[:num_tokens]
        logits = torch.empty(num_tokens, 256, device="cuda")
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            try:
                for _ in range(CALLS):
                    run(rows, weight, logits, True)
            except Exception as error:
                failed.append(f"M = {num_tokens}: {error}")
            torch.cuda.current_stream().synchronize()
            errors[num_tokens] = relative_error(logits, rows, weight)

    threads = [threading.Thread(target=work, args=(m,)) for m in (128, 17, 120, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert max(errors.values()) < 1e-6


BATCH_INVARIANT = """
import torch
import sglang_router_gemm
from sglang.srt.batch_invariant_ops import enable_batch_invariant_mode
from sglang.srt.layers.moe_router.plan import make_plan
enable_batch_invariant_mode()
plan = make_plan(torch.empty(384, 7168, dtype=torch.bfloat16, device="cuda"), "cluster")
print("LOADED" if plan.run is not None else plan.decision.reason)
"""


def test_a_load_under_batch_invariant_mode(run_python: Callable[..., str]) -> None:
    assert "LOADED" in run_python(BATCH_INVARIANT)


SLEEP = """
import os, subprocess, sys
if "memory_saver" not in os.environ.get("LD_PRELOAD", ""):
    from torch_memory_saver.hooks.mode_preload import configure_subprocess
    with configure_subprocess():
        sys.exit(subprocess.call([sys.executable, "-W", "ignore", "-c", os.environ["CODE"]]))
import torch
import sglang_router_gemm
from torch_memory_saver import torch_memory_saver as saver
from sglang.srt.layers.moe_router.plan import make_plan
torch.set_grad_enabled(False)
with saver.region(tag="weights"):
    weight = torch.randn(256, 7168, dtype=torch.bfloat16, device="cuda")
    plan = make_plan(weight, "cluster")
hidden_states, keep = torch.randn(16, 7168, dtype=torch.bfloat16, device="cuda"), weight.cpu()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    logits = plan.logits(hidden_states, weight)
graph.replay()
before = logits.clone()
saver.pause("weights")
square = torch.randn(512, 512, device="cuda")
assert bool((square @ square).isfinite().all())
saver.resume("weights")
weight.copy_(keep)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(logits, before)
print("AWAKE")
"""


def test_a_load_in_a_memory_region_leaves_nothing_there(run_python: Callable[..., str]) -> None:
    """SGLang's `--enable-memory-saver`: what lies in the region goes to sleep with the weights."""
    pytest.importorskip("torch_memory_saver")
    assert "AWAKE" in run_python(SLEEP, CODE=SLEEP)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_load_changes_nothing_of_the_callers() -> None:
    """Generators, default dtype, device, stream, flags and modes are as they were."""
    torch.manual_seed(1)
    expected = torch.randn(4), torch.randn(4, device="cuda")
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    stream = torch.cuda.Stream()
    try:
        with (
            torch.device("meta"),
            torch.inference_mode(),
            torch.autocast("cuda", dtype=torch.float16),
            torch.cuda.stream(stream),
        ):
            run = run_of("cluster", 160, 5120)
            assert torch.cuda.current_stream() == stream
            assert torch.empty(1).device.type == "meta"
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cuda")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.randn(4), expected[0])
    assert torch.equal(torch.randn(4, device="cuda"), expected[1])
    hidden_states, weight = random_inputs(4, "cuda", 160, 5120)
    logits = run(hidden_states, weight, torch.empty(4, 160, device="cuda"), False)
    assert relative_error(logits, hidden_states, weight) < 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["cluster", "flashinfer"])
@pytest.mark.parametrize("current", [0, 1])
def test_a_kernel_runs_where_its_tensors_are(backend: str, current: int) -> None:
    with torch.cuda.device(1):
        run = run_of(backend)
        hidden_states, weight = random_inputs(16, "cuda")
        logits = torch.full((16, 256), torch.nan, device="cuda")
    with torch.cuda.device(current):
        run(hidden_states, weight, logits, True)
        torch.cuda.synchronize(1)
    assert relative_error(logits, hidden_states, weight) < 1e-6
