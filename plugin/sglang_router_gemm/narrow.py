"""SGLang's methods without the cast that some make for their gate.

They widen hidden_states to fp32 for it, in a launch of its own. Our kernel reads them as they are.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

ATTRIBUTE = "router_input_dtype"
"""What a gate has that takes hidden_states of another dtype. Under LoRA, say, it is wrapped."""

_CASTS = ("to(torch.float32)", "to(dtype=torch.float32)")


def narrowed(module: ModuleType, name: str, method: str, gate: str) -> Callable[..., Any]:
    """A method of SGLang's that asks its gate what to cast hidden_states to.

    Args:
        module: one of SGLang's.
        name: a class in it.
        method: of that class; it calls `self.<gate>(<expression>.to(torch.float32))`.
        gate: the attribute.

    Raises:
        ValueError: it is not that.
    """
    where = f"{module.__name__}.{name}.{method}"
    own = getattr(getattr(module, name), method, None)
    if not inspect.isfunction(own) or own.__module__ != module.__name__ or own.__closure__:
        raise ValueError(f"{where} must be a plain function of SGLang's")
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    calls: list[Any] = [node for node in ast.walk(tree) if _calls(node, f"self.{gate}")]
    if not calls:
        raise ValueError(f"{where} does not call self.{gate}")
    wanted = f"getattr(self.{gate}, {ATTRIBUTE!r}, torch.float32)"
    for call in calls:
        cast = call.args[0] if len(call.args) == 1 else None
        if not isinstance(cast, ast.Call) or not ast.unparse(cast).endswith(_CASTS):
            raise ValueError(f"{where} calls {ast.unparse(call)}, must give it .to(torch.float32)")
        dtype = ast.parse(wanted, mode="eval").body
        cast.args, cast.keywords = [ast.copy_location(dtype, cast)], []
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, own.__code__.co_firstlineno - 1)
    compiled = compile(tree, own.__code__.co_filename, "exec").co_consts
    code = next(each for each in compiled if isinstance(each, CodeType) and each.co_name == method)
    return FunctionType(code, vars(module), method, own.__defaults__)


def _calls(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == function
