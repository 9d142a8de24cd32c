"""SGLang's methods without what some do in their gate's place.

Some widen hidden_states to fp32 for it, in a launch of its own; our kernel reads them as they are.
Some multiply by its weight themselves, after two such launches; they ask the gate for the logits.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

ATTRIBUTE = "router_input_dtype"
"""What a gate has that takes hidden_states of another dtype. Under LoRA, say, it is wrapped."""

ASKED = "router_fp32_logits"
"""The method of a gate that gives the logits in place of a product with its weight."""

_CASTS = ("to(torch.float32)", "to(dtype=torch.float32)")

_PRODUCT = "torch.matmul({}.to(torch.float32), {}.weight.t().to(torch.float32))"

Method = Callable[..., Any]


def narrowed(module: ModuleType, name: str, method: str, gate: str) -> Method:
    """A method of SGLang's that asks its gate what to cast hidden_states to.

    Args:
        module: one of SGLang's.
        name: a class in it.
        method: of that class; it calls `self.<gate>(<expression>.to(torch.float32))`.
        gate: the attribute.

    Raises:
        ValueError: it is not that.
    """
    where, own, tree = _read(module, name, method)
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
    return _compiled(own, tree)


def asking(
    module: ModuleType, name: str, methods: tuple[str, ...], gate: str
) -> tuple[dict[str, Method], Method]:
    """Methods of SGLang's that ask their gate for the logits, where it can be asked.

    Args:
        module: one of SGLang's.
        name: a class in it.
        methods: of that class; at least one multiplies by `self.<gate>.weight` in fp32.
        gate: the attribute.

    Returns:
        Those that multiply, by name, and `own_logits(gate, hidden_states)`, which multiplies as
        they do: each product in them was found to be this one.

    Raises:
        ValueError: they are not that.
    """
    found = {}
    for method in methods:
        where, own, tree = _read(module, name, method)
        asker = _Asker(where, f"self.{gate}")
        tree = asker.visit(tree)
        if asker.asks:  # up to 0.5.21 forward_deepep calls the layer instead
            found[method] = _compiled(own, tree)
    if methods and not found:
        raise ValueError(
            f"{module.__name__}.{name} multiplies by self.{gate}.weight in none of its methods "
            f"{', '.join(methods)}, must in one"
        )
    product = _PRODUCT.format("hidden_states", "gate")
    code = compile(f"lambda gate, hidden_states: {product}", inspect.getfile(module), "eval")
    return found, FunctionType(_code_in(code, "<lambda>"), vars(module), "own_logits")


class _Asker(ast.NodeTransformer):
    """Has each product with a gate's weight ask the gate first."""

    def __init__(self, where: str, gate: str) -> None:
        self.where, self.gate = where, gate
        self.asks = False
        self.statement: ast.AST | None = None

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt):
            self.statement = node
        return super().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node.args:
            case [ast.Call(func=ast.Attribute(value=given)), _]:
                hidden_states, own = ast.unparse(given), ast.unparse(node)
                if own == _PRODUCT.format(hidden_states, self.gate):
                    self.asks = True
                    asked = f"{self.gate}.{ASKED}({hidden_states})"
                    source = f"{asked} if hasattr({self.gate}, {ASKED!r}) else {own}"
                    expression: Any = ast.parse(source, mode="eval").body
                    for each in ast.walk(expression):
                        ast.copy_location(each, node)
                    expression.orelse = node
                    return expression
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node) == f"{self.gate}.weight":
            assert self.statement is not None
            raise ValueError(
                f"{self.where} has {ast.unparse(self.statement)}, must use {self.gate}.weight in "
                f"{_PRODUCT.format('hidden_states', self.gate)} only"
            )
        return self.generic_visit(node)


def _read(module: ModuleType, name: str, method: str) -> tuple[str, FunctionType, ast.Module]:
    """A method's full name, itself and its source; ValueError where it is not SGLang's alone."""
    where = f"{module.__name__}.{name}.{method}"
    own = getattr(getattr(module, name), method, None)
    if not inspect.isfunction(own) or own.__module__ != module.__name__ or own.__closure__:
        raise ValueError(f"{where} must be a plain function of SGLang's")
    return where, own, ast.parse(textwrap.dedent(inspect.getsource(own)))


def _compiled(own: FunctionType, tree: ast.Module) -> Method:
    """A method from what its source has become."""
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, own.__code__.co_firstlineno - 1)
    code = _code_in(compile(tree, own.__code__.co_filename, "exec"), own.__name__)
    function = FunctionType(code, own.__globals__, own.__name__, own.__defaults__)
    function.__kwdefaults__ = own.__kwdefaults__
    return functools.wraps(own)(function)


def _code_in(compiled: CodeType, name: str) -> CodeType:
    """The code of the function of this name."""
    codes = [each for each in compiled.co_consts if isinstance(each, CodeType)]
    return next(each for each in codes if each.co_name == name)


def _calls(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == function
