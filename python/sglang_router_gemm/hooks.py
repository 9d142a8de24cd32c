"""The hooks that put the gate's fast path in front of `MoEGate.forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang.srt.models.deepseek_v2_gate import fast_router_logits, prepare_router_gemm
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

GATE = "sglang.srt.models.deepseek_v2.MoEGate"


def register() -> None:
    """Registers the hooks with SGLang, which applies them after it has loaded all plugins."""
    HookRegistry.register(f"{GATE}.__init__", _after_init, HookType.AFTER)
    HookRegistry.register(f"{GATE}.forward", _around_forward, HookType.AROUND)


def _after_init(result: None, gate: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    prepare_router_gemm(gate.weight)


def _around_forward(
    original_forward: Callable[..., torch.Tensor],
    gate: torch.nn.Module,
    hidden_states: torch.Tensor,
    gemm_output_zero_allocator: Any = None,
    forward_batch: Any = None,
) -> torch.Tensor:
    logits = fast_router_logits(hidden_states, gate.weight, forward_batch)
    if logits is not None:
        return logits
    return original_forward(gate, hidden_states, gemm_output_zero_allocator, forward_batch)
