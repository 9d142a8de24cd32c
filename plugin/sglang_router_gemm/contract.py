"""What the patch leans on in SGLang, read off SGLang's sources without importing them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

MODEL = "srt/models/deepseek_v2.py"
GATE_CLASS = "MoEGate"
GATE_MODULE = "sglang.srt.models.deepseek_v2_gate"
OP = "flashinfer_dsv3_router_gemm"

_ENVIRON = "srt/environ.py"
_CUSTOM_OP = "srt/utils/custom_op.py"
_SERVER_ARGS = ("srt/server_args.py", "get_global_server_args")

_FORWARD = "self, hidden_states, gemm_output_zero_allocator=None, forward_batch=None"

# How a gate asks for deterministic inference, and the function that `moe_router.plan`
# asks in its place.
DETERMINISTIC_INFERENCE = {
    "get_global_server_args().enable_deterministic_inference": _SERVER_ARGS,
    "get_server_args().enable_deterministic_inference": _SERVER_ARGS,
    "get_exec().deterministic.enable_deterministic_inference": (
        "srt/runtime_context.py",
        "get_exec",
    ),
}


class Contract(NamedTuple):
    """What one SGLang has of it."""

    problem: str | None = None
    """Why the patch does not fit, in one phrase; None if it does."""
    in_tree: bool = False
    """The gate takes the fast path by itself."""
    deterministic_inference: str | None = None
    """The expression with which the gate asks for it."""
    defines_op: bool = False
    """The model registers an op of its own for FlashInfer's kernel, as 0.5.11 to 0.5.14 do."""


class _BrokenError(Exception):
    pass


def examine(package: Path) -> Contract:
    """Reads the contract off SGLang's sources.

    Args:
        package: the folder `sglang`, which has `srt` in it.
    """
    try:
        model = _parse(package, MODEL)
        expression = _check_gate(_class(model, MODEL, GATE_CLASS))
        file, function = DETERMINISTIC_INFERENCE[expression]
        _function(_parse(package, file).body, f"sglang/{file}", function)
        _check_custom_op(_parse(package, _CUSTOM_OP))
        _check_environ(_parse(package, _ENVIRON))
    except _BrokenError as broken:
        return Contract(problem=str(broken))
    return Contract(
        in_tree=any(
            isinstance(node, ast.ImportFrom) and node.module == GATE_MODULE for node in model.body
        ),
        deterministic_inference=expression,
        defines_op=any(map(_registers_op, model.body)),
    )


def _check_gate(gate: ast.ClassDef) -> str:
    where = f"{gate.name}.__init__"
    init = _function(gate.body, gate.name, "__init__")
    assigned = [
        ast.unparse(target)
        for node in ast.walk(init)
        if isinstance(node, ast.Assign)
        for target in node.targets
    ]
    if "self.weight" not in assigned:
        raise _BrokenError(f"{where} sets {', '.join(assigned) or 'nothing'}, must set self.weight")
    forward = _function(gate.body, gate.name, "forward")
    for argument in ast.walk(forward.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    taken = ast.unparse(forward.args)
    if taken != _FORWARD:
        raise _BrokenError(f"{gate.name}.forward takes ({taken}), must take ({_FORWARD})")
    asked = {
        ast.unparse(node)
        for node in ast.walk(forward)
        if isinstance(node, ast.Attribute) and node.attr == "enable_deterministic_inference"
    }
    if len(asked) != 1 or not asked <= DETERMINISTIC_INFERENCE.keys():
        raise _BrokenError(
            f"{gate.name}.forward asks {' and '.join(sorted(asked)) or 'nothing'} for "
            f"deterministic inference, must ask {' or '.join(DETERMINISTIC_INFERENCE)}"
        )
    return asked.pop()


def _check_custom_op(module: ast.Module) -> None:
    # Its overloads name all keywords, its implementation only some.
    taken = {
        argument.arg
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == "register_custom_op"
        for argument in node.args.kwonlyargs
    }
    missing = {"op_name", "mutates_args", "fake_impl"} - taken
    if missing:
        raise _BrokenError(f"register_custom_op does not take {', '.join(sorted(missing))}")


def _check_environ(module: ast.Module) -> None:
    for name in ("EnvStr", "EnvBool", "Envs"):
        _class(module, _ENVIRON, name)
    _check_names(_class(module, _ENVIRON, "EnvField"), {"__init__", "__set_name__", "parse"})


def _check_names(scope: ast.ClassDef, names: set[str]) -> None:
    found = {node.name for node in scope.body if isinstance(node, ast.FunctionDef)}
    found |= {
        ast.unparse(target)
        for node in scope.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    if not names <= found:
        raise _BrokenError(f"{scope.name} has no {', '.join(sorted(names - found))}")


def _parse(package: Path, file: str) -> ast.Module:
    try:
        return ast.parse((package / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _BrokenError(f"there is no sglang/{file}") from None
    except SyntaxError as error:
        raise _BrokenError(f"sglang/{file} does not parse ({error})") from None


def _class(module: ast.Module, file: str, name: str) -> ast.ClassDef:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise _BrokenError(f"sglang/{file} has no class {name}")


def _function(body: list[ast.stmt], where: str, name: str) -> ast.FunctionDef:
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise _BrokenError(f"{where} has no function {name}")


def _registers_op(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef) and any(
        keyword.arg == "op_name" and ast.unparse(keyword.value) == repr(OP)
        for decorator in statement.decorator_list
        if isinstance(decorator, ast.Call)
        for keyword in decorator.keywords
    )
