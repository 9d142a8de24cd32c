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
    gate_class = _sglangs_own(getattr(model, GATE_CLASS))
    if gate_class is None:
        logger.warning(
            "Router GEMM: another plugin has replaced %s.%s, that one serves.", MODEL, GATE_CLASS
        )
        return
    if "router_plan" not in vars(gate_class):  # else it is hooked
        _hook(gate_class)
        logger.info("Router GEMM: %s.%s is hooked.", MODEL, GATE_CLASS)


def _sglangs_own(gate_class: type) -> Any:
    """SGLang's class, which another plugin may have subclassed; None if it has not even that."""
    for each in gate_class.__mro__:
        if (each.__module__, each.__qualname__) == (MODEL, GATE_CLASS):
            return each
    return None


def _hook(gate_class: Any) -> None:
    from sglang.srt.models.deepseek_v2_gate import plan_gate, router_logits

    own_init: Callable[..., None] = gate_class.__init__
    own_forward: Callable[..., torch.Tensor] = gate_class.forward

    @functools.wraps(own_init)
    def init(gate: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        own_init(gate, *args, **kwargs)
        try:
            plan_gate(gate, own_forward)
        except Exception:  # a gate that is not as expected: SGLang must go on
            logger.warning(
                "Router GEMM: a gate cannot be planned, SGLang's own path serves it.",
                exc_info=True,
            )

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
