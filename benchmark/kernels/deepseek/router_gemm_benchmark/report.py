"""What a run leaves: JSON and tables; on request plots and CSV.

`results` is a plain dictionary, as it is in the JSON file:

    gpu, driver, versions, date, command      where, when and how
    num_experts, hidden_size, num_tokens      the shapes: N, K and every M
    weight, logits, bias                      the form; older files are of bf16, float32, no bias
    rounds, links                             replays per sample, calls per graph
    copy_bandwidth_gb_s, producer             measured and used in this run
    providers      name, output, pdl, note, ours, own_kernel, skipped (the reason or null);
                   tf32, where it is true
    accuracy       one `Accuracy` for each provider and M
    bits_change_at by provider the M at which a row's bits change; [] is batch-invariant
    timings        one `Timing` for each provider, mode, M and tp_size
    failures       one `Failure` for each provider that failed while it was timed
    not_run        by tp_size, why it was not
    error          what ended the run early, or null
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from sglang.srt.layers.moe_router.kernel import Form
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3, find_model
from sglang.srt.layers.moe_router.packages import PACKAGES, installed_versions

from .accuracy import TF32_BOUND
from .plots import save_plot
from .providers import BF16, CUBLAS, FP32, FP32_LINEAR, LINEAR, PLAIN
from .timing import CHAIN, MODE_NAMES, MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]

# Columns of a terminal: a wider table is folded.
WIDTH = 80

# Who is 1 in the plot of speed-ups: the first of these that was timed.
_BASES = (CUBLAS, FP32_LINEAR, LINEAR)

_CSV_COLUMNS = (
    *("gpu", "num_experts", "hidden_size", "num_tokens", "provider", "output", "mode", "tp_size"),
    *("q25_us", "median_us", "q75_us", "bytes", "gb_s", "floor_us", "times_floor"),
    *("relative_error", "top8_agreement"),
)
_WITHOUT_PDL = tuple(mode.name for mode in MODES if not mode.pdl)


def versions() -> dict[str, str | None]:
    """The installed packages that a number may depend on, None where one is not there."""
    peers = ("vllm", "nvidia-cutlass-dsl")
    return installed_versions((*PACKAGES, *peers)) | {"cuda": torch.version.cuda}


def driver_version() -> str | None:
    """What nvidia-smi says, None where it does not run."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(output.stdout.split()), None)


def form_of(results: Mapping[str, Any]) -> Form:
    """The form that was measured."""
    dtype, logits_dtype = results.get("weight", "bfloat16"), results.get("logits", "float32")
    return Form(getattr(torch, dtype), getattr(torch, logits_dtype), results.get("bias", False))


def file_stem(gpu: str, num_experts: int, hidden_size: int, form: Form = PLAIN) -> str:
    """`h100` for DeepSeek-V3's gate on an "NVIDIA H100 80GB HBM3", else with shape and form."""
    model = re.search(r"\b[A-Z]{1,2}\d{2,3}[A-Z]?\b", gpu)
    name = model[0] if model else re.sub(r"\W+", "-", gpu.removeprefix("NVIDIA "))
    known = find_model(num_experts, hidden_size) is DEEPSEEK_V3
    stem = name.lower() + ("" if known else f"_n{num_experts}_k{hidden_size}")
    stem += "_fp32" if form.dtype == FP32 else ""
    stem += "_bf16_logits" if form.logits_dtype == BF16 else ""
    return stem + ("_bias" if form.bias else "")


def save_json(results: Results, directory: Path) -> Path:
    """Writes what is there so far; may be called again and again."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{_stem(results)}.json"
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return path


def save_csv(results: Results, directory: Path) -> Path:
    """One row for each timing, with the accuracy at that M beside it."""
    path = directory / f"{_stem(results)}.csv"
    accuracy = {(each["provider"], each["num_tokens"]): each for each in results["accuracy"]}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        outputs = {each["name"]: each["output"] for each in results["providers"]}
        for timing in results["timings"]:
            right = accuracy.get((timing["provider"], timing["num_tokens"]), {})
            row = results | timing | right
            row["output"] = outputs[timing["provider"]]
            row["relative_error"] = right.get("relative", {}).get("random")
            writer.writerow([_cell(row.get(column)) for column in _CSV_COLUMNS])
    return path


def save_plots(results: Results, directory: Path, svg: bool = False) -> list[Path]:
    """µs by M with the floor, and the speed-up over cuBLAS, each as PNG, and SVG on request."""
    mode = headline_mode(results)
    series = _series(results, mode)
    if not series:
        return []
    floors: dict[int, float] = {}
    for timing in results["timings"]:
        if (timing["mode"], timing["tp_size"]) == (mode, 1):
            # fp32 logits are a few more bytes than bf16 ones.
            num_tokens = timing["num_tokens"]
            floors[num_tokens] = max(floors.get(num_tokens, 0.0), timing["floor_us"])
    saved = _plot(
        results,
        series | {"floor: bytes / copy bandwidth": dict(sorted(floors.items()))},
        (f"router GEMM, {mode}: time of one call", "µs", "lower is better"),
        directory / plot_stem(results, mode),
        svg,
    )
    base_name = next((name for name in _BASES if name in series), None)
    if base_name is not None:
        base = series[base_name]
        ratios = {
            name: {m: base[m] / us for m, us in points.items() if m in base}
            for name, points in series.items()
        }
        saved += _plot(
            results,
            ratios,
            (
                f"router GEMM, {mode}: speed-up over {base_name}",
                f"times as fast as {base_name}",
                "higher is better",
            ),
            directory / f"{_stem(results)}_speedup",
            svg,
        )
    return saved


def plot_stem(results: Results, mode: str) -> str:
    """Name of the plot of one mode, without its ending."""
    return f"{_stem(results)}_{mode.replace(', ', '_').replace(' ', '_')}"


def headline_mode(results: Results) -> str:
    """`chain`, or where that could not be measured the first mode that was."""
    measured = {timing["mode"] for timing in results["timings"]}
    return next((mode for mode in MODE_NAMES if mode in measured), CHAIN.name)


def medians(results: Results, mode: str, tp_size: int = 1) -> dict[int, dict[str, float]]:
    """Median µs by M and then by provider."""
    found: dict[int, dict[str, float]] = {}
    for timing in results["timings"]:
        if (timing["mode"], timing["tp_size"]) == (mode, tp_size):
            found.setdefault(timing["num_tokens"], {})[timing["provider"]] = timing["median_us"]
    return dict(sorted(found.items()))


def accuracy_table(results: Results) -> str:
    """One row for each provider, its worst M; below, why one is not there or failed."""
    rows, remarks = [], []
    for provider in results["providers"]:
        name = provider["name"]
        checks = [each for each in results["accuracy"] if each["provider"] == name]
        if provider["skipped"] is not None:
            rows.append([name, "skipped"] + [""] * 5)
            remarks.append(f"{name}: skipped: {_short(provider['skipped'])}")
            continue
        failed = next((each for each in checks if each["failure"]), None)
        verdict = "right" if checks else "no M served"
        if failed is not None:
            verdict = "FAILED"
            where = f"FAILED at M = {failed['num_tokens']}"
            remarks.append(f"{name}: {where}: {_short(failed['failure'])}")
        elif checks and provider.get("tf32"):
            remarks.append(f"{name}: right to TF32's 10 bits, within {TF32_BOUND:.0e} of fp64")
        agreements = [
            each["top8_agreement"] for each in checks if each["top8_agreement"] is not None
        ]
        changes = results["bits_change_at"].get(name)
        rows.append(
            [name, verdict]
            + [_worst(checks, "relative", kind) for kind in ("random", "scale", "hot")]
            + [f"{100 * min(agreements):.1f} %" if agreements else "", _invariance(changes)]
        )
    headers = ["provider", "", "random", "scale", "hot", "same\ntop 8", "batch-\ninvariant"]
    table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=[21, 7, *[None] * 4, 13])
    return "\n".join((table, *_indented(remarks)))


def detail_table(results: Results) -> str:
    """Every timing: quartiles, and how many times the floor it is."""
    rows = [
        (
            timing["mode"],
            timing["num_tokens"],
            _in_mode(results, timing["provider"], timing["mode"]),
            timing["tp_size"],
            _us(timing["median_us"]),
            f"{_us(timing['q25_us'])}-{_us(timing['q75_us'])}",
            f"{timing['times_floor']:.1f}",
        )
        for timing in results["timings"]
    ]
    headers = ("mode", "M", "provider", "tp", "µs", "quartiles", "times\nfloor")
    table = tabulate(
        rows, headers, disable_numparse=True, maxcolwidths=[None, None, 22, *[None] * 4]
    )
    remarks = [f"tp {each['tp_size']}: not run: {each['reason']}" for each in results["not_run"]]
    if any(" *" in row[2] for row in rows):
        remarks.append("* PDL cannot be switched off in this provider.")
    return "\n".join((table, *_indented(remarks)))


def mode_table(
    results: Results,
    mode: str,
    tablefmt: str = "simple",
    tp_size: int = 1,
    only: Sequence[int] | None = None,
) -> str:
    """Median µs by M, a column for each provider, and who is fastest with the logits asked for.

    Where a kernel of this project was timed, the last column is the best peer's time over the best
    of ours, those logits again: bf16 ones are another, lesser result than fp32. A peer that rounds
    to TF32 counts: SGLang's server runs it.

    Args:
        only: the M to show, by default all; who is fastest is then left out.
    """
    by_num_tokens = medians(results, mode, tp_size)
    timed = {name for row in by_num_tokens.values() for name in row}
    columns = [each for each in results["providers"] if each["name"] in timed]
    output = results.get("logits", "float32")
    alike = [each for each in columns if each["output"] == output]
    own = [each["name"] for each in alike if each["own_kernel"]]
    peers = [each["name"] for each in alike if not each["ours"]]
    rows = []
    for num_tokens, row in by_num_tokens.items():
        if only is not None and num_tokens not in only:
            continue
        cells = [f"{row[each['name']]:.2f}" if each["name"] in row else "" for each in columns]
        if only is None:
            served = [each["name"] for each in alike if each["name"] in row]
            cells.append(min(served, key=row.__getitem__, default=""))
        if own:
            cells.append(_ratio(row, peers, own))
        rows.append([str(num_tokens), *cells])
    names = [_in_mode(results, each["name"], mode) for each in columns]
    ratio = "best peer / ours"
    if tablefmt == "simple":
        names = [name.replace(" ", "\n") for name in names]
        ratio = "best peer\n/ ours"
    headers = ["M", *names, *(["fastest"] if only is None else []), *([ratio] if own else [])]
    if tablefmt == "simple":
        return _folded(rows, headers)
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def summary(results: Results) -> str:
    """What is printed last, and short: who is right, what failed, `cold`, the headline."""
    headline = headline_mode(results)
    measured = {timing["mode"] for timing in results["timings"]}
    blocks = [accuracy_table(results)]
    blocks += _indented(
        f"FAILED {each['provider']}, {each['mode']}, M = {each['num_tokens']}: {each['reason']}"
        for each in _first_of_each(results["failures"])
    )
    for tp_size in sorted({timing["tp_size"] for timing in results["timings"]} - {1}):
        table = mode_table(results, headline, tp_size=tp_size)
        blocks.append(f"{headline} on {tp_size} GPUs at once, slowest rank, µs:\n{table}")
    blocks += [f"tp {each['tp_size']}: not run: {each['reason']}" for each in results["not_run"]]
    blocks += [
        f"{mode}, µs:\n{mode_table(results, mode)}"
        for mode in dict.fromkeys(("cold", headline))
        if mode in measured
    ]
    return "\n\n".join(blocks)


def _first_of_each(failures: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first failure of each provider; the rest are in the JSON."""
    first: dict[str, dict[str, Any]] = {}
    for failure in failures:
        first.setdefault(failure["provider"], failure)
    return list(first.values())


def _in_mode(results: Results, name: str, mode: str) -> str:
    """The provider's name, with a star where the mode asks for no PDL and it has it."""
    always = any(each["name"] == name and each["pdl"] == "always" for each in results["providers"])
    return f"{name} *" if always and mode in _WITHOUT_PDL else name


def _ratio(row: dict[str, float], peers: Sequence[str], own: Sequence[str]) -> str:
    best_peer = min((row[name] for name in peers if name in row), default=None)
    best_own = min((row[name] for name in own if name in row), default=None)
    return "" if best_peer is None or best_own is None else f"{best_peer / best_own:.2f}"


def _series(results: Results, mode: str) -> dict[str, dict[int, float]]:
    """µs by M of each provider, in the order of `providers`."""
    by_num_tokens = medians(results, mode)
    names = [each["name"] for each in results["providers"]]
    series = {
        name: {m: row[name] for m, row in by_num_tokens.items() if name in row} for name in names
    }
    return {name: points for name, points in series.items() if points}


def _plot(
    results: Results,
    series: dict[str, dict[int, float]],
    texts: tuple[str, str, str],
    path: Path,
    svg: bool,
) -> list[Path]:
    """`texts`: title, unit of the y-axis, and which way is better."""
    title, unit, better = texts
    names = [each["name"] for each in results["providers"]]

    def add_lines(axes: Axes) -> None:
        import matplotlib.pyplot as plt

        colors = [plt.get_cmap("tab20")(place) for place in (*range(0, 20, 2), *range(1, 20, 2))]
        # The legend lists the lines as they lie at the largest M, from top to bottom.
        for name, points in sorted(series.items(), key=lambda each: -list(each[1].values())[-1]):
            style: dict[str, Any] = {"color": "black", "linestyle": ":"}
            if name in names:
                ours = results["providers"][names.index(name)]["ours"]
                style = {"color": colors[names.index(name)], "linestyle": "--" if ours else "-"}
                style |= {"marker": "s" if ours else "o", "markersize": 4}
            axes.plot(list(points), list(points.values()), label=name, **style)
        axes.set_ylim(bottom=0)

    num_tokens = results["num_tokens"]
    wide = num_tokens[-1] > 32
    if wide:
        num_tokens = [each for each in num_tokens if each.bit_count() == 1]  # powers of two
    shape = f"N = {results['num_experts']}, K = {results['hidden_size']}"
    form = form_of(results)
    inputs = "fp32 weight" if form.dtype == FP32 else "bf16 inputs"
    inputs += ", bf16 logits" if form.logits_dtype == BF16 else ""
    inputs += ", bias" if form.bias else ""
    return save_plot(
        path,
        add_lines,
        title=f"{results['gpu']}: {title}\n{shape}, {inputs}; {better}",
        labels=("M (num_tokens)", unit),
        ticks=num_tokens if len(num_tokens) <= 20 else (),
        powers_of_two=wide,
        svg=svg,
    )


def _folded(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """The table; where it is wider than a terminal in parts, each with the first column."""
    parts: list[str] = []
    shown = [0]
    for column in range(1, len(headers)):
        if len(shown) > 1 and _width(_columns(rows, headers, [*shown, column])) > WIDTH:
            parts.append(_columns(rows, headers, shown))
            shown = [0]
        shown.append(column)
    return "\n\n".join((*parts, _columns(rows, headers, shown)))


def _columns(rows: Sequence[Sequence[str]], headers: Sequence[str], shown: Sequence[int]) -> str:
    cells = [[row[each] for each in shown] for row in rows]
    return tabulate(cells, [headers[each] for each in shown], disable_numparse=True)


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _indented(remarks: Iterable[str]) -> list[str]:
    return [textwrap.fill(each, WIDTH, subsequent_indent="  ") for each in remarks]


def _us(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _stem(results: Results) -> str:
    shape = results["num_experts"], results["hidden_size"]
    return file_stem(results["gpu"], *shape, form_of(results))


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def _short(reason: str) -> str:
    return reason if len(reason) <= 90 else reason[:89] + "…"


def _worst(checks: Sequence[dict[str, Any]], measure: str, kind: str) -> str:
    errors = [each[measure][kind] for each in checks if kind in each[measure]]
    return f"{max(errors):.0e}" if errors else ""


def _invariance(changes: list[int] | None) -> str:
    if changes is None:
        return ""
    return "no, at M = " + ", ".join(map(str, changes)) if changes else "yes"
