"""An editable install must not copy the in-tree modules: it only adds the .pth file."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build_data["force_include_editable"] = {
            "plugin/sglang_router_gemm.pth": "sglang_router_gemm.pth"
        }
