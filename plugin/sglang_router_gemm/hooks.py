"""Puts our plans in front of SGLang's gate, its top-k and its alignment, once they are imported.

Not through SGLang's HookRegistry, for two reasons. It imports what it hooks in every process
that loads plugins, and most of them never build a model. And ours must lie below every other
plugin's hooks, whatever the order in which they register: HookRegistry applies its hooks to
what is imported, and by then ours is part of it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import wrapt

from sglang_router_gemm.contract import GATE_CLASS, examine, examine_routing

logger = logging.getLogger(__name__)

MODEL = "sglang.srt.models.deepseek_v2"
TOPK = "sglang.srt.layers.moe.topk"
ALIGN = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"


def register() -> None:
    """Patches each of SGLang's modules when it is imported, or now, where it is."""
    from sglang.srt.layers.moe_router.models import GATES

    plain = {
        f"sglang.srt.models.{each.module}": functools.partial(patch_plain_gate, each.name)
        for each in GATES
    }
    for name, patch in (PATCHES | plain).items():
        wrapt.register_post_import_hook(functools.partial(_guarded, patch), name)


def _guarded(patch: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        patch(module)
    except Exception:  # SGLang must go on
        logger.warning(
            "Router GEMM: %s cannot be hooked, SGLang's own serves instead.",
            module.__name__,
            exc_info=True,
        )


def _package(module: ModuleType) -> Path:
    """The folder `sglang` that a module of SGLang lies in."""
    assert module.__file__ is not None
    return Path(module.__file__).parents[module.__name__.count(".") - 1]


# ---- The gate ----------------------------------------------------------------------------------

_contract = functools.cache(examine)  # each gate's module asks it of the same sources


def patch_gate(model: ModuleType) -> None:
    """Hooks the model's gate, where it is as the patch needs it."""
    contract = _contract(_package(model))
    if contract.problem is not None:
        logger.warning(
            "Router GEMM: this SGLang does not fit, its own gate serves instead: %s.",
            contract.problem,
        )
        return
    if contract.in_tree:
        logger.info("Router GEMM: SGLang's %s has the fast path, the plugin rests.", GATE_CLASS)
        return
    _hook(model, GATE_CLASS, _forward_with_batch)


def patch_plain_gate(name: str, model: ModuleType) -> None:
    """The same for a gate of `models.GATES`."""
    if not hasattr(model, name):
        return  # an older release
    if _contract(_package(model)).problem is not None:
        return  # `patch_gate` says so
    taken = ", ".join(inspect.signature(getattr(model, name).forward).parameters)
    if taken != "self, hidden_states":
        logger.warning(
            "Router GEMM: this SGLang's %s.%s does not fit, it serves itself: forward takes (%s), "
            "must take (self, hidden_states).",
            model.__name__,
            name,
            taken,
        )
        return
    _hook(model, name, _plain_forward)


def _hook(
    model: ModuleType, name: str, make_forward: Callable[..., Callable[..., torch.Tensor]]
) -> None:
    """Hooks SGLang's class of this name, which another plugin may have subclassed."""
    for gate_class in getattr(model, name).__mro__:
        if (gate_class.__module__, gate_class.__qualname__) == (model.__name__, name):
            break
    else:
        logger.warning(
            "Router GEMM: another plugin has replaced %s.%s, that one serves.",
            model.__name__,
            name,
        )
        return
    if "router_plan" not in vars(gate_class):  # else it is hooked
        _hook_class(gate_class, make_forward)
        logger.info("Router GEMM: %s.%s is hooked.", model.__name__, name)


def _hook_class(gate_class: Any, make_forward: Callable[..., Callable[..., torch.Tensor]]) -> None:
    from sglang.srt.models.deepseek_v2_gate import plan_gate

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

    gate_class.router_plan = None  # of a gate that was built by other means
    gate_class.__init__ = init
    gate_class.forward = functools.wraps(own_forward)(make_forward(own_forward))


def _forward_with_batch(own_forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from sglang.srt.models.deepseek_v2_gate import router_logits

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

    return forward


def _plain_forward(own_forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from sglang.srt.models.deepseek_v2_gate import router_logits

    def forward(gate: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = router_logits(gate, hidden_states)
        return own_forward(gate, hidden_states) if logits is None else logits

    return forward


# ---- The routing behind it ---------------------------------------------------------------------


def patch_topk(topk: Any) -> None:
    """Hooks the top-k: each layer gets a plan when it is built, and `select_experts` asks it."""
    problem = examine_routing(_package(topk))
    if problem is not None:
        # No warning: SGLang up to 0.5.14 has no hook for captured experts, and that is all right.
        logger.info("Router GEMM: this SGLang's top-k does not fit, it serves itself: %s.", problem)
        return
    if not _is_new(topk):
        return
    from sglang.srt.layers.moe_router import route

    own_select: Callable[..., Any] = topk.select_experts
    own_init: Callable[..., None] = topk.TopK.__init__

    @functools.wraps(own_init)
    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        own_init(layer, *args, **kwargs)
        try:
            layer.topk_config.route_plan = route.make_route_plan(layer.topk_config, own_select)
        except Exception:  # a config that is not as expected: SGLang must go on
            logger.warning(
                "Router GEMM: a top-k cannot be planned, SGLang's own serves it.", exc_info=True
            )

    _replace(topk, "select_experts", functools.partial(route.select_experts, own_select, topk))
    topk.TopK.__init__ = init  # last: a layer that has a plan is asked for it


def patch_align(module: Any) -> None:
    """Hooks the alignment: ids that come with a plan of their experts need no other."""
    if examine_routing(_package(module)) is not None:
        return  # said where the top-k is hooked
    if getattr(module, "_SGLANG_EXPERIMENTAL_LORA_OPTI", False):
        return  # it aligns for LoRA in a way of its own
    if not _is_new(module):
        return
    from sglang.srt.layers.moe_router import route

    own_align: Callable[..., Any] = module.moe_align_block_size
    wrapper = functools.partial(route.moe_align_block_size, own_align)
    _replace(module, "moe_align_block_size", wrapper)


def _replace(module: ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Puts a wrapper in a function's place, also where a module has imported it by name."""
    own = getattr(module, name)
    function = functools.wraps(own)(wrapper)
    for each in list(sys.modules.values()):
        if getattr(each, "__dict__", {}).get(name) is own:  # None: an import that is blocked
            setattr(each, name, function)


def _is_new(module: Any) -> bool:
    """Whether a module has not been hooked yet; says from then on that it has."""
    if hasattr(module, "_router_gemm_hooked"):
        return False
    module._router_gemm_hooked = True
    return True


PATCHES = {MODEL: patch_gate, TOPK: patch_topk, ALIGN: patch_align}
