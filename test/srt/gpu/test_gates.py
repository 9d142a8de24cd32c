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
