"""The two environment variables, every value of each."""

from __future__ import annotations

import warnings

import pytest
import torch

from sglang.srt.layers.moe_router.environ import (
    CHOICES,
    SGLANG_ROUTER_GEMM_PDL,
    asked_logits_dtype,
    pdl_enabled,
    requested_backend,
)


@pytest.mark.parametrize(
    ("pdl", "trtllm", "enabled"),
    [
        (None, None, True),
        (None, "1", True),
        (None, "0", False),
        ("1", None, True),
        ("true", "0", True),
        ("YES", "0", True),
        ("0", None, False),
        ("false", "1", False),
        ("No", "1", False),
        ("", None, True),
        ("", "0", False),
    ],
)
def test_pdl(
    pdl: str | None, trtllm: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SGLANG_ROUTER_GEMM_PDL", pdl), ("TRTLLM_ENABLE_PDL", trtllm)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pdl_enabled() is enabled


@pytest.mark.parametrize("value", ["maybe", "2", "off", " "])
def test_a_pdl_value_that_is_no_boolean_is_an_error_that_lists_the_values(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", value)
    listed = "must be true, 1, yes or y, or false, 0, no or n"
    with pytest.raises(ValueError, match=f"SGLANG_ROUTER_GEMM_PDL is '{value}', {listed}"):
        pdl_enabled()


def test_pdl_set_to_none_in_code_means_the_default() -> None:
    with SGLANG_ROUTER_GEMM_PDL.override(None):
        assert pdl_enabled()


def test_the_default_backend_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested_backend() == "auto"
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "")
    assert requested_backend() == "auto"


@pytest.mark.parametrize("name", CHOICES)
def test_backends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", name)
    assert requested_backend() == name


@pytest.mark.parametrize("name", CHOICES[:-1])
def test_fp32_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", name)
    assert asked_logits_dtype(torch.bfloat16, bias=False) == torch.bfloat16
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", f"{name},fp32")
    assert requested_backend() == name
    assert asked_logits_dtype(torch.bfloat16, bias=False) == torch.float32
    assert asked_logits_dtype(torch.bfloat16, bias=True) == torch.bfloat16


@pytest.mark.parametrize(
    "name", [" ", "Auto", "flashinfer ", "cutlass", "off,fp32", "auto,", ",fp32", "auto,bf16"]
)
def test_an_unknown_backend_is_an_error_that_lists_the_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", name)
    names = "auto, cluster, flashinfer, sgl_kernel, torch, off"
    with pytest.raises(ValueError, match=f"is '{name}', must be one of {names}"):
        requested_backend()
