"""Gates of other models on a real GPU, hooked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.gpu

HOOKED = """
import importlib, types
import torch
import sglang_router_gemm
from sglang_router_gemm import hooks
hooks.register()
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cuda"))
torch.set_float32_matmul_precision("{precision}")
module = importlib.import_module("sglang.srt.models.glm4_moe")
from sglang.srt.models.deepseek_v2_gate import router_logits
with torch.device("cuda"), torch.no_grad():
    gate = module.Glm4MoeGate(types.SimpleNamespace(n_routed_experts=160, hidden_size=5120))
    gate.requires_grad_(False)
    torch.nn.init.normal_(gate.weight)
    for num_tokens in (1, 8, 16, 128, 129):
        hidden_states = torch.randn(num_tokens, 5120, dtype=torch.bfloat16)
        logits, ours = gate(hidden_states), router_logits(gate, hidden_states)
        assert (ours is not None) == (num_tokens <= 128), gate.router_plan.decision.reason
        assert ours is None or torch.equal(logits, ours)
        expected = hidden_states.double() @ gate.weight.double().t()
        error = float((logits.double() - expected).norm() / expected.norm())
        assert error < (1e-6 if ours is not None else 1e-3), error
print("RIGHT")
"""


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_gate_of_glm(precision: str, run_python: Callable[..., str]) -> None:
    """Under "high" SGLang's own is TF32, which must not make the load refuse the kernel."""
    code = HOOKED.format(precision=precision)
    said = run_python(code, SGLANG_ROUTER_GEMM_BACKEND="cluster")
    assert "RIGHT" in said.splitlines(), said


HOOKED_GATE = """
import torch
import sglang_router_gemm
from sglang_router_gemm import hooks
hooks.register()
import blocks
from sglang.srt.layers.moe_router.models import GATES
from sglang.srt.models.deepseek_v2_gate import router_logits
gate = next(each for each in GATES if each.module == "{module}")"""

METHOD = (
    HOOKED_GATE
    + """
with blocks.one_rank("cuda"), torch.device("cuda"), torch.no_grad():
    block, linear = blocks.build(gate, {num_experts}, {hidden_size})
    method = getattr(type(block), gate.method)
    for num_tokens in (1, 8, 16, 33, 128, 129):
        hidden_states = torch.randn(num_tokens, {hidden_size}, dtype=torch.bfloat16)
        logits, own = method(block, hidden_states), method.__wrapped__(block, hidden_states)
        assert logits.dtype == own.dtype == torch.float32
        expected = hidden_states.double() @ linear.weight.double().t()
        error = float((logits.double() - expected).norm() / expected.norm())
        assert error < (1e-6 if num_tokens <= 128 else 1e-5), (num_tokens, error)
        torch.testing.assert_close(logits, own, rtol=1e-3, atol=1e-2)
        ours = router_logits(linear, hidden_states)
        assert torch.equal(logits, own if num_tokens > 128 else ours), num_tokens
    assert linear.router_plan.decision.backend is not None, linear.router_plan.decision.reason
print("RIGHT")
"""
)


@pytest.mark.parametrize(
    ("module", "num_experts", "hidden_size"),
    [("longcat_flash", 768, 6144), ("minimax_m3", 128, 6144), ("beam", 256, 5120)],
)
def test_the_gates_whose_block_multiplies(
    module: str, num_experts: int, hidden_size: int, run_python: Callable[..., str]
) -> None:
    code = METHOD.format(module=module, num_experts=num_experts, hidden_size=hidden_size)
    said = run_python(code, SGLANG_ROUTER_GEMM_BACKEND="cluster")
    assert "RIGHT" in said.splitlines(), said


WIDE = (
    HOOKED_GATE
    + """
torch.manual_seed(0)
with blocks.one_rank("cuda"), torch.device("cuda"), torch.no_grad():
    block, linear = blocks.build(gate, {num_experts}, {hidden_size})
    linear.weight *= {hidden_size} ** -0.5
    traced = torch.compile(lambda x: linear(x)[0], fullgraph=True, dynamic=True)
    for num_tokens in (1, 16, 128, 129, 1000):
        hidden_states = torch.randn(num_tokens, {hidden_size}, dtype=torch.bfloat16)
        logits, own = linear(hidden_states)[0], linear.own_logits(linear, hidden_states)
        assert own.dtype == torch.bfloat16
        for each in (logits, traced(hidden_states)):
            assert each.dtype == torch.float32
            expected = hidden_states.double() @ linear.weight.double().t()
            assert float((each.double() - expected).norm() / expected.norm()) < 3e-6
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = linear(hidden_states)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, logits)
        ids, wide = (
            block.topk(hidden_states, each).topk_ids.sort().values for each in (own, logits)
        )
        assert float((ids == wide).float().mean()) > 0.8
    print("BY", linear.router_plan.decision.backend.name)
"""
)


@pytest.mark.parametrize(
    ("module", "num_experts", "hidden_size", "backend"),
    [
        ("qwen3_moe", 128, 4096, "cluster"),
        ("qwen2_moe", 512, 2048, "cluster"),
        ("kimi_linear", 256, 2304, "cluster"),
        ("hunyuan", 64, 4096, "torch"),
    ],
)
def test_fp32_logits_that_sglangs_top_k_takes(
    module: str, num_experts: int, hidden_size: int, backend: str, run_python: Callable[..., str]
) -> None:
    code = WIDE.format(module=module, num_experts=num_experts, hidden_size=hidden_size)
    said = run_python(code, SGLANG_ROUTER_GEMM_BACKEND="auto,fp32")
    assert f"BY {backend}" in said.splitlines(), said


LINEAR = (
    HOOKED_GATE
    + """
torch.manual_seed(0)
with blocks.one_rank("cuda"), torch.device("cuda"), torch.no_grad():
    block, linear = blocks.build(gate, {num_experts}, {hidden_size})
    own_class = next(each for each in type(linear).__mro__ if "own_logits" not in vars(each))
    for num_tokens in (1, 8, 16, 33, 128, 129):
        hidden_states = torch.randn(num_tokens, {hidden_size}, dtype=torch.bfloat16)
        (logits, extra), ours = linear(hidden_states), router_logits(linear, hidden_states)
        assert extra is None
        assert (ours is not None) == (num_tokens <= 128), linear.router_plan.decision.reason
        own, _ = own_class.forward(linear, hidden_states.to(linear.weight.dtype))
        assert torch.equal(logits, own if ours is None else ours)
        assert logits.dtype == own.dtype
        expected = hidden_states.double() @ linear.weight.double().t()
        if linear.bias is not None:
            expected += linear.bias.double()
        error = float((logits.double() - expected).norm() / expected.norm())
        most = 1e-6 if logits.dtype == torch.float32 else 2.0**-8
        assert error < (most if ours is not None else 1e-2), (num_tokens, error)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = linear(hidden_states)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, logits)
    for name in gate.casting:  # as in SGLang's server: its method, and ours without the cast
        assert vars(block)[name].__func__ is not getattr(type(block), name)
    traced = torch.compile(lambda x: linear(x)[0], fullgraph=True, dynamic=True)
    for num_tokens in (5, 130):
        hidden_states = torch.randn(num_tokens, {hidden_size}, dtype=torch.bfloat16)
        found, (logits, _) = traced(hidden_states), linear(hidden_states)
        assert found.dtype == logits.dtype
        torch.testing.assert_close(found, logits, rtol=2e-2, atol=0.5)
print("RIGHT")
"""
)


@pytest.mark.parametrize(
    ("module", "num_experts", "hidden_size"),
    [
        ("qwen3_moe", 128, 4096),
        ("qwen2_moe", 512, 2048),
        ("kimi_linear", 256, 2304),
        ("hunyuan", 64, 4096),
        ("gpt_oss", 128, 2880),
        ("minimax_m2", 256, 3072),
        ("hunyuan_v3", 192, 4096),
        ("step3p5", 288, 4096),
    ],
)
def test_the_gates_that_are_linear_layers(
    module: str, num_experts: int, hidden_size: int, run_python: Callable[..., str]
) -> None:
    code = LINEAR.format(module=module, num_experts=num_experts, hidden_size=hidden_size)
    said = run_python(code, SGLANG_ROUTER_GEMM_BACKEND="cluster")
    assert "RIGHT" in said.splitlines(), said


MULTIPLIES = (
    HOOKED_GATE
    + """
torch.manual_seed(0)
with blocks.one_rank("cuda"), torch.device("cuda"), torch.no_grad():
    options = {{gate.fp32_if: True}}
    block, linear = blocks.build(gate, {num_experts}, {hidden_size}, **options)
    for num_tokens in (1, 8, 16, 33, 128, 129):
        hidden_states = torch.randn(num_tokens, {hidden_size}, dtype=torch.bfloat16)
        ours = router_logits(linear, hidden_states)
        assert (ours is not None) == (num_tokens <= 128), linear.router_plan.decision.reason
        expected = hidden_states.double() @ linear.weight.double().t()
        for logits, own in blocks.call_methods(gate, block, hidden_states):
            assert torch.equal(logits, own if ours is None else ours)
            assert logits.dtype == own.dtype == torch.float32
            error = float((logits.double() - expected).norm() / expected.norm())
            assert error < (1e-6 if ours is not None else 1e-5), (num_tokens, error)
        logits = block.forward_normal(hidden_states)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block.forward_normal(hidden_states)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, logits)
    traced = torch.compile(block.forward_normal, fullgraph=True, dynamic=True)
    for num_tokens in (5, 130):
        hidden_states = torch.randn(num_tokens, {hidden_size}, dtype=torch.bfloat16)
        found, logits = traced(hidden_states), block.forward_normal(hidden_states)
        assert found.dtype == logits.dtype
        torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-2)
print("RIGHT")
"""
)


@pytest.mark.parametrize(("module", "num_experts", "hidden_size"), [("step3p5", 288, 4096)])
def test_the_gates_whose_block_multiplies_in_its_midst(
    module: str, num_experts: int, hidden_size: int, run_python: Callable[..., str]
) -> None:
    code = MULTIPLIES.format(module=module, num_experts=num_experts, hidden_size=hidden_size)
    said = run_python(code, SGLANG_ROUTER_GEMM_BACKEND="cluster")
    assert "RIGHT" in said.splitlines(), said
