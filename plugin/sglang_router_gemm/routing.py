"""How logits compare: their error, and DeepSeek-V3's choice of experts, as a yardstick."""

from __future__ import annotations

import torch

NUM_GROUPS, TOPK_GROUPS, TOPK = 8, 4, 8


def grouped_topk(logits: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The experts that each row picks: the best 8, out of the best 4 of 8 groups.

    A group is worth its two best experts (DeepSeek-V3 technical report,
    arXiv:2412.19437, section 2.1.2, and `topk_method: noaux_tc` in its config.json).

    Args:
        logits: `[M, N]`, N a multiple of 8. Give fp64 for a reference.
        bias: `e_score_correction_bias`, `[N]`, or none.

    Returns:
        Expert ids `[M, 8]`, ascending in each row, so that rows compare as sets.
    """
    scores = logits.sigmoid()
    if bias is not None:
        scores = scores + bias
    groups = scores.unflatten(-1, (NUM_GROUPS, -1))
    group_worth = groups.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_worth, dtype=torch.bool)
    kept.scatter_(-1, group_worth.topk(TOPK_GROUPS, dim=-1).indices, True)
    candidates = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    return candidates.topk(TOPK, dim=-1).indices.sort(dim=-1).values


def agreement(picked: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the rows, 0 to 1, whose experts are the same set (both sorted)."""
    return float((picked == expected).all(dim=-1).double().mean())


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """‖logits - expected‖ / ‖expected‖ in fp64; infinite where a logit is not finite."""
    error = torch.dist(logits.double(), expected.double()) / expected.double().norm()
    return float(error.nan_to_num(torch.inf))
