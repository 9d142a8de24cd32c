"""The C++ rules: what a pull request takes of `csrc`, cut to what it uses.

Each rule says what it must find. Where the sources have moved on and it finds nothing, the export
stops: it never gives half of a rule.
"""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import clang_format

from sglang_router_gemm.pull_requests.pull_request import RuleError

_INDENT = "  "
# The style of the headers that SGLang compiles when it needs them, in its wheel, too.
_STYLE = "sglang/kernels/jit/.clang-format"


def in_sglangs_style(text: str) -> str:
    """The text with SGLang's macro for a device function, as SGLang's clang-format leaves it.

    Raises:
        RuleError: the SGLang that is installed has no such style.
    """
    style = Path(str(distribution("sglang").locate_file(_STYLE)))
    if not style.is_file():
        raise RuleError(f"the SGLang that is installed has no {_STYLE}, must have it")
    tool = clang_format.get_executable("clang-format")
    text = replaced(text, "__device__ __forceinline__", "SGL_DEVICE")
    command = [tool, f"--style=file:{style}", "--assume-filename=header.cuh"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, encoding="utf-8", check=True
    )
    return done.stdout


def body(text: str, namespace: str) -> str:
    """What lies in the namespace, which is the only one of the file."""
    found = re.fullmatch(
        rf".*?^namespace {namespace} {{\n\n(.*)^}}  // namespace {namespace}\n",
        text,
        re.DOTALL | re.MULTILINE,
    )
    if found is None:
        raise RuleError(f"the header has no namespace {namespace}, must have it around everything")
    return found[1]


def opening_comment(text: str) -> str:
    """The comment at the top of the file."""
    return text[: text.index("#pragma once")]


def before(text: str, section: str) -> str:
    """What comes before a section, which a comment `// ---- Section ----` opens."""
    found = re.search(rf"^// ---- {section} -+\n", text, re.MULTILINE)
    if found is None:
        raise RuleError(f"the header has no section {section!r}, must have it")
    return text[: found.start()]


def without_sections(text: str) -> str:
    """The text without the comments that open its sections."""
    return re.sub(r"^// ---- .* -+\n\n", "", text, flags=re.MULTILINE)


def replaced(text: str, old: str, new: str) -> str:
    """`new` for each `old`."""
    if old not in text:
        raise RuleError(f"the header has no {old!r}, must have it")
    return text.replace(old, new)


def renamed(text: str, old: str, new: str) -> str:
    """`new` for each `old` that is a whole word."""
    text, count = re.subn(rf"\b{old}\b", new, text)
    if count == 0:
        raise RuleError(f"the header names no {old}, must name it")
    return text


def without_definition(text: str, signature: str) -> str:
    """The text without a function, the comment above it, and the blank line after it.

    Args:
        signature: how the line that names it starts; a line `template <...>` above it goes, too.
    """
    lines = text.splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if line.startswith(signature)]
    if len(at) != 1:
        raise RuleError(f"the header has {len(at)} lines {signature!r}, must have one")
    first = last = at[0]
    while lines[last] not in ("}\n", "};\n"):
        last += 1
    while lines[first - 1].startswith(("//", "template <")):
        first -= 1
    return "".join(lines[:first] + lines[last + 2 :])


def decided(text: str, condition: str, value: bool) -> str:
    """The text with each `if constexpr` on the condition, or on its negation, decided."""
    opening = re.compile(rf"^( *)if constexpr \((!?){re.escape(condition)}\) {{\n", re.MULTILINE)
    if opening.search(text) is None:
        raise RuleError(f"the header has no if constexpr ({condition}), must have one")
    while found := opening.search(text):
        taken, rest = _block(text[found.end() :], found[1])
        other, after = "", rest.removeprefix(f"{found[1]}}}\n")
        if rest.startswith(otherwise := f"{found[1]}}} else {{\n"):
            other, rest = _block(rest.removeprefix(otherwise), found[1])
            after = rest.removeprefix(f"{found[1]}}}\n")
        kept = taken if value != bool(found[2]) else other
        text = text[: found.start()] + _dedented(kept) + after
    return text


def unrolled(text: str, loop: str) -> str:
    """The text with each loop of this head, which runs once, replaced by its body."""
    opening = re.compile(rf"#pragma unroll\n( *){re.escape(loop)} {{\n")
    if opening.search(text) is None:
        raise RuleError(f"the header has no {loop!r}, must have it")
    while found := opening.search(text):
        inside, rest = _block(text[found.end() :], found[1])
        text = text[: found.start()] + _dedented(inside) + rest.removeprefix(f"{found[1]}}}\n")
    return text


def _block(text: str, indent: str) -> tuple[str, str]:
    """The lines up to the one that closes a block of this indent, and that one and the rest."""
    end = re.search(rf"^{indent}}}", text, re.MULTILINE)
    if end is None:
        raise RuleError("a block of the header has no end, must end at the indent of its start")
    return text[: end.start()], text[end.start() :]


def _dedented(lines: str) -> str:
    return re.sub(rf"^{_INDENT}", "", lines, flags=re.MULTILINE)
