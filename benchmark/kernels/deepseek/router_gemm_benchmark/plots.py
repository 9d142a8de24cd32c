"""One diagram as every report has it: PNG, and SVG where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_plot(
    path: Path,
    add_lines: Callable[[Axes], None],
    *,
    title: str,
    labels: tuple[str, str],
    ticks: Sequence[int],
    powers_of_two: bool,
    svg: bool,
) -> list[Path]:
    """Draws and saves; returns the files.

    Args:
        path: without its ending.
        labels: of the x-axis and of the y-axis.
        ticks: every x that has a mark; none: matplotlib chooses.
        powers_of_two: x goes up in these.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.name  # or each SVG differs from the one before
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    add_lines(axes)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if powers_of_two:
        axes.set_xscale("log", base=2)
    if ticks:
        axes.set_xticks(ticks, labels=[str(each) for each in ticks])
    axes.grid(alpha=0.3)
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    saved = [path.with_suffix(".png")]
    figure.savefig(saved[0], dpi=130)
    if svg:
        saved.append(path.with_suffix(".svg"))
        figure.savefig(saved[1], metadata={"Date": None})
    plt.close(figure)
    return saved
