"""What the GPU tests share: the kernels as a model's load leaves them, and a bare gate."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.kernel import Run, Target, device_sm
from sglang.srt.layers.moe_router.plan import make_plan
from sglang.srt.models.deepseek_v2_gate import plan_gate

SM = device_sm(torch.device("cuda", 0)) or 0
"""Of the first GPU; 0 where there is none, and the tests are skipped."""

_DEVICE = torch.device("cuda", 0)
# DeepSeek-V3, GLM-4.5, LongCat-Flash with its narrow tiles up to M = 8, gpt-oss.
TARGETS = (
    Target(_DEVICE, SM, 256, 7168),
    Target(_DEVICE, SM, 160, 5120, torch.float32),
    Target(_DEVICE, SM, 768, 6144, torch.float32),
    Target(_DEVICE, SM, 128, 2880, logits_dtype=torch.bfloat16, bias=True),
)
"""A gate of each form that `cluster` has, for what must hold for all of them."""
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def random_bias(target: Target) -> torch.Tensor | None:
    """A fresh one; None where the gate has none."""
    if not target.bias:
        return None
    return torch.randn(target.num_experts, dtype=torch.bfloat16, device="cuda")


def run_of(
    backend: str,
    num_experts: int = 256,
    hidden_size: int = 7168,
    dtype: torch.dtype = torch.bfloat16,
    logits_dtype: torch.dtype = torch.float32,
    has_bias: bool = False,
) -> Run:
    """The kernel of `backend`, loaded; the test is skipped where it cannot be had."""
    weight = torch.empty(num_experts, hidden_size, dtype=dtype, device="cuda")
    bias = weight[:, 0] if has_bias else None
    plan = make_plan(weight, backend, own_logits_dtype=logits_dtype, bias=bias)
    if plan.run is None:
        assert backend == "sgl_kernel", plan.decision.reason
        pytest.skip(plan.decision.reason)
    return plan.run


def gate_with(weight: torch.Tensor) -> torch.nn.Module:
    """A gate of this weight, planned for what the environment asks."""
    gate = torch.nn.Module()
    gate.weight = torch.nn.Parameter(weight, requires_grad=False)
    plan_gate(gate)
    return gate


def build_program(source: Path, include: Path, program: Path) -> Path:
    """Compiles a CUDA program that includes a kernel's header."""
    subprocess.run(
        [
            *(str(jit.find_nvcc(SM)), "-std=c++17", "-O3", "-lineinfo"),
            *(f"-gencode=arch=compute_{SM}a,code=sm_{SM}a", f"-I{include}"),
            *(str(source), "-o", str(program)),
        ],
        check=True,
    )
    return program


def assert_sanitized(tool: str, program: Path) -> None:
    """The program must print "right" and compute-sanitizer find nothing."""
    if not shutil.which("compute-sanitizer"):
        pytest.skip("needs compute-sanitizer")
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "right" in done.stdout
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout
