"""Which backend serves a router GEMM: a table, and one pure function that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sglang.srt.utils.router_gemm.call import ALIGNMENT_BYTES, RouterGemmCall

BACKENDS = ("auto", "flashinfer", "sgl_kernel", "torch", "off")


class Rule(NamedTuple):
    """The calls that one backend's kernel takes; None stands for 'any'."""

    device_types: tuple[str, ...]
    min_sm: int | None
    num_experts: tuple[int, ...] | None
    hidden_sizes: tuple[int, ...] | None
    num_tokens: range | None
    dtypes: tuple[torch.dtype, ...]
    any_layout: bool
    """Takes strided and unaligned tensors too."""


_BF16 = (torch.bfloat16,)
_HALF = (torch.bfloat16, torch.float16)

# fmt: off
#                      device           SM >=  N           K        M             dtypes  any layout
RULES: Mapping[str, Rule] = {
    "flashinfer": Rule(("cuda",),       90,    (256,),     (7168,), range(1, 17), _BF16,  False),
    "sgl_kernel": Rule(("cuda",),       90,    (256, 384), (7168,), range(1, 17), _BF16,  False),
    "torch":      Rule(("cuda", "cpu"), None,  None,       None,    None,         _HALF,  True),
}

# Where `auto` leaves SGLang's own forward: the SMs on which a backend is the faster one.
AUTO_SMS: Mapping[str, frozenset[int]] = {
    "flashinfer": frozenset({100, 103}),    # SGLang PRs 17707 (SM 100) and 23285 (SM 103)
}
# fmt: on


class Refusal(NamedTuple):
    """Why a backend does not serve a call."""

    condition: str
    """The condition that failed, by name: the same for all calls that fail it."""
    reason: str
    """One phrase for a person, with the value that was met and the one it must have."""


class Decision(NamedTuple):
    """The backend that serves a call; without one, SGLang's own forward does."""

    backend: str | None
    refusal: Refusal | None = None


def refuse(backend: str, call: RouterGemmCall, unavailable: str | None) -> Refusal | None:
    """The first reason why `backend` cannot serve `call`; None if it can.

    Args:
        backend: a row of `RULES`.
        unavailable: why the backend's kernel cannot be called on this device at all
            (not installed, SM not declared, not built), None if it can.
    """
    rule = RULES[backend]
    if call.deterministic_inference:
        return Refusal("deterministic_inference", "deterministic inference is on")
    if call.context_parallel:
        return Refusal("context_parallel", "the batch is a context-parallel prefill")
    if call.device_type not in rule.device_types:
        return Refusal("device", f"device is {call.device_type}, must be {_or(rule.device_types)}")
    if not call.same_device:
        return Refusal("same_device", "hidden_states and weight are on different devices")
    if rule.min_sm is not None and (call.sm is None or call.sm < rule.min_sm):
        return Refusal("sm", f"SM is {call.sm}, must be {rule.min_sm} or newer")
    if not call.matching_shapes:
        return Refusal("shapes", "hidden_states and weight must be [M, K] and [N, K]")
    if rule.num_experts is not None and call.num_experts not in rule.num_experts:
        return Refusal("num_experts", f"N is {call.num_experts}, must be {_or(rule.num_experts)}")
    if rule.hidden_sizes is not None and call.hidden_size not in rule.hidden_sizes:
        return Refusal("hidden_size", f"K is {call.hidden_size}, must be {_or(rule.hidden_sizes)}")
    for name, dtype in (
        ("hidden_states", call.hidden_states_dtype),
        ("weight", call.weight_dtype),
    ):
        if dtype not in rule.dtypes:
            return Refusal("dtype", f"{name} is {dtype}, must be {_or(rule.dtypes)}")
    if call.hidden_states_dtype != call.weight_dtype:
        return Refusal("dtype", "hidden_states and weight differ in dtype")
    if unavailable is not None:
        return Refusal("unavailable", unavailable)
    if rule.num_tokens is not None and call.num_tokens is not None:
        first, last = rule.num_tokens[0], rule.num_tokens[-1]
        if not first <= call.num_tokens <= last:
            return Refusal("num_tokens", f"M is {call.num_tokens}, must be {first} to {last}")
    if not rule.any_layout and not call.row_major:
        return Refusal("row_major", "hidden_states and weight must be dense and row-major")
    if not rule.any_layout and call.aligned is False:
        return Refusal("aligned", f"tensors must start at a multiple of {ALIGNMENT_BYTES} bytes")
    return None


def select_backend(
    call: RouterGemmCall, requested: str, unavailable: Mapping[str, str | None]
) -> Decision:
    """Decides who serves `call`.

    Args:
        requested: what the user asked for, one of `BACKENDS`.
        unavailable: for each row of `RULES` why its kernel cannot be called on this
            call's device, None if it can.
    """
    if requested == "off":
        return Decision(None, Refusal("off", "switched off"))
    if requested != "auto":
        refusal = refuse(requested, call, unavailable[requested])
        return Decision(requested if refusal is None else None, refusal)
    refusal = None
    for backend, sms in AUTO_SMS.items():
        if call.device_type == "cuda" and call.sm not in sms:
            refusal = Refusal("auto_sm", f"auto takes {backend} on SM {_or(sorted(sms))} only")
            continue
        refusal = refuse(backend, call, unavailable[backend])
        if refusal is None:
            return Decision(backend)
    return Decision(None, refusal)


class Served(NamedTuple):
    """A range of M, as a person writes it ("1-16", "17+"), and who serves it."""

    tokens: str
    decision: Decision


def decisions_by_num_tokens(
    call: RouterGemmCall, requested: str, unavailable: Mapping[str, str | None]
) -> list[Served]:
    """The decision for every M ≥ 1; `call.num_tokens` is not read."""
    limits = [rule.num_tokens for rule in RULES.values() if rule.num_tokens is not None]
    starts = sorted({1, *(limit.start for limit in limits), *(limit.stop for limit in limits)})
    ranges: list[tuple[int, Decision]] = []
    for start in starts:
        decision = select_backend(call._replace(num_tokens=start), requested, unavailable)
        if not ranges or ranges[-1][1].backend != decision.backend:
            ranges.append((start, decision))
    ends = [start - 1 for start, _ in ranges[1:]]
    return [
        Served(f"{start}-{end}" if end else f"{start}+", decision)
        for (start, decision), end in zip(ranges, [*ends, None], strict=True)
    ]


def _or(values: tuple[object, ...] | list[int]) -> str:
    return " or ".join(str(value) for value in values)
