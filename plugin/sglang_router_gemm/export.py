"""`sglang-router-gemm export`: turns an SGLang source checkout into the upstream PR.

Everything is computed first, from the committed text; then either all files are put into
place or none. A checkout that already has the result, and nothing else, counts as clean.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import isort
import libcst as cst
from libcst.codemod import CodemodContext
from libcst.codemod.visitors import RemoveImportsVisitor

from sglang.srt.layers.moe_router.environ import CHOICES
from sglang_router_gemm.contract import GATE_CLASS, GATE_MODULE, MODEL, OP, examine

ENVIRON = "srt/environ.py"

# After it, in the section on FlashInfer that every release has.
_ENVIRON_ANCHOR = "SGLANG_FLASHINFER_USE_PAGED"
_FIELDS = (
    (
        f"# Router GEMM of the MoE gate: {', '.join(CHOICES[:-1])} or {CHOICES[-1]}.",
        'SGLANG_ROUTER_GEMM_BACKEND = EnvStr("auto")',
    ),
    (
        "# Its programmatic dependent launch. Unset: on, unless TRTLLM_ENABLE_PDL=0.",
        "SGLANG_ROUTER_GEMM_PDL = EnvBool(None)",
    ),
)

_FAST_PATH = """\
logits = router_logits(self, hidden_states, forward_batch)
if logits is not None:
    return logits
"""

_TESTS = "test/srt"
_TESTS_THERE = "test/srt/router_gemm"
_TEST_FILES = (
    *(f"cpu/test_{name}" for name in ("environ", "gate", "jit", "ops", "plan")),
    *(f"gpu/test_{name}" for name in ("cluster", "flashinfer", "pdl")),
)
_BENCHMARK = "benchmark/kernels/deepseek"
# They are about the plugin.
_NOT_THERE = ("environments.py", "benchmark_gate_host_time.py", "benchmark_route.py")

# What tests and benchmark share lies in this package here, and in `sglang.test` there.
_SHARED = ("check", "routing")
_HERE = "sglang_router_gemm"


class ExportError(Exception):
    """Why a checkout is refused, in one line."""


def run(checkout: Path, check: bool = False, diff: bool = False) -> int:
    """Exports into `checkout`; 1 where that does not apply, else 0.

    Args:
        checkout: the root of SGLang's repository, or of an unpacked sdist.
        check: only say whether the export applies.
        diff: only print it.
    """
    try:
        before, after = plan(checkout)
        if diff:
            sys.stdout.writelines(_unified_diff(before, after))
        elif check:
            print(f"{checkout}: the export applies")
        else:
            _write(checkout, {path: text for path, text in after.items() if text != before[path]})
            print(_diffstat(before, after))
    except (ExportError, OSError) as error:
        print(f"sglang-router-gemm export: {error}", file=sys.stderr)
        return 1
    return 0


def plan(checkout: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The text of every file of the PR, before (empty: a new file) and after, by path.

    Raises:
        ExportError: `checkout` is no SGLang, not clean, or not known how to edit.
    """
    package = _package(checkout)
    edited = {f"{package}/{MODEL}": edit_model, f"{package}/{ENVIRON}": edit_environ}
    problem = examine(checkout / package).problem
    if problem is not None:
        raise ExportError(f"{checkout} is an SGLang that the patch does not fit: {problem}")
    new = _new_files(package)
    before = {path: _committed(checkout, path) for path in (*edited, *new)}
    after = {path: edit(before[path]) for path, edit in edited.items()} | new
    for path in _dirty(checkout):
        if path not in after or (checkout / path).read_text(encoding="utf-8") != after[path]:
            raise ExportError(f"{checkout} is dirty ({path}), must be a clean checkout")
    return before, after


def edit_model(text: str) -> str:
    """`deepseek_v2.py` with the fast path in its gate.

    Raises:
        ExportError: the edit does not apply.
    """
    module = cst.parse_module(text)
    if any(_imported_from(node) == GATE_MODULE for node in module.body):
        return text
    body = [_with_fast_path(node) if _is_gate(node) else node for node in module.body]
    imports = {GATE_MODULE: "plan_gate, router_logits"}
    without_op = [node for node in body if not _registers_op(node)]
    if len(without_op) < len(body):
        # The op that SGLang 0.5.11 to 0.5.14 register here declares no mutated argument.
        imports["sglang.srt.layers.moe_router.ops"] = OP
    module = module.with_changes(body=without_op)
    for origin, names in imports.items():
        module = _with_import(module, origin, names)
    return _without_unused_imports(module).code if OP in imports.values() else module.code


def edit_environ(text: str) -> str:
    """SGLang's `environ.py` with the two variables.

    Raises:
        ExportError: the edit does not apply.
    """
    module = cst.parse_module(text)
    body = list(module.body)
    for index, node in enumerate(body):
        if isinstance(node, cst.ClassDef) and node.name.value == "Envs":
            body[index] = _with_fields(node)
    return module.with_changes(body=body).code


def _with_fields(envs: cst.ClassDef) -> cst.ClassDef:
    fields = list(envs.body.body)
    names = [_assigned(field) for field in fields]
    if "SGLANG_ROUTER_GEMM_BACKEND" in names:
        return envs
    if _ENVIRON_ANCHOR not in names:
        raise ExportError(f"sglang/{ENVIRON} has no {_ENVIRON_ANCHOR}, must have it in class Envs")
    after = names.index(_ENVIRON_ANCHOR) + 1
    fields[after:after] = [
        cst.parse_statement(assignment).with_changes(
            leading_lines=[cst.EmptyLine(comment=cst.Comment(comment))]
        )
        for comment, assignment in _FIELDS
    ]
    return envs.with_changes(body=envs.body.with_changes(body=fields))


def _with_fast_path(gate: cst.CSTNode) -> cst.CSTNode:
    assert isinstance(gate, cst.ClassDef)
    methods = list(gate.body.body)
    for index, method in enumerate(methods):
        if not isinstance(method, cst.FunctionDef):
            continue
        statements = list(method.body.body)
        if method.name.value == "__init__":
            statements.append(cst.parse_statement("plan_gate(self)"))
        elif method.name.value == "forward":
            start = int(method.get_docstring() is not None)
            statements[start : start + 1] = [
                *cst.parse_module(_FAST_PATH).body,
                _after_a_blank_line(statements[start]),
            ]
        methods[index] = method.with_changes(body=method.body.with_changes(body=statements))
    return gate.with_changes(body=gate.body.with_changes(body=methods))


def _after_a_blank_line(statement: cst.CSTNode) -> cst.CSTNode:
    assert isinstance(statement, cst.SimpleStatementLine | cst.BaseCompoundStatement)
    lines = [cst.EmptyLine(indent=False), *statement.leading_lines]
    return statement.with_changes(leading_lines=lines)


def _with_import(module: cst.Module, origin: str, names: str) -> cst.Module:
    """The import, where isort would put it among SGLang's own."""
    body = list(module.body)
    before = [
        index
        for index, node in enumerate(body)
        if (imported := _imported_from(node)) is not None and "sglang." <= imported < origin
    ]
    if not before:
        raise ExportError(f"sglang/{MODEL} imports nothing of SGLang's that sorts before {origin}")
    body.insert(before[-1] + 1, cst.parse_statement(f"from {origin} import {names}"))
    return module.with_changes(body=body)


def _without_unused_imports(module: cst.Module) -> cst.Module:
    context = CodemodContext()
    for origin, name, alias in (
        ("flashinfer.gemm", "mm_M1_16_K7168_N256", "_raw_dsv3_router_gemm"),
        ("sglang.srt.utils.custom_op", "register_custom_op", None),
    ):
        RemoveImportsVisitor.remove_unused_import(context, origin, name, alias)
    return RemoveImportsVisitor(context).transform_module(module)


def _is_gate(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.ClassDef) and node.name.value == GATE_CLASS


def _registers_op(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.FunctionDef) and node.name.value == OP and len(node.decorators) == 1


def _imported_from(node: cst.CSTNode) -> str | None:
    statement = node.body[0] if isinstance(node, cst.SimpleStatementLine) else None
    if not isinstance(statement, cst.ImportFrom) or statement.module is None:
        return None
    return cst.Module([]).code_for_node(statement.module)


def _assigned(node: cst.CSTNode) -> str | None:
    statement = node.body[0] if isinstance(node, cst.SimpleStatementLine) else None
    if not isinstance(statement, cst.Assign):
        return None
    target = statement.targets[0].target
    return target.value if isinstance(target, cst.Name) else None


def _package(checkout: Path) -> str:
    for package in ("python/sglang", "sglang"):  # the repository's layout, and the sdist's
        if (checkout / package / MODEL).is_file():
            _check_root(checkout, f"{package}/{MODEL}")
            return package
    raise ExportError(f"{checkout} is not SGLang's source tree: it has no python/sglang/{MODEL}")


def _check_root(checkout: Path, file: str) -> None:
    """What can be put back: the root of a repository, or of an unpacked sdist."""
    if any(checkout.glob("sglang-*.dist-info")):
        raise ExportError(f"{checkout} is where SGLang is installed, must be a source checkout")
    if not _is_git(checkout):
        try:
            _git(checkout, "ls-files", "--error-unmatch", file)
        except (ExportError, OSError):
            return  # no repository has it
        root = _git(checkout, "rev-parse", "--show-toplevel").strip()
        raise ExportError(f"{checkout} is a folder of a checkout, must be its root {root}")


def _new_files(package: str) -> dict[str, str]:
    """What this project brings, by its path in SGLang's tree."""
    ours = Path(__file__).parent
    root = ours.parents[1]
    if not (root / _TESTS).is_dir():
        raise ExportError(
            f"sglang-router-gemm runs from {ours}, must run from a checkout of its sources, "
            "which has the tests and the benchmark"
        )
    files = {
        f"{package}/{file.relative_to(root / 'python/sglang').as_posix()}": file
        for file in _sources(root / "python/sglang")
    }
    for name in _SHARED:
        files[f"{package}/test/router_gemm_{name}.py"] = ours / f"{name}.py"
    for name in _TEST_FILES:
        files[f"{_TESTS_THERE}/{name}.py"] = root / _TESTS / f"{name}.py"
    for file in sorted((root / _TESTS).glob("*.py")):
        files[f"{_TESTS_THERE}/{file.name}"] = file
    for file in _sources(root / _TESTS / "gpu/csrc"):
        files[f"{_TESTS_THERE}/gpu/csrc/{file.name}"] = file
    for file in _sources(root / _BENCHMARK):
        files[file.relative_to(root).as_posix()] = file
    return {
        path: _for_sglang(file.read_text(encoding="utf-8"))
        for path, file in files.items()
        if file.name not in _NOT_THERE
    }


def _sources(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".cu", ".cuh"))


def _for_sglang(text: str) -> str:
    """One of our files as SGLang has it, where nothing is called `sglang_router_gemm`."""
    for name in _SHARED:
        there = f"router_gemm_{name}"
        text = text.replace(f"{_HERE}.{name}", f"sglang.test.{there}")
        text = text.replace(
            f"from {_HERE} import {name}", f"from sglang.test import {there} as {name}"
        )
    lines = text.splitlines(keepends=True)
    text = "".join(line for line in lines if not line.strip().startswith(f"import {_HERE}"))
    return isort.code(text, profile="black", known_first_party=["sglang"])


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise ExportError(f"git cannot read {checkout}: {done.stderr.strip()}")
    return done.stdout


def _is_git(checkout: Path) -> bool:
    return (checkout / ".git").exists()


def _committed(checkout: Path, path: str) -> str:
    if not _is_git(checkout):
        file = checkout / path
        return file.read_text(encoding="utf-8") if file.exists() else ""
    if not _git(checkout, "ls-tree", "--name-only", "HEAD", path):
        return ""
    return _git(checkout, "show", f"HEAD:{path}")


def _dirty(checkout: Path) -> list[str]:
    """Paths that differ from the last commit; an unpacked sdist has none to differ from."""
    if not _is_git(checkout):
        return []
    status = _git(checkout, "status", "--porcelain", "--untracked-files=all", "-z", "--no-renames")
    return [entry[3:] for entry in status.split("\0") if entry]


def _write(checkout: Path, files: Mapping[str, str]) -> None:
    """Writes all of `files` or, where one cannot be written, none."""
    ready: list[tuple[Path, Path]] = []
    try:
        for path, text in files.items():
            file = checkout / path
            file.parent.mkdir(parents=True, exist_ok=True)
            waiting = file.with_name(f".{file.name}.router-gemm")
            ready.append((waiting, file))
            waiting.write_text(text, encoding="utf-8")
            if file.exists():
                waiting.chmod(file.stat().st_mode)
    except OSError:
        for waiting, _ in ready:
            waiting.unlink(missing_ok=True)
        raise
    for waiting, file in ready:
        waiting.replace(file)


def _unified_diff(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for path, text in after.items():
        old = before[path]
        lines += difflib.unified_diff(
            old.splitlines(keepends=True),
            text.splitlines(keepends=True),
            f"a/{path}" if old else "/dev/null",
            f"b/{path}",
        )
    return lines


def _diffstat(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    changed = [path for path, text in after.items() if text != before[path]]
    if not changed:
        return "nothing to do: the checkout has it all"
    rows, sums = [], [0, 0]
    for path in changed:
        lines = _unified_diff({path: before[path]}, {path: after[path]})[2:]
        counts = [sum(line.startswith(sign) for line in lines) for sign in "+-"]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        rows.append((path, *counts))
    width = max(len(path) for path in changed)
    stat = [f"{path:{width}}  +{added} -{removed}" for path, added, removed in rows]
    return "\n".join((*stat, f"{len(changed)} files, {sums[0]} added, {sums[1]} removed"))
