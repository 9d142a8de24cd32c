"""Are a provider's logits right? Asked of every provider, before it is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from sglang.srt.layers.moe_router.packages import first_line
from sglang_router_gemm.routing import agreement, grouped_topk, relative_error

from .providers import Gemm, Provider

KINDS = ("random", "scale", "cancel", "hot")
ROUTED_TOKENS = 1024

# fp32 accumulation over K = 7168 gives 2e-7, cuBLAS's on tensor cores 1.4e-6 (H100).
# bf16 logits carry 8 bits of mantissa.
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
# TF32 has 10 of a weight's: who cuts off the rest is off by up to that.
TF32_BOUND = 2.0**-10


@dataclass
class Accuracy:
    """How far one provider's logits are from fp64 at one number of tokens.

    Attributes:
        relative: by kind of input, ‖logits - fp64‖ / ‖fp64‖.
        scaled: by kind of input, the worst row's root mean square of
            |logit - fp64| / (‖h‖ ‖w‖ / √K), an error beside the size that the dot product
            of two such rows has when they are unrelated, and the bias with it. Neither a
            large row, nor a hot expert, nor a sum that cancels hides or blows up an error.
        top8_agreement: share of the rows, 0 to 1, whose 8 experts are those of fp64.
        failure: why the provider is not timed; None if it passed.
    """

    provider: str
    num_tokens: int
    relative: dict[str, float] = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)
    top8_agreement: float | None = None
    failure: str | None = None


def bound(provider: Provider) -> float:
    """The relative error up to which its logits are right."""
    return TF32_BOUND if provider.tf32 else _BOUND[provider.output]


def make_inputs(
    kind: str,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh `hidden_states` `[M, K]`, in bf16, and `weight` `[N, K]`, in `dtype`.

    `random`: logits of variance 1. `scale`: rows from 2^-30 to 2^30 times that. `cancel`:
    sums that nearly cancel over the two halves of K. `hot`: one expert 64 times larger.
    """
    hidden_states = torch.randn(num_tokens, hidden_size, device=device)
    weight = torch.randn(num_experts, hidden_size, device=device) / math.sqrt(hidden_size)
    if kind == "scale":
        exponents = torch.linspace(30, -30, num_tokens, device=device).round()
        hidden_states *= torch.exp2(exponents).unsqueeze(1)
    elif kind == "cancel":
        half = hidden_size // 2
        hidden_states[:, half:] = hidden_states[:, :half]
        weight[:, half:] = -weight[:, :half]
        # What is left of the sum comes from every 64th element.
        weight[:, ::64] = torch.randn_like(weight[:, ::64]) / math.sqrt(hidden_size)
    elif kind == "hot":
        weight[int(torch.randint(num_experts, ()))] *= 64
    return hidden_states.bfloat16(), weight.to(dtype)


def reference(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The logits in fp64, `[M, N]`."""
    logits = hidden_states.double() @ weight.double().t()
    return logits if bias is None else logits + bias.double()


def scaled_error(
    logits: torch.Tensor,
    expected: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> float:
    """The worst row's error beside ‖h‖ ‖w‖ / √K (see `Accuracy.scaled`)."""
    row_norms = hidden_states.double().norm(dim=1, keepdim=True)
    expert_norms = weight.double().norm(dim=1)
    size = row_norms * expert_norms / math.sqrt(weight.shape[1])
    if bias is not None:
        size = size.hypot(bias.double())
    rows = ((logits.double() - expected) / size).square().mean(dim=1).sqrt()
    return float(rows.nan_to_num(torch.inf).max())


def call_poisoned(
    provider: Provider, gemm: Gemm, hidden_states: torch.Tensor, weight: torch.Tensor, pdl: bool
) -> torch.Tensor:
    """Calls with `out` full of NaN, and with NaN in the memory an API would allocate.

    Raises:
        ValueError: the logits have another shape or dtype than they must.
    """
    shape = (hidden_states.shape[0], weight.shape[0])
    out = torch.full(shape, torch.nan, dtype=provider.output, device=weight.device)
    # The caching allocator hands freed blocks of this size out again.
    freed = [torch.full_like(out, torch.nan) for _ in range(4)]
    del freed
    logits = gemm(hidden_states, weight, out, pdl)
    if tuple(logits.shape) != shape or logits.dtype != provider.output:
        raise ValueError(
            f"logits are {logits.dtype} {list(logits.shape)}, "
            f"must be {provider.output} {list(shape)}"
        )
    return logits


def check(
    provider: Provider,
    gemm: Gemm,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
    device: torch.device,
) -> Accuracy:
    """Runs every kind of input, with PDL and without, and the routing."""
    found = Accuracy(provider.name, num_tokens)
    shape = num_tokens, num_experts, hidden_size
    allowed, bias = bound(provider), provider.bias
    try:
        for kind in KINDS:
            hidden_states, weight = make_inputs(kind, *shape, device, provider.dtype)
            expected = reference(hidden_states, weight, bias)
            relative = scaled = 0.0
            for pdl in (True, False) if provider.pdl == "switch" else (True,):
                logits = call_poisoned(provider, gemm, hidden_states, weight, pdl)
                relative = max(relative, relative_error(logits, expected))
                scaled = max(scaled, scaled_error(logits, expected, hidden_states, weight, bias))
            found.relative[kind], found.scaled[kind] = relative, scaled
            # A sum that cancels has no small relative error in any finite precision.
            error = scaled if kind == "cancel" else max(relative, scaled)
            if not error <= allowed:
                found.failure = f"error {error:.1e} on {kind} inputs, must be <= {allowed:.0e}"
                return found
        found.top8_agreement = _routing(provider, gemm, *shape, device)
    except Exception as error:  # JIT, launch or driver: this provider is out, the run goes on
        found.failure = first_line(error)
    return found


def _routing(
    provider: Provider,
    gemm: Gemm,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
    device: torch.device,
) -> float:
    """Share of about `ROUTED_TOKENS` rows, M at a time, that pick fp64's 8 experts."""
    batches = max(1, ROUTED_TOKENS // num_tokens)
    hidden_states, weight = make_inputs(
        "random", batches * num_tokens, num_experts, hidden_size, device, provider.dtype
    )
    logits = torch.cat(
        [
            call_poisoned(provider, gemm, rows, weight, True)
            for rows in hidden_states.split(num_tokens)
        ]
    )
    exact = reference(hidden_states, weight, provider.bias)
    picked, expected = (grouped_topk(each) for each in (logits.double(), exact))
    return agreement(picked, expected)


def bits_by_num_tokens(
    provider: Provider,
    gemm: Gemm,
    num_tokens: list[int],
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """The logits of the first M rows of `hidden_states`, for each M."""
    return {
        each: call_poisoned(provider, gemm, hidden_states[:each], weight, True).clone()
        for each in num_tokens
    }


def bits_change_at(logits_by_num_tokens: Mapping[int, torch.Tensor]) -> list[int]:
    """The M at which a row's bits are not those it had at the next smaller M."""
    ascending = sorted(logits_by_num_tokens)
    changes = []
    for smaller, larger in pairwise(ascending):
        before = logits_by_num_tokens[smaller]
        if not torch.equal(before, logits_by_num_tokens[larger][:smaller]):
            changes.append(larger)
    return changes
