"""The console script `sglang-router-gemm`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sglang_router_gemm import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-router-gemm",
        description="DeepSeek-V3's router GEMM for SGLang: what runs here, and is it right.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="show the GPU, the versions, the settings, and the path each model's gate takes",
        description="Shows which path the gate of each model takes here, and why not the fast "
        "one. Exits with 1 where a forced backend cannot serve DeepSeek-V3.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    commands.add_parser(
        "check",
        help="run SGLang's gate, with the plugin, and compare its logits with fp64",
        description="Runs SGLang's own MoEGate, hooked by SGLang's plugin loader, and "
        "DeepseekV2Gate, for M = 1 to 64 on the GPU or else the CPU, and compares the logits "
        "with fp64. Exits with 1 where they differ by more than rounding.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; 2 stands for a bad setting."""
    arguments = build_parser().parse_args(argv)
    # Imported late: SGLang takes seconds, and --help needs none of it.
    from sglang.srt.utils.router_gemm.environ import requested_backend

    try:
        requested_backend()
    except ValueError as error:
        print(f"sglang-router-gemm: {error}", file=sys.stderr)
        return 2
    if arguments.command == "doctor":
        from sglang_router_gemm import doctor

        return doctor.run(as_json=arguments.json)
    from sglang_router_gemm import check

    return check.run()
