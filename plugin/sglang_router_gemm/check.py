"""`sglang-router-gemm check`: the logits of SGLang's real gate, with the plugin, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tabulate import tabulate

from sglang.srt.layers.moe_router.environ import requested_backend
from sglang.srt.layers.moe_router.kernel import dtype_name
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3
from sglang.srt.plugins import load_plugins
from sglang_router_gemm.routing import relative_error

NUM_EXPERTS, HIDDEN_SIZE = DEEPSEEK_V3.num_experts, DEEPSEEK_V3.hidden_size
NUM_TOKENS = range(1, 65)

# The relative error that rounding explains: of cuBLAS's fp32 accumulation on tensor
# cores, which serves M > 16 (1.4e-6 on an H100, torch 2.11, 2026-11-22; the router
# kernels stay below 1e-6), and of the bf16 logits that SGLang's own path returns on a
# CPU (8 bits of mantissa).
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8}


class GateCheck(NamedTuple):
    """The worst relative error, ‖logits - fp64‖ / ‖fp64‖, of one gate over all M."""

    gate: str
    logits_dtype: torch.dtype
    relative_error: float

    @property
    def passed(self) -> bool:
        return self.relative_error <= TOLERANCE[self.logits_dtype]


def sglang_gate(
    device: torch.device,
    num_experts: int = NUM_EXPERTS,
    hidden_size: int = HIDDEN_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.nn.Module:
    """SGLang's `MoEGate`, by default at DeepSeek-V3's width, with every plugin applied.

    A release that knows no `router_fp32` gives it a bf16 weight where `dtype` is fp32.
    """
    load_plugins()
    from sglang.srt.models.deepseek_v2 import MoEGate
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    # MoEGate.forward asks the published ServerArgs for deterministic inference.
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device=device.type))
    return _build(
        lambda config: MoEGate(config, quant_config=None), device, num_experts, hidden_size, dtype
    )


def deepseek_v2_gate(device: torch.device) -> torch.nn.Module:
    """`DeepseekV2Gate` at DeepSeek-V3's width, as it is without the plugin."""
    from sglang.srt.models.deepseek_v2_gate import DeepseekV2Gate

    return _build(DeepseekV2Gate, device)


def check_gate(name: str, gate: torch.nn.Module) -> GateCheck:
    """Runs `gate` on fresh random inputs for every M in `NUM_TOKENS`."""
    weight = gate.weight
    expected_by = weight.double().t()
    worst, dtype = 0.0, torch.float32
    with torch.no_grad():
        for num_tokens in NUM_TOKENS:
            hidden_states = torch.randn(
                num_tokens, HIDDEN_SIZE, dtype=weight.dtype, device=weight.device
            )
            logits, expected = gate(hidden_states), hidden_states.double() @ expected_by
            worst = max(worst, relative_error(logits, expected))
            dtype = logits.dtype
    return GateCheck(name, dtype, worst)


def run() -> int:
    """Prints a table of both gates; 1 where one is off by more than rounding, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = [
        check_gate("SGLang's MoEGate with the plugin", sglang_gate(device)),
        check_gate("DeepseekV2Gate alone", deepseek_v2_gate(device)),
    ]
    rows = [
        (
            check.gate,
            dtype_name(check.logits_dtype),
            f"{check.relative_error:.1e}",
            f"{TOLERANCE[check.logits_dtype]:.1e}",
            "ok" if check.passed else "WRONG",
        )
        for check in checks
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"Gates [{NUM_EXPERTS}, {HIDDEN_SIZE}] on {name}, M = {NUM_TOKENS[0]} to "
        f"{NUM_TOKENS[-1]}, backend {requested_backend()}, relative error to fp64:"
    )
    headers = ("gate", "logits", "relative error", "allowed", "")
    print(tabulate(rows, headers, disable_numparse=True))
    return int(not all(check.passed for check in checks))


def _build(
    make_gate: Callable[[SimpleNamespace], torch.nn.Module],
    device: torch.device,
    num_experts: int = NUM_EXPERTS,
    hidden_size: int = HIDDEN_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.nn.Module:
    config = SimpleNamespace(
        n_routed_experts=num_experts,
        hidden_size=hidden_size,
        topk_method="noaux_tc",
        router_fp32=dtype == torch.float32,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as SGLang's loader does around the model
    try:
        with device:
            gate = make_gate(config)
    finally:
        torch.set_default_dtype(previous)
    torch.nn.init.normal_(gate.weight)
    return gate.requires_grad_(False)
