"""Which backend serves a router GEMM: a table, and one pure function that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from sglang.srt.utils.router_gemm.call import ALIGNMENT_BYTES, RouterGemmCall

BACKENDS = ("auto", "cluster", "flashinfer", "sgl_kernel", "torch", "off")


class Rule(NamedTuple):
    """The calls that one backend's kernel takes; None stands for 'any'."""

    device_types: tuple[str, ...]
    min_sm: int | None
    num_experts: tuple[int, ...] | range | None
    hidden_sizes: tuple[int, ...] | range | None
    num_tokens: range | None
    dtypes: tuple[torch.dtype, ...]
    any_layout: bool
    """Takes strided and unaligned tensors too."""


_BF16 = (torch.bfloat16,)
_HALF = (torch.bfloat16, torch.float16)

# A range in steps stands for the multiples of its step.
_N, _K = range(16, 1025, 16), range(512, 8193, 512)

# fmt: off
#                      device           SM >=  N           K        M              dtypes  any
#                                                                                          layout
RULES: Mapping[str, Rule] = {
    "cluster":    Rule(("cuda",),       90,    _N,         _K,      range(0, 129), _BF16,  False),
    "flashinfer": Rule(("cuda",),       90,    (256,),     (7168,), range(1, 17),  _BF16,  False),
    "sgl_kernel": Rule(("cuda",),       90,    (256, 384), (7168,), range(1, 17),  _BF16,  False),
    "torch":      Rule(("cuda", "cpu"), None,  None,       None,    None,          _HALF,  True),
}


class Auto(NamedTuple):
    """Where `auto` takes a backend: where it was seen to be the faster one."""

    backend: str
    sms: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    """N and K."""
    num_tokens: range


# On every other GPU, and for every other shape, `auto` leaves SGLang's own forward alone.
AUTO: tuple[Auto, ...] = (
    # docs/kernel.md: faster than every other kernel on an H100 and on an H200. Where the weights
    # have fewer bytes, SGLang's own is the faster one at the smallest M.
    Auto("cluster", (90,), ((256, 7168),), range(1, 129)),
    Auto("cluster", (90,), ((384, 7168), (256, 6144)), range(1, 17)),
    Auto("cluster", (90,), ((160, 5120),), range(2, 17)),
    Auto("cluster", (90,), ((128, 7168),), range(4, 17)),
    # SGLang PRs 17707 (SM 100) and 23285 (SM 103).
    Auto("flashinfer", (100, 103), ((256, 7168),), range(1, 17)),
)
# fmt: on

_AUTO_ON_SM: Mapping[int | None, tuple[Auto, ...]] = {
    sm: tuple(row for row in AUTO if sm in row.sms) for auto in AUTO for sm in auto.sms
}

# Where a kernel of this project was timed; elsewhere it can be forced, and doctor says so.
MEASURED_SMS: Mapping[str, tuple[int, ...]] = {"cluster": (90,)}


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
    if not _allows(rule.num_experts, call.num_experts):
        must = _or(rule.num_experts)
        return Refusal("num_experts", f"N is {call.num_experts}, must be {must}")
    if not _allows(rule.hidden_sizes, call.hidden_size):
        must = _or(rule.hidden_sizes)
        return Refusal("hidden_size", f"K is {call.hidden_size}, must be {must}")
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
    if not _allows(rule.num_tokens, call.num_tokens):
        must = _or(rule.num_tokens)
        return Refusal("num_tokens", f"M is {call.num_tokens}, must be {must}")
    if not rule.any_layout and not call.row_major:
        return Refusal("row_major", "hidden_states and weight must be dense and row-major")
    if not rule.any_layout and call.aligned is False:
        return Refusal("aligned", f"tensors must start at a multiple of {ALIGNMENT_BYTES} bytes")
    return None


def considered(requested: str, sm: int | None) -> tuple[str, ...]:
    """The backends that `select_backend` may choose from; of no other it asks the availability.

    Args:
        requested: what the user asked for, one of `BACKENDS`.
        sm: the device's compute capability, as in `RouterGemmCall`.
    """
    if requested == "auto":
        return tuple(dict.fromkeys(auto.backend for auto in _AUTO_ON_SM.get(sm, ())))
    return (requested,) if requested in RULES else ()


def select_backend(
    call: RouterGemmCall, requested: str, unavailable: Mapping[str, str | None]
) -> Decision:
    """Decides who serves `call`.

    Args:
        requested: what the user asked for, one of `BACKENDS`.
        unavailable: for each backend that is `considered` why its kernel cannot be called
            on this call's device, None if it can.
    """
    if requested == "off":
        return Decision(None, Refusal("off", "switched off"))
    if requested != "auto":
        refusal = refuse(requested, call, unavailable[requested])
        return Decision(requested if refusal is None else None, refusal)
    return _select_auto(call, unavailable)


def _select_auto(call: RouterGemmCall, unavailable: Mapping[str, str | None]) -> Decision:
    if call.device_type != "cuda":
        # No row is for another device, which the rule of any of them says.
        return Decision(None, refuse(AUTO[0].backend, call, None))
    on_sm = _AUTO_ON_SM.get(call.sm, ())
    if not on_sm:
        takes = ", ".join(dict.fromkeys(f"{auto.backend} on SM {_or(auto.sms)}" for auto in AUTO))
        return Decision(None, Refusal("auto_sm", f"auto takes {takes} only"))
    shape = (call.num_experts, call.hidden_size)
    # The rows of this shape; without one, any of them says what does not fit.
    rows = tuple(auto for auto in on_sm if shape in auto.shapes) or on_sm[:1]
    refusals = []
    for auto in rows:
        refusal = _refuse_auto(auto, call, unavailable)
        if refusal is None:
            return Decision(auto.backend)
        refusals.append(refusal)
    return Decision(None, refusals[0])


def _refuse_auto(
    auto: Auto, call: RouterGemmCall, unavailable: Mapping[str, str | None]
) -> Refusal | None:
    refusal = refuse(auto.backend, call, unavailable[auto.backend])
    if refusal is not None:
        return refusal
    shape = (call.num_experts, call.hidden_size)
    if shape not in auto.shapes:
        of_backend = [each for each in _AUTO_ON_SM[call.sm] if each.backend == auto.backend]
        shapes = _or([f"{n}, {k}" for each in of_backend for n, k in each.shapes])
        reason = f"N, K is {shape[0]}, {shape[1]}, auto takes {auto.backend} for {shapes}"
        return Refusal("auto_shape", reason)
    if not _allows(auto.num_tokens, call.num_tokens):
        must = _or(auto.num_tokens)
        reason = f"M is {call.num_tokens}, auto takes {auto.backend} for {must}"
        return Refusal("auto_num_tokens", reason)
    return None


class Served(NamedTuple):
    """A range of M, as a person writes it ("1-16", "17+"), and who serves it."""

    tokens: str
    decision: Decision


def decisions_by_num_tokens(
    call: RouterGemmCall, requested: str, unavailable: Mapping[str, str | None]
) -> list[Served]:
    """The decision for every M ≥ 1; `call.num_tokens` is not read."""
    limits = [rule.num_tokens for rule in RULES.values() if rule.num_tokens is not None]
    limits += [auto.num_tokens for auto in AUTO]
    edges = {1} | {limit.start for limit in limits} | {limit.stop for limit in limits}
    starts = sorted(edge for edge in edges if edge >= 1)
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


def _allows(allowed: tuple[int, ...] | range | None, value: int | None) -> bool:
    if allowed is None or value is None:
        return True
    if isinstance(allowed, range):  # in plain arithmetic, which torch.compile traces
        first, last = allowed[0], allowed[-1]
        return first <= value <= last and (value - first) % allowed.step == 0
    return value in allowed


def _or(values: Iterable[object] | None) -> str:
    if isinstance(values, range):
        if values.step == 1:
            return f"{values[0]} to {values[-1]}"
        return f"a multiple of {values.step} up to {values[-1]}"
    return " or ".join(str(value) for value in values or ())
