"""The two environment variables, in SGLang's own `EnvField` types."""

from __future__ import annotations

import os
from typing import TypeVar

import torch

from sglang.srt.environ import EnvBool, EnvField, EnvStr, envs
from sglang.srt.layers.moe_router.backends import BACKENDS

AUTO, OFF = "auto", "off"
CHOICES = (AUTO, *BACKENDS, OFF)
_FP32 = ",fp32"  # behind any of them but `off`

_Field = TypeVar("_Field", bound=EnvField)


def _registered(name: str, field: _Field) -> _Field:
    # A released SGLang does not have the two in its registry, the class Envs. That class
    # names its fields through __set_name__ and then closes that door; fields that live
    # outside of it are named by hand. No "or": a field has no truth value.
    registered: _Field | None = getattr(envs, name, None)
    if registered is not None:
        return registered
    field.name = name
    return field


SGLANG_ROUTER_GEMM_BACKEND: EnvStr = _registered("SGLANG_ROUTER_GEMM_BACKEND", EnvStr(AUTO))
SGLANG_ROUTER_GEMM_PDL: EnvBool = _registered("SGLANG_ROUTER_GEMM_PDL", EnvBool(None))


def requested_backend() -> str:
    """The backend that `SGLANG_ROUTER_GEMM_BACKEND` asks for, one of `CHOICES`.

    Raises:
        ValueError: the variable holds another value.
    """
    return requested_setting().removesuffix(_FP32)


def requested_setting() -> str:
    """The same, with `,fp32` behind it where gates that give bf16 logits are to give fp32.

    Raises:
        ValueError: the variable holds another value.
    """
    setting = _text(SGLANG_ROUTER_GEMM_BACKEND) or AUTO
    if setting.removesuffix(_FP32) not in CHOICES or setting == OFF + _FP32:
        raise ValueError(
            f"SGLANG_ROUTER_GEMM_BACKEND is {setting!r}, must be one of {', '.join(CHOICES)}; "
            f"{_FP32} may follow each but {OFF}"
        )
    return setting


def asked_logits_dtype(own: torch.dtype, bias: bool) -> torch.dtype:
    """The dtype of a gate's logits: as SGLang's own gives them, but fp32 under `,fp32`.

    With a bias they stay: gpt-oss's go to the top-k of Triton's kernels, and nobody tried it.

    Args:
        own: of the logits that SGLang's own gate gives.
        bias: it adds one.
    """
    return torch.float32 if requested_setting().endswith(_FP32) and not bias else own


def pdl_enabled() -> bool:
    """Whether the router GEMM is launched with programmatic dependent launch (PDL).

    `SGLANG_ROUTER_GEMM_PDL` decides; unset, SGLang's own switch `TRTLLM_ENABLE_PDL=0` turns
    PDL off. The default is on.

    Raises:
        ValueError: `SGLANG_ROUTER_GEMM_PDL` holds something else than a boolean.
    """
    text = _text(SGLANG_ROUTER_GEMM_PDL)
    if text is None:
        return os.environ.get("TRTLLM_ENABLE_PDL") != "0"
    try:
        # Not get(): that takes the default for whatever is no boolean, with a warning.
        enabled: bool = SGLANG_ROUTER_GEMM_PDL.parse(text)
    except ValueError:
        raise ValueError(
            f"{SGLANG_ROUTER_GEMM_PDL.name} is {text!r}, must be true, 1, yes or y, or false, "
            "0, no or n"
        ) from None
    return enabled


def _text(field: EnvField) -> str | None:
    """The variable; None where it is unset, empty, or as `EnvField.set(None)` left it."""
    text = os.environ.get(field.name)
    return None if text in (None, "", str(None)) else text
