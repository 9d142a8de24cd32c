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


def narrowed(module: ModuleType, name: str, method: str, gate: str) -> Callable[..., Any]:
    """A method that gives its gate hidden_states as they are, and is SGLang's own otherwise.

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
    for call in calls:
        given = call.args[0] if len(call.args) == 1 else call
        wide = isinstance(given, ast.Call) and isinstance(given.func, ast.Attribute)
        if not wide or not ast.unparse(given).endswith(_CASTS):
            raise ValueError(f"{where} calls {ast.unparse(call)}, must give it .to(torch.float32)")
        call.args = [given.func.value]
    ast.increment_lineno(tree, own.__code__.co_firstlineno - 1)
    compiled = compile(tree, own.__code__.co_filename, "exec").co_consts
    code = next(each for each in compiled if isinstance(each, CodeType) and each.co_name == method)
    return FunctionType(code, vars(module), method, own.__defaults__)


_CASTS = (".to(torch.float32)", ".to(dtype=torch.float32)")


def _calls(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == function
