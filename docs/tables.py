"""What the tables of fill_figures.py and pull_request_figures.py have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from sglang.srt.layers.moe_router.models import DEEPSEEK_V3

Results = Mapping[str, Any]
"""A run, as the script that measured it wrote its JSON."""
NO_RESULTS = "No results of the benchmark are committed yet."


def github(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def by_num_tokens(
    cells: Mapping[tuple[str, ...], Mapping[int, str]], headers: Sequence[str]
) -> str:
    """A table with a column an M.

    Args:
        cells: by the first columns of a row its cells, by M.
        headers: of the first columns.
    """
    columns = sorted({m for row in cells.values() for m in row})
    rows = [(*first, *(row.get(m, "") for m in columns)) for first, row in cells.items() if row]
    return github(rows, (*headers, *(f"M = {m}" for m in columns))) if rows else NO_RESULTS


def medians(timings: Iterable[Results]) -> dict[tuple[str, int], float]:
    """µs by provider and M."""
    return {(each["provider"], each["num_tokens"]): each["median_us"] for each in timings}


def chain(run: Results) -> dict[tuple[str, int], float]:
    """µs in the mode `chain`, by provider and M."""
    timings = (each for each in run["timings"] if each["mode"] == "chain")
    return medians(each for each in timings if each["tp_size"] == 1)


def is_deepseek_v3(run: Results) -> bool:
    shape = DEEPSEEK_V3.num_experts, DEEPSEEK_V3.hidden_size
    return (run["num_experts"], run["hidden_size"]) == shape
