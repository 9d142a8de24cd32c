"""The console script `sglang-router-gemm`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_router_gemm import __version__, pull_requests


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-router-gemm",
        description="The router of MoE models for SGLang: what runs here, and is it right.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="show the GPU, the versions, the settings, and the path each model's gate takes",
        description="Shows which path the gate of each model takes here, whether its kernel is "
        "in the cache already or would be built, and if it cannot be had, why. Exits with 1 where "
        "DeepSeek-V3 does not get the forced backend, or what auto takes on this GPU.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    commands.add_parser(
        "check",
        help="run SGLang's gate, with the plugin, and compare its logits with fp64",
        description="Runs SGLang's own MoEGate, hooked by SGLang's plugin loader, and "
        "DeepseekV2Gate, for M = 1 to 64 on the GPU or else the CPU, and compares the logits "
        "with fp64. Exits with 1 where they differ by more than rounding.",
    )
    prebuild = commands.add_parser(
        "prebuild",
        help="build the kernels now, without a GPU, so that the server does not",
        description="Builds every kernel that would otherwise be compiled when the server "
        "starts: by default what auto takes, for the models that doctor lists. Needs nvcc and no "
        "GPU. Exits with 1 where a build fails, or where there is nothing to build.",
    )
    prebuild.add_argument(
        "--backend",
        metavar="NAME",
        help="whose kernels, cluster or flashinfer (default: what auto takes on each ARCH)",
    )
    prebuild.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="compute capabilities of the GPUs, as in 9.0a 10.0a (default: this machine's)",
    )
    _add_whose_gate(prebuild, "build for it alone")
    prebuild.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to start the server with, in the variables that are shown at the end "
        "(default: the folders that those name already, else the home's .cache)",
    )
    bench = commands.add_parser(
        "bench",
        help="measure what each backend gains on this GPU, and say which setting to use",
        description="Times SGLang's own gate and every backend in turn, in CUDA graphs behind the "
        "kernel that SGLang runs before the gate, after comparing all with fp64. Takes a minute, "
        "and longer where kernels have to be built. Exits with 1 where there is no GPU, or where "
        "the plugin hooks no gate of the model, or nothing that does the same can be timed.",
    )
    _add_whose_gate(bench, "measure for it (default: DeepSeek-V3)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    export = commands.add_parser(
        "export",
        help="turn a clean SGLang source checkout into one of the pull requests",
        description="Puts a kernel, its op, a test and a benchmark into an SGLang source tree and "
        "edits its gate or its top-k. Written for SGLang 0.5.23; exits with 1, and changes "
        "nothing, where that does not apply.",
    )
    export.add_argument("checkout", type=Path, metavar="CHECKOUT", help="SGLang's source tree")
    export.add_argument(
        "--pr",
        required=True,
        choices=pull_requests.NAMES,
        help="gate: this project's kernel, on SM 90; flashinfer: FlashInfer's, on SM 100 and 103; "
        "fp32: the kernel of gate, which must be committed, for fp32 router weights; "
        "routing: the top-k behind the gate, on SM 90",
    )
    only = export.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="say whether it applies, change nothing")
    only.add_argument("--diff", action="store_true", help="print the diff, change nothing")
    return parser


def _add_whose_gate(command: argparse.ArgumentParser, what_for: str) -> None:
    whose = command.add_mutually_exclusive_group()
    whose.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help=f"a model's config.json, or its folder: {what_for}",
    )
    whose.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("N", "K"),
        help=f"a gate with N experts and a hidden_size of K: {what_for}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; 2 stands for a bad setting."""
    arguments = build_parser().parse_args(argv)
    if not _has_sglang():
        print("sglang-router-gemm: SGLang is not installed; pip install sglang", file=sys.stderr)
        return 1
    if arguments.command == "prebuild":
        from sglang_router_gemm import prebuild

        return prebuild.run(
            arguments.backend, arguments.arch, arguments.out, arguments.model, arguments.shape
        )
    if arguments.command == "export":
        try:
            from sglang_router_gemm import export
        except ModuleNotFoundError as error:
            print(f"sglang-router-gemm: {error}; pip install '.[export]'", file=sys.stderr)
            return 1
        return export.run(
            arguments.checkout, arguments.pr, check=arguments.check, diff=arguments.diff
        )
    # Imported late: SGLang takes seconds, and --help needs none of it.
    from sglang.srt.layers.moe_router.environ import pdl_enabled, requested_backend

    try:
        requested_backend()
        pdl_enabled()
    except ValueError as error:
        print(f"sglang-router-gemm: {error}", file=sys.stderr)
        return 2
    if arguments.command == "bench":
        from sglang_router_gemm import bench

        return bench.run(arguments.model, arguments.shape, arguments.json)
    if arguments.command == "doctor":
        from sglang_router_gemm import doctor

        return doctor.run(as_json=arguments.json)
    from sglang_router_gemm import check

    return check.run()


def _has_sglang() -> bool:
    spec = importlib.util.find_spec("sglang")
    # A folder of that name, as an uninstall may leave one, is a module without an origin.
    return spec is not None and spec.origin is not None
