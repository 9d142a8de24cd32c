"""Makes this project's modules importable under the names they have in SGLang's tree.

SGLang's folders may lie in site-packages or in a checkout that is installed editable,
and so may ours. Files put into `site-packages/sglang/` would hide an editable SGLang
(Python takes them for the namespace package `sglang`), so ours stay in a folder of
their own, and one finder knows it. It comes last on `sys.meta_path`: once SGLang
ships these modules itself, SGLang's win.

The .pth file brings it in with the first module of SGLang that nobody else finds, so that a
Python that has nothing to do with SGLang pays for nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))
# A wheel carries the tree inside of this package; a checkout has it in `python/`.
_TREES = (
    os.path.join(_HERE, "sglang"),
    os.path.join(os.path.dirname(os.path.dirname(_HERE)), "python", "sglang"),
)

IN_TREE = {
    "sglang.srt.models.deepseek_v2_gate": os.path.join("srt", "models"),
    "sglang.srt.layers.moe_router": os.path.join("srt", "layers"),
}


class InTreeFinder:
    """Finds the modules in `IN_TREE`, and only those."""

    @staticmethod
    def find_spec(
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        folder = IN_TREE.get(fullname)
        if folder is None:
            return None
        return PathFinder.find_spec(fullname, [os.path.join(tree, folder) for tree in _TREES])


def install() -> None:
    """Adds the finder to `sys.meta_path`, once."""
    if InTreeFinder not in sys.meta_path:
        sys.meta_path.append(InTreeFinder)
