"""The SGLang plugin: puts the gate's fast path in front of `MoEGate.forward`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglang.srt.models.deepseek_v2_gate import fast_router_logits, prepare_router_gemm
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils.router_gemm.environ import requested_backend

logger = logging.getLogger(__name__)

GATE = "sglang.srt.models.deepseek_v2.MoEGate"


def activate() -> None:
    """Entry point `dsv3_router_gemm` of the group `sglang.srt.plugins`.

    SGLang calls it early in every process and then applies the hooks.

    Raises:
        ValueError: `SGLANG_ROUTER_GEMM_BACKEND` holds an unknown name. SGLang logs the
            error and goes on without the plugin.
    """
    if requested_backend() == "off":
        logger.info("Router GEMM: SGLANG_ROUTER_GEMM_BACKEND=off, SGLang's gate is untouched.")
        return
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
