"""Writes the benchmark's table and plot into README.md, from the committed results.

python3 update_readme.py            rewrites the block between the two markers
python3 update_readme.py --check    exits with 1 where the block is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from os.path import relpath
from pathlib import Path

from router_gemm_benchmark.report import Results, file_stem, headline_mode, mode_table

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
HERE = Path(__file__).resolve().parent
DEEPSEEK_V3 = (256, 7168)


def block(results: Sequence[Results], folder: str) -> str:
    """The Markdown between the markers: for each GPU a table and a plot.

    Args:
        results: those of DeepSeek-V3's shape, in the order to show.
        folder: where their plots lie, relative to the README.
    """
    parts = [BEGIN]
    for each in results:
        mode = headline_mode(each)
        stem = file_stem(each["gpu"], each["num_experts"], each["hidden_size"])
        versions = ", ".join(
            f"{name} {found}"
            for name in ("torch", "sglang", "flashinfer-python")
            if (found := each["versions"].get(name))
        )
        parts += [
            f"### {each['gpu']}",
            f"`{mode}`, µs by M, median of {each['rounds']} rounds "
            f"({each['date'][:10]}, driver {each['driver']}, {versions}):",
            mode_table(each, mode, tablefmt="github"),
            f"![{mode} on {each['gpu']}]({folder}/{stem}_{mode}.png)",
        ]
    return "\n\n".join([*parts, END])


def replace_block(readme: str, new: str) -> str:
    """`readme` with `new` in place of what lies between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README must have one {BEGIN} and one {END}")
    before, rest = readme.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{END} must come after {BEGIN}")
    return before + new + rest.split(END)[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--readme", type=Path, default=HERE.parents[2] / "README.md")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    arguments = parser.parse_args(argv)
    loaded = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))]
    shown = [
        each
        for each in loaded
        if (each.get("num_experts"), each.get("hidden_size")) == DEEPSEEK_V3 and each["timings"]
    ]
    folder = Path(relpath(arguments.results.resolve(), arguments.readme.resolve().parent))
    try:
        old = arguments.readme.read_text()
        new = replace_block(old, block(shown, folder.as_posix()))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if old == new:
        return 0
    if arguments.check:
        print(f"{arguments.readme} is stale: run {Path(__file__).name}", file=sys.stderr)
        return 1
    arguments.readme.write_text(new)
    print(f"wrote {arguments.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
