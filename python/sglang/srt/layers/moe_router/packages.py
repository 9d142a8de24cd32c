"""What is installed: versions, and functions of packages that may be absent, old or broken."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Those that a decision or a number may depend on.
PACKAGES = (
    "sglang-dsv3-router-gemm",
    "torch",
    "sglang",
    "flashinfer-python",
    "sglang-kernel",
    "triton",
    "apache-tvm-ffi",
)


def installed_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def find_function(
    module: str, function: str, distribution: str
) -> tuple[Callable[..., Any] | None, str]:
    """A package's function and "", or None and a phrase that says why it is not there."""
    try:
        installed = f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return None, f"{distribution} is not installed; pip install {distribution}"
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a broken install raises anything: OSError, RuntimeError
        return None, f"{installed} cannot be imported ({first_line(error)})"
    return found, "" if found is not None else f"{installed} has no {function}"


def first_line(error: BaseException) -> str:
    """An error as one line, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
