"""FlashInfer's router GEMM against fp64, its op under torch.compile, and MoEGate."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from sglang.kernels.ops.gemm.flashinfer_dsv3_router_gemm import (
    flashinfer_dsv3_router_gemm,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=120, stage="base-b-kernel-unit", runner_config="4-gpu-b200")

NUM_EXPERTS, HIDDEN_SIZE = 256, 7168


def is_datacenter_blackwell() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() in (
        (10, 0),
        (10, 3),
    )


needs_blackwell = pytest.mark.skipif(
    not is_datacenter_blackwell(), reason="SM100 or SM103 required"
)


def operands(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    hidden_states, weight = (
        torch.randn(rows, HIDDEN_SIZE, device="cuda", generator=generator).bfloat16()
        for rows in (num_tokens, NUM_EXPERTS)
    )
    return hidden_states, weight


def assert_like_fp64(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> None:
    assert logits.dtype == torch.float32
    expected = hidden_states.double() @ weight.double().t()
    size = hidden_states.double().norm(dim=1, keepdim=True) * weight.double().norm(
        dim=1
    )
    assert ((logits.double() - expected).abs() <= 1e-6 * size).all()


def test_the_schema_says_what_it_writes() -> None:
    schema = torch.ops.sglang.flashinfer_dsv3_router_gemm.default._schema
    written = [each.name for each in schema.arguments if each.is_write]
    assert written == ["logits"]


@needs_blackwell
@pytest.mark.parametrize("num_tokens", range(1, 17))
def test_like_fp64(num_tokens: int) -> None:
    hidden_states, weight = operands(num_tokens)
    logits = flashinfer_dsv3_router_gemm(hidden_states, weight)
    assert_like_fp64(logits, hidden_states, weight)


@needs_blackwell
@torch.no_grad()
def test_under_torch_compile() -> None:
    hidden_states, weight = operands(16)

    def doubled(hidden_states: torch.Tensor) -> torch.Tensor:
        return flashinfer_dsv3_router_gemm(hidden_states, weight) * 2

    compiled = torch.compile(doubled, fullgraph=True)
    assert torch.equal(compiled(hidden_states), doubled(hidden_states))


@needs_blackwell
@torch.no_grad()
@pytest.mark.parametrize(
    "num_tokens,deterministic,taken",
    [(1, False, True), (16, False, True), (17, False, False), (16, True, False)],
)
def test_the_gate_takes_it(num_tokens: int, deterministic: bool, taken: bool) -> None:
    from sglang.srt.models import deepseek_v2

    hidden_states, weight = operands(num_tokens)
    config = SimpleNamespace(
        n_routed_experts=NUM_EXPERTS, hidden_size=HIDDEN_SIZE, topk_method="greedy"
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            gate = deepseek_v2.MoEGate(config, quant_config=None)
    finally:
        torch.set_default_dtype(default)
    gate.weight.data.copy_(weight)
    execution = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=deterministic)
    )
    with (
        patch.object(deepseek_v2, "get_exec", lambda: execution),
        patch.object(
            deepseek_v2,
            "flashinfer_dsv3_router_gemm",
            wraps=flashinfer_dsv3_router_gemm,
        ) as called,
    ):
        logits = gate(hidden_states)
    assert_like_fp64(logits, hidden_states, weight)
    assert called.call_count == taken


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
