"""Puts the gate's plan in front of `MoEGate.forward`, once SGLang's model is imported.

Not through SGLang's HookRegistry, for two reasons. It imports the model in every process
that loads plugins, and most of them never build one. And our forward must lie below every
other plugin's hook, whatever the order in which they register: HookRegistry applies its
hooks to a class that is imported, and by then ours is part of it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import wrapt

from sglang_router_gemm.contract import GATE_CLASS, examine

logger = logging.getLogger(__name__)

MODEL = "sglang.srt.models.deepseek_v2"


def register() -> None:
    """Patches the model when it is imported, or now, where it is."""
    wrapt.register_post_import_hook(patch, MODEL)


def patch(model: ModuleType) -> None:
    """Hooks `model`'s gate, where it is as the patch needs it. It never raises."""
    try:
        _patch(model)
    except Exception:  # SGLang must go on
        logger.warning(
            "Router GEMM: the gate cannot be hooked, SGLang's own serves instead.", exc_info=True
        )


def _patch(model: ModuleType) -> None:
    assert model.__file__ is not None
    contract = examine(Path(model.__file__).parents[2])
    if contract.problem is not None:
        logger.warning(
            "Router GEMM: this SGLang does not fit, its own gate serves instead: %s.",
            contract.problem,
        )
        return
    if contract.in_tree:
        logger.info("Router GEMM: SGLang's %s has the fast path, the plugin rests.", GATE_CLASS)
        return
    from sglang.srt.models.deepseek_v2_gate import plan_gate, router_logits

    gate_class = getattr(model, GATE_CLASS)
    own_init: Callable[..., None] = gate_class.__init__
    own_forward: Callable[..., torch.Tensor] = gate_class.forward

    @functools.wraps(own_init)
    def init(gate: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        own_init(gate, *args, **kwargs)
        plan_gate(gate)

    @functools.wraps(own_forward)
    def forward(
        gate: torch.nn.Module,
        hidden_states: torch.Tensor,
        gemm_output_zero_allocator: Any = None,
        forward_batch: Any = None,
    ) -> torch.Tensor:
        logits = router_logits(gate, hidden_states, forward_batch)
        if logits is not None:
            return logits
        return own_forward(gate, hidden_states, gemm_output_zero_allocator, forward_batch)

    gate_class.router_plan = None  # of a gate that was built by other means
    gate_class.__init__, gate_class.forward = init, forward
    logger.info("Router GEMM: %s.%s is hooked.", MODEL, GATE_CLASS)
