"""Puts our plans in front of SGLang's gate, its top-k and its alignment, once they are imported.

Not through SGLang's HookRegistry, for two reasons. It imports what it hooks in every process
that loads plugins, and most of them never build a model. And ours must lie below every other
plugin's hooks, whatever the order in which they register: HookRegistry applies its hooks to
what is imported, and by then ours is part of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import wrapt

from sglang_router_gemm.contract import GATE_CLASS, examine, examine_routing
from sglang_router_gemm.narrow import ASKED, ATTRIBUTE, asking, narrowed

if TYPE_CHECKING:
    from sglang.srt.layers.moe_router.models import Gate

logger = logging.getLogger(__name__)

MODEL = "sglang.srt.models.deepseek_v2"
TOPK = "sglang.srt.layers.moe.topk"
ALIGN = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"


def register() -> None:
    """Patches each of SGLang's modules when it is imported, or now, where it is."""
    from sglang.srt.layers.moe_router.models import GATES

    others = {
        f"sglang.srt.models.{each.module}": functools.partial(_patch_of(each), each)
        for each in GATES
    }
    for name, patch in (PATCHES | others).items():
        wrapt.register_post_import_hook(functools.partial(_guarded, patch), name)


def _patch_of(gate: Gate) -> Callable[[Gate, ModuleType], None]:
    if gate.linear is None:
        return patch_plain_gate
    return patch_linear_gate if gate.method is None else patch_method_gate


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


def patch_plain_gate(gate: Gate, model: ModuleType) -> None:
    """The same for a gate of `models.GATES` that is a class."""
    if _is_there(gate, model) and _fits(gate, model, "forward"):
        _hook(model, gate.name, _plain_forward, gate.logits_dtype)


def _is_there(gate: Gate, model: ModuleType) -> bool:
    """Whether a gate may be hooked: older releases lack some, and `patch_gate` warns of others."""
    return hasattr(model, gate.name) and _contract(_package(model)).problem is None


def _fits(gate: Gate, model: ModuleType, method: str) -> bool:
    """Whether the method that gives the logits takes hidden_states alone; warns if not."""
    own = getattr(getattr(model, gate.name), method, None)
    taken = ", ".join(inspect.signature(own).parameters) if own is not None else "nothing"
    if taken == "self, hidden_states":
        return True
    logger.warning(
        "Router GEMM: this SGLang's %s.%s does not fit, it serves itself: %s takes (%s), "
        "must take (self, hidden_states).",
        model.__name__,
        gate.name,
        method,
        taken,
    )
    return False


def _hook(
    model: ModuleType,
    name: str,
    make_forward: Callable[..., Callable[..., torch.Tensor]],
    logits_dtype: torch.dtype | None = torch.float32,
) -> None:
    """Hooks SGLang's gate of this name: what it has built is planned, and a call asks the plan."""
    from sglang.srt.models.deepseek_v2_gate import plan_gate

    gate_class = _class_of(model, name)
    if gate_class is None:
        return
    own_forward: Callable[..., torch.Tensor] = gate_class.forward

    def plan(gate: Any) -> None:
        plan_gate(gate, own_forward, logits_dtype)

    _plan_after_init(gate_class, plan)
    gate_class.router_plan = None  # of a gate that was built by other means
    gate_class.forward = functools.wraps(own_forward)(make_forward(own_forward))


def _class_of(model: ModuleType, name: str) -> Any:
    """SGLang's class of this name, which another plugin may have subclassed.

    None where that has replaced it, and where it is hooked already.
    """
    for found in getattr(model, name).__mro__:
        if (found.__module__, found.__qualname__) == (model.__name__, name):
            break
    else:
        logger.warning(
            "Router GEMM: another plugin has replaced %s.%s, that one serves.",
            model.__name__,
            name,
        )
        return None
    if "_router_gemm_hooked" in vars(found):
        return None
    found._router_gemm_hooked = True
    logger.info("Router GEMM: %s.%s is hooked.", model.__name__, name)
    return found


def _plan_after_init(hooked: Any, plan: Callable[[Any], None]) -> None:
    own_init: Callable[..., None] = hooked.__init__

    @functools.wraps(own_init)
    def init(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        own_init(module, *args, **kwargs)
        try:
            plan(module)
        except Exception:  # a gate that is not as expected: SGLang must go on
            logger.warning(
                "Router GEMM: a gate cannot be planned, SGLang's own path serves it.",
                exc_info=True,
            )

    hooked.__init__ = init


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


# ---- A gate that is a linear layer -------------------------------------------------------------


def patch_linear_gate(gate: Gate, model: ModuleType) -> None:
    """The same for a gate of `models.GATES` that is a linear layer in a class."""
    if not _is_there(gate, model):
        return
    from sglang.srt.models.deepseek_v2_gate import plan_gate, say_why_left

    assert gate.linear is not None
    attribute = gate.linear
    narrow = {name: narrowed(model, gate.name, name, attribute) for name in gate.casting}
    ask, product = asking(model, gate.name, gate.multiplying, attribute)
    block_class = _class_of(model, gate.name)
    if block_class is None:
        return

    def plan(block: Any) -> None:
        linear = getattr(block, attribute)
        if hasattr(linear, "own_logits"):  # a block of a block's class: it is planned
            return
        reason = _why_not_planned(linear)
        if reason is not None:
            say_why_left(f"{model.__name__}.{gate.name}.{attribute}", reason)
            return
        linear_class: Any = type(linear)
        asked = gate.fp32_if is not None and getattr(block, gate.fp32_if)
        planned = _asked(linear_class, product) if asked else _planned(linear_class)
        logits_dtype = torch.float32 if asked else gate.logits_dtype
        plan_gate(linear, planned.own_logits, logits_dtype, linear.bias)
        # One class more, not a function on the layer: a copy's would have the first one's weight.
        if linear.router_plan is not None and linear.router_plan.decision.backend is not None:
            linear.__class__ = planned
            for name, method in (ask if asked else narrow).items():
                if getattr(type(block), name) is inspect.unwrap(method):  # not another plugin's
                    setattr(block, name, types.MethodType(method, block))

    _plan_after_init(block_class, plan)


def _why_not_planned(linear: Any) -> str | None:
    """Why a gate's layer keeps its own forward, as a phrase; None where ours may be ahead of it."""
    from sglang.srt.layers.linear import ReplicatedLinear

    if not isinstance(linear, ReplicatedLinear):
        return f"it is a {type(linear).__name__}, must be a ReplicatedLinear"
    if linear.skip_bias_add:
        return "somebody else adds its bias"
    forward = type(linear).forward
    if hasattr(forward, "__wrapped__"):  # ours would be ahead of it, and it is to see every call
        return "another plugin has hooked its forward"
    taken = ", ".join(inspect.signature(forward).parameters)
    return None if taken == "self, x" else f"its forward takes ({taken}), must take (self, x)"


@functools.cache  # one for all layers: gates of one shape share a plan, and so its comparison
def _planned(linear: Any) -> Any:
    """The class of a linear layer that asks its plan first."""
    from sglang.srt.models.deepseek_v2_gate import router_logits

    own_forward: Callable[..., tuple[torch.Tensor, Any]] = linear.forward

    def forward(gate: Any, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        logits = router_logits(gate, x)
        return own_forward(gate, x.to(gate.weight.dtype)) if logits is None else (logits, None)

    def own_logits(gate: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return own_forward(gate, hidden_states.to(gate.weight.dtype))[0]

    body = {
        "__module__": linear.__module__,
        "__qualname__": linear.__qualname__,
        "forward": functools.wraps(own_forward)(forward),
        "own_logits": staticmethod(own_logits),
        ATTRIBUTE: torch.bfloat16,
    }
    return type(linear.__name__, (linear,), body)


@functools.cache
def _asked(linear: Any, product: Callable[..., torch.Tensor]) -> Any:
    """The class of a linear layer that is asked for the product with its weight."""
    from sglang.srt.models.deepseek_v2_gate import router_logits

    def fp32_logits(gate: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = router_logits(gate, hidden_states)
        return product(gate, hidden_states) if logits is None else logits

    # Its forward stays: up to 0.5.21 another method of the block calls it for bf16 logits.
    body = {"own_logits": staticmethod(product), ASKED: fp32_logits}
    names = {"__module__": linear.__module__, "__qualname__": linear.__qualname__}
    return type(linear.__name__, (linear,), names | body)


def patch_method_gate(gate: Gate, model: ModuleType) -> None:
    """The same where a method of the class multiplies by the linear layer's weight."""
    assert gate.linear is not None
    assert gate.method is not None
    if not (_is_there(gate, model) and _fits(gate, model, gate.method)):
        return
    block_class = _class_of(model, gate.name)
    if block_class is None:
        return
    from sglang.srt.models.deepseek_v2_gate import plan_gate, router_logits, say_why_left

    attribute = gate.linear
    own: Callable[..., torch.Tensor] = getattr(block_class, gate.method)

    def own_logits(linear: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        twin = copy.copy(linear.router_block())
        twin.__dict__["_modules"] = twin._modules | {attribute: linear}
        return own(twin, hidden_states)

    def plan(block: Any) -> None:
        linear = getattr(block, attribute)
        reason = _why_not_planned(linear) or ("it adds a bias" if linear.bias is not None else None)
        if reason is not None:
            say_why_left(f"{model.__name__}.{gate.name}.{attribute}", reason)
            return
        linear.router_block = weakref.ref(block)
        try:
            plan_gate(linear, own_logits, gate.logits_dtype)
        finally:
            del linear.router_block

    def method(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        linear = getattr(block, attribute)
        planned = getattr(linear, "router_plan", None) is not None
        logits = router_logits(linear, hidden_states) if planned else None
        return own(block, hidden_states) if logits is None else logits

    _plan_after_init(block_class, plan)
    setattr(block_class, gate.method, functools.wraps(own)(method))


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
