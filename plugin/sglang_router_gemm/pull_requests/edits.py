"""The Python rules: what a pull request puts into SGLang's files, and where.

Each rule names the place that it needs. Where a release does not have it, the export stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import isort
import libcst as cst

from sglang_router_gemm.pull_requests.pull_request import RuleError

_IsAnchor = Callable[[cst.CSTNode], bool]
_Put = Callable[[cst.CSTNode], cst.CSTNode | cst.FlattenSentinel[Any]]


def with_name_imported(module: cst.Module, origin: str, name: str) -> cst.Module:
    """The module with `name` among what it imports from `origin`.

    Raises:
        RuleError: it imports nothing from there, or in two places, or everything.
    """
    index = _index(module.body, lambda node: _imported_from(node) == origin, f"import of {origin}")
    imported = cst.ensure_type(
        cst.ensure_type(module.body[index], cst.SimpleStatementLine).body[0], cst.ImportFrom
    )
    if isinstance(imported.names, cst.ImportStar):
        raise RuleError(f"the import of {origin} is of *, must be of names")
    first, *others = imported.names
    names = [first.with_changes(name=cst.Name(name)), first, *others]
    return module.with_deep_changes(imported, names=names)


def code_of(module: cst.Module) -> str:
    """The module's text, its imports sorted as SGLang's hooks sort them."""
    return isort.code(module.code, profile="black", known_first_party=["sglang"])


def with_import_before(module: cst.Module, neighbour: str, code: str) -> cst.Module:
    """The module with an import before that of `neighbour`, in whatever block that is.

    Raises:
        RuleError: nothing is imported from `neighbour`, or in two places.
    """

    def put(old: cst.CSTNode) -> cst.FlattenSentinel[Any]:
        return cst.FlattenSentinel([*cst.parse_module(code).body, old])

    where = f"import of {neighbour}"
    return _replaced(module, lambda node: _imported_from(node) == neighbour, where, put)


def with_statement_after(module: cst.Module, class_name: str, target: str, code: str) -> cst.Module:
    """The module with a statement after the one that assigns to `target` in a class.

    Raises:
        RuleError: there is no such class, or not one such assignment in it.
    """

    def is_anchor(node: cst.CSTNode) -> bool:
        statement = node.body[0] if isinstance(node, cst.SimpleStatementLine) else None
        return isinstance(statement, cst.Assign) and _code(statement.targets[0].target) == target

    def put(old: cst.CSTNode) -> cst.FlattenSentinel[Any]:
        return cst.FlattenSentinel([old, *cst.parse_module(code).body])

    return _in_class(module, class_name, is_anchor, f"assignment to {target}", put)


def with_branch_before(module: cst.Module, class_name: str, test: str, code: str) -> cst.Module:
    """The module with a branch before the one that asks `test` in a class, which follows as elif.

    Raises:
        RuleError: there is no such class, or not one such branch in it.
    """
    branch = cst.ensure_type(cst.parse_module(code).body[0], cst.If)

    def is_anchor(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.If) and _code(node.test) == test

    def put(old: cst.CSTNode) -> cst.CSTNode:
        follows = cst.ensure_type(old, cst.If)
        return branch.with_changes(
            leading_lines=follows.leading_lines, orelse=follows.with_changes(leading_lines=[])
        )

    return _in_class(module, class_name, is_anchor, f"branch on {test}", put)


def with_statement_replaced(
    module: cst.Module, class_name: str, old: str, new: str, times: int = 1
) -> cst.Module:
    """The module with other statements for one that is in a class so many times.

    Raises:
        RuleError: there is no such class, or it does not have the statement so often.
    """

    def is_anchor(node: cst.CSTNode) -> bool:
        if not isinstance(node, cst.SimpleStatementLine):
            return False
        return _bare(_code(node.body[0])) == _bare(old)  # without the comments above it

    def put(old: cst.CSTNode) -> cst.FlattenSentinel[Any]:
        first, *others = cst.parse_module(new).body
        lines = cst.ensure_type(old, cst.SimpleStatementLine).leading_lines
        return cst.FlattenSentinel([first.with_changes(leading_lines=lines), *others])

    return _in_class(module, class_name, is_anchor, f"statement {old}", put, times)


def replaced_once(text: str, old: str, new: str) -> str:
    """`new` for `old`.

    Raises:
        RuleError: the text does not have it once.
    """
    if text.count(old) != 1:
        raise RuleError(f"there is {text.count(old)} times {old!r}, must be once")
    return text.replace(old, new)


def with_function_after(module: cst.Module, name: str, code: str) -> cst.Module:
    """The module with a function after that of this name.

    Raises:
        RuleError: there is none.
    """
    function = cst.ensure_type(cst.parse_module(code).body[0], cst.FunctionDef)
    blank = [cst.EmptyLine(indent=False)] * 2
    return _after(
        module,
        lambda node: isinstance(node, cst.FunctionDef) and node.name.value == name,
        f"function {name}",
        function.with_changes(leading_lines=blank),
    )


def with_beginning(
    module: cst.Module, name: str, code: str, class_name: str | None = None
) -> cst.Module:
    """The module with statements before all others of a function, or of a class's method.

    Raises:
        RuleError: there is no such class or function, or one with a docstring.
    """

    def is_anchor(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.FunctionDef) and node.name.value == name

    def put(old: cst.CSTNode) -> cst.CSTNode:
        function = cst.ensure_type(old, cst.FunctionDef)
        if function.get_docstring() is not None:
            raise RuleError(f"the function {name} has a docstring, must have none")
        block = cst.ensure_type(function.body, cst.IndentedBlock)
        body = [*cst.parse_module(code).body, *block.body]
        return function.with_deep_changes(block, body=body)

    if class_name is None:
        return _replaced(module, is_anchor, f"function {name}", put)
    return _in_class(module, class_name, is_anchor, f"method {name}", put)


def with_call_after(module: cst.Module, beginning: str, code: str) -> cst.Module:
    """The module with a statement after the one whose code, without whitespace, starts like this.

    Raises:
        RuleError: there is none.
    """
    return _after(
        module,
        lambda node: _bare(_code(node)).startswith(beginning),
        f"statement {beginning}",
        cst.parse_module(code).body[0],
    )


def with_kernel_registered(text: str, op: str, behind: str, spec: str) -> str:
    """An inventory of kernels with the spec of `op` behind that of another, or as it is with it.

    Raises:
        RuleError: it does not have the other.
    """
    if op in text:
        return text
    after = f'register_kernel(KernelSpec(op="{behind}",'
    return with_call_after(cst.parse_module(text), after, spec).code


def with_value(module: cst.Module, target: str, expression: str) -> cst.Module:
    """The module with another value for the constant `target`, which has a type.

    Raises:
        RuleError: it does not have it.
    """

    def is_anchor(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.AnnAssign) and _code(node.target) == target

    def put(old: cst.CSTNode) -> cst.CSTNode:
        return cst.ensure_type(old, cst.AnnAssign).with_changes(
            value=cst.parse_expression(expression)
        )

    return _replaced(module, is_anchor, f"constant {target}", put)


def _after(module: cst.Module, is_anchor: _IsAnchor, where: str, node: cst.CSTNode) -> cst.Module:
    body: list[cst.CSTNode] = list(module.body)
    body.insert(_index(body, is_anchor, where) + 1, node)
    return module.with_changes(body=body)


def _in_class(
    module: cst.Module, name: str, is_anchor: _IsAnchor, where: str, put: _Put, times: int = 1
) -> cst.Module:
    def is_class(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.ClassDef) and node.name.value == name

    def put_in_class(old: cst.CSTNode) -> cst.CSTNode:
        return _replaced(old, is_anchor, f"{where} in {name}", put, times)

    return _replaced(module, is_class, f"class {name}", put_in_class)


class _Replacer(cst.CSTTransformer):
    def __init__(self, is_anchor: _IsAnchor, put: _Put) -> None:
        super().__init__()
        self.is_anchor, self.put, self.count = is_anchor, put, 0

    def on_leave(self, original_node: cst.CSTNode, updated_node: Any) -> Any:
        if not self.is_anchor(original_node):
            return updated_node
        self.count += 1
        return self.put(updated_node)


def _replaced(
    scope: cst.CSTNodeT, is_anchor: _IsAnchor, where: str, put: _Put, times: int = 1
) -> cst.CSTNodeT:
    replacer = _Replacer(is_anchor, put)
    replaced = scope.visit(replacer)
    if replacer.count != times:
        must_be = "once" if times == 1 else f"{times} times"
        raise RuleError(f"there is {replacer.count} times a {where}, must be {must_be}")
    return cst.ensure_type(replaced, type(scope))


def _index(body: Sequence[cst.CSTNode], is_anchor: _IsAnchor, where: str) -> int:
    found = [index for index, node in enumerate(body) if is_anchor(node)]
    if len(found) != 1:
        raise RuleError(f"there is {len(found)} times a {where}, must be once")
    return found[0]


def _bare(code: str) -> str:
    """Code without its whitespace, which a formatter may change."""
    return "".join(code.split())


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def _imported_from(node: cst.CSTNode) -> str | None:
    statement = node.body[0] if isinstance(node, cst.SimpleStatementLine) else None
    if not isinstance(statement, cst.ImportFrom) or statement.module is None:
        return None
    return _code(statement.module)
