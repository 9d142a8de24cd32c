"""The two environment variables of the router GEMM, in SGLang's own `EnvField` types."""

from __future__ import annotations

import os
from typing import TypeVar

import torch

from sglang.srt.environ import EnvBool, EnvField, EnvStr, envs
from sglang.srt.utils.router_gemm.policy import BACKENDS

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


SGLANG_ROUTER_GEMM_BACKEND: EnvStr = _registered("SGLANG_ROUTER_GEMM_BACKEND", EnvStr("auto"))
SGLANG_ROUTER_GEMM_PDL: EnvBool = _registered("SGLANG_ROUTER_GEMM_PDL", EnvBool(None))


@torch.compiler.assume_constant_result
def requested_backend() -> str:
    """The backend that `SGLANG_ROUTER_GEMM_BACKEND` asks for, one of `BACKENDS`.

    Raises:
        ValueError: the variable holds another name.
    """
    name: str = SGLANG_ROUTER_GEMM_BACKEND.get()
    if name not in BACKENDS:
        raise ValueError(
            f"SGLANG_ROUTER_GEMM_BACKEND is {name!r}, must be one of {', '.join(BACKENDS)}"
        )
    return name


def pdl_enabled() -> bool:
    """Whether the router GEMM is launched with programmatic dependent launch.

    `SGLANG_ROUTER_GEMM_PDL` decides; unset, SGLang's own switch `TRTLLM_ENABLE_PDL=0` turns
    PDL off. The default is on.

    Raises:
        ValueError: `SGLANG_ROUTER_GEMM_PDL` holds something else than a boolean.
    """
    name = SGLANG_ROUTER_GEMM_PDL.name
    text = os.environ.get(name)
    if text is None or text == str(None):  # what EnvField.set(None) leaves there
        return os.environ.get("TRTLLM_ENABLE_PDL") != "0"
    try:
        # Not get(): that takes the default for whatever is no boolean, with a warning.
        enabled: bool = SGLANG_ROUTER_GEMM_PDL.parse(text)
    except ValueError:
        raise ValueError(
            f"{name} is {text!r}, must be true, 1, yes or y, or false, 0, no or n"
        ) from None
    return enabled
