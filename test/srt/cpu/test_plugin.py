"""The plugin in SGLang's own loader: every value of its settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang.srt.layers.moe_router.environ import CHOICES, OFF

LOAD = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.models.deepseek_v2 import MoEGate
hooked = [hasattr(getattr(MoEGate, name), "__wrapped__") for name in ("__init__", "forward")]
print("HOOKED", *hooked)
"""


@pytest.mark.parametrize("backend", [name for name in CHOICES if name != OFF])
def test_load_plugins_hooks_the_gate(backend: str, fork_python: Callable[..., str]) -> None:
    output = fork_python(LOAD, SGLANG_ROUTER_GEMM_BACKEND=backend)
    assert "HOOKED True True" in output
    assert "INFO Executed general plugin: dsv3_router_gemm" in output
    assert "ERROR" not in output


def test_off_leaves_sglang_untouched(fork_python: Callable[..., str]) -> None:
    output = fork_python(LOAD, SGLANG_ROUTER_GEMM_BACKEND="off")
    assert "HOOKED False False" in output
    assert "SGLang's gate is untouched" in output


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        (
            {"SGLANG_ROUTER_GEMM_BACKEND": "cutlass"},
            "one of auto, cluster, flashinfer, sgl_kernel, torch, off",
        ),
        ({"SGLANG_ROUTER_GEMM_PDL": "maybe"}, "true, 1, yes or y, or false, 0, no or n"),
    ],
)
def test_an_unknown_value_is_an_error_at_load_and_sglang_goes_on(
    setting: dict[str, str], values: str, fork_python: Callable[..., str]
) -> None:
    output = fork_python(LOAD, **setting)
    assert "HOOKED False False" in output
    assert "ERROR Failed to execute general plugin: dsv3_router_gemm" in output
    assert f"must be {values}" in output
