"""The SGLang plugin: where SGLang is as the patch needs it, the gate gets its fast path."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from sglang_router_gemm.contract import GATE_CLASS, examine

logger = logging.getLogger(__name__)


def activate() -> None:
    """Entry point `dsv3_router_gemm` of the group `sglang.srt.plugins`.

    SGLang calls it early in every process and then applies the hooks.

    Raises:
        ValueError: one of the two environment variables holds a value that it does not have.
            SGLang logs the error and goes on without the plugin.
    """
    contract = examine(_sglang())
    if contract.problem is not None:
        logger.warning(
            "Router GEMM: this SGLang does not fit, its own gate serves instead: %s.",
            contract.problem,
        )
        return
    if contract.in_tree:
        logger.info("Router GEMM: SGLang's %s has the fast path, the plugin rests.", GATE_CLASS)
        return
    # Only now: an SGLang that does not fit may fail to import what these need.
    from sglang.srt.utils.router_gemm.environ import pdl_enabled, requested_backend
    from sglang_router_gemm import hooks

    pdl_enabled()  # both are read now, so that a typo ends here and not on a request
    if requested_backend() == "off":
        logger.info("Router GEMM: SGLANG_ROUTER_GEMM_BACKEND=off, SGLang's gate is untouched.")
        return
    hooks.register()


def _sglang() -> Path:
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
