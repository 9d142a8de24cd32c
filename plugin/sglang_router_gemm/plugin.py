"""The SGLang plugin: where SGLang is as the patch needs it, the gate gets its fast path."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def activate() -> None:
    """Entry point `dsv3_router_gemm` of the group `sglang.srt.plugins`.

    SGLang calls it early in every process. It reads the settings and waits for the model to
    be imported, so that a process that never builds one pays for nothing else.

    Raises:
        ValueError: one of the two environment variables holds a value that it does not have.
            SGLang logs the error and goes on without the plugin.
    """
    from sglang.srt.layers.moe_router.environ import OFF, pdl_enabled, requested_backend
    from sglang_router_gemm import hooks

    pdl_enabled()  # both are read now, so that a typo ends here and not on a request
    if requested_backend() == OFF:
        logger.info("Router GEMM: SGLANG_ROUTER_GEMM_BACKEND=off, SGLang's gate is untouched.")
        return
    hooks.register()
