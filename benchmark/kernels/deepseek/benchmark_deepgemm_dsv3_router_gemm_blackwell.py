"""Router GEMM of DeepSeek-V3-class models: is it right, and how fast, against every peer.

    python3 benchmark_deepgemm_dsv3_router_gemm_blackwell.py --quick
    python3 benchmark_deepgemm_dsv3_router_gemm_blackwell.py --save-path results
    python3 benchmark_deepgemm_dsv3_router_gemm_blackwell.py --weight fp32 --save-path results
    python3 benchmark_deepgemm_dsv3_router_gemm_blackwell.py --from-json FILE --csv --save-path DIR

`logits[M, N] = hidden_states[M, K] @ weight[N, K].T`, bf16 in and fp32 out unless asked for
otherwise. Every provider is first compared with fp64; what is wrong is not timed. Without a GPU
it checks the logits of SGLang's gate on the CPU and times nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from router_gemm_benchmark import how_to_call

if TYPE_CHECKING:
    import torch
    from router_gemm_benchmark.providers import Provider
    from router_gemm_benchmark.report import Results
    from router_gemm_benchmark.timing import Bench, Candidate

    from sglang.srt.layers.moe_router.kernel import Form

MAX_NUM_TOKENS, MAX_TP_SIZE = 128, 8
ROUNDS, QUICK_ROUNDS = 50, 15
NUM_TOKENS, QUICK_NUM_TOKENS = tuple(range(1, 17)), (1, 8, 16)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def build_parser() -> argparse.ArgumentParser:
    from router_gemm_benchmark import providers  # noqa: F401  makes the table importable
    from router_gemm_benchmark.timing import MODE_NAMES

    from sglang.srt.layers.moe_router.backends import BACKENDS, either
    from sglang.srt.layers.moe_router.models import DEEPSEEK_V3

    rule = BACKENDS["cluster"].rule
    parser = _Parser(
        usage="%(prog)s [options]",
        description="Accuracy and speed of the router GEMM of DeepSeek-V3-class models, "
        "against every peer that is installed.",
        epilog="Modes: 'chain', the kernel that SGLang runs before the gate, then the GEMM, for "
        "58 layers, less the former alone, PDL on (the headline); 'cold', 58 weights back to "
        "back, PDL on; 'cold, no PDL'; 'warm', one weight, in L2, no PDL; and "
        "triton.testing.do_bench.",
    )
    parser.add_argument(
        "--num-tokens",
        type=_integer_in("M", 1, MAX_NUM_TOKENS),
        nargs="+",
        metavar="M",
        help=f"rows of hidden_states, 1 to {MAX_NUM_TOKENS} (default: 1 to 16)",
    )
    for option, letter, values, default in (
        ("--num-experts", "N", rule.num_experts, DEEPSEEK_V3.num_experts),
        ("--hidden-dim", "K", rule.hidden_sizes, DEEPSEEK_V3.hidden_size),
    ):
        assert values is not None
        parser.add_argument(
            option,
            type=_integer_of(letter, values, either(values)),
            default=default,
            metavar=letter,
            help=f"{either(values)} (default: %(default)s)",
        )
    for option, default_dtype in (("--weight", "bf16"), ("--logits", "fp32")):
        parser.add_argument(
            option,
            choices=("bf16", "fp32"),
            default=default_dtype,
            help=f"dtype of the {option[2:]} (default: %(default)s)",
        )
    parser.add_argument(
        "--bias", action="store_true", help="with a bf16 bias; for --logits bf16 alone"
    )
    parser.add_argument(
        "--tp-sizes",
        type=_integer_in("a tensor-parallel size", 1, MAX_TP_SIZE),
        nargs="+",
        default=[1],
        metavar="TP",
        help="GPUs to time at once, one process each; the gate is replicated, so the shape "
        "stays, and the slowest rank is reported (default: 1)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="WORD",
        help="only providers of this name or, where none has it, whose name contains it; upper or "
        "lower case",
    )
    parser.add_argument(
        "--rounds",
        type=_integer_in("the number of rounds", 1, 100_000),
        help=f"replays of each graph (default: {ROUNDS})",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODE_NAMES,
        default=MODE_NAMES,
        metavar="MODE",
        help="of those below (default: all)",
    )
    parser.add_argument(
        "--save-path", type=Path, metavar="DIR", help="write JSON and plots (PNG) there"
    )
    parser.add_argument("--csv", action="store_true", help="into --save-path, too: the timings")
    parser.add_argument("--svg", action="store_true", help="into --save-path, too: the plots")
    parser.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="measure nothing: show what an earlier run wrote, and write its plots, and CSV and "
        "SVG where asked, into --save-path; needs no GPU",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"M = {', '.join(map(str, QUICK_NUM_TOKENS))} and {QUICK_ROUNDS} rounds, unless given",
    )
    parser.add_argument("--check-only", action="store_true", help="accuracy only, time nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a backend of ours failed or the run broke, 2 for a bad argument."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    save_path = arguments.save_path
    if save_path is not None and save_path.is_file():
        parser.error(f"argument --save-path: {save_path} is a file, must be a folder")
    if save_path is None and (arguments.csv or arguments.svg):
        parser.error(f"argument --{'csv' if arguments.csv else 'svg'}: it needs --save-path")
    if arguments.bias and arguments.logits != "bf16":
        parser.error("argument --bias: it needs --logits bf16")
    import torch
    from router_gemm_benchmark.providers import all_providers

    if arguments.from_json is not None:
        try:
            results = json.loads(arguments.from_json.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"argument --from-json: {error}")
        show(results, save_path, arguments.csv, arguments.svg)
        return 0
    gpu = torch.cuda.is_available() and torch.version.cuda is not None
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    shape = arguments.num_experts, arguments.hidden_dim
    providers = all_providers(*shape, device, given_form(arguments))
    try:
        providers = filter_providers(providers, arguments.providers)
    except ValueError as error:
        parser.error(f"argument --providers: {error}")
    if not gpu:
        return check_on_cpu(given_options(parser, arguments))
    default = QUICK_NUM_TOKENS if arguments.quick else NUM_TOKENS
    num_tokens = sorted(set(arguments.num_tokens or default))
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    command = shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    results = empty_results(arguments, num_tokens, rounds, command)
    with torch.no_grad():
        status = run(
            results,
            providers,
            sorted(set(arguments.tp_sizes)),
            device,
            save_path,
            arguments.check_only,
        )
    if not arguments.check_only:
        show(results, save_path, arguments.csv, arguments.svg)
    return status


def given_form(arguments: argparse.Namespace) -> Form:
    from router_gemm_benchmark.providers import BF16, FP32

    from sglang.srt.layers.moe_router.kernel import Form

    dtypes = {"bf16": BF16, "fp32": FP32}
    return Form(dtypes[arguments.weight], dtypes[arguments.logits], arguments.bias)


def given_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The options, but for --check-only, whose value is not the default."""
    return [
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if name != "check_only" and value != parser.get_default(name)
    ]


def check_on_cpu(ignored: Sequence[str]) -> int:
    """The gate's logits in real SGLang; there is nothing to time without a GPU."""
    from sglang_router_gemm import check

    if ignored:
        verb = "is" if len(ignored) == 1 else "are"
        print(f"No CUDA device: {', '.join(ignored)} {verb} ignored.")
    status = check.run()
    print("Nothing was timed: this machine has no CUDA device.")
    return status


def filter_providers(providers: list[Provider], words: Sequence[str] | None) -> list[Provider]:
    """Those whose name contains one of `words`; all where none are given.

    A word that is a provider's whole name stands for that provider alone.

    Raises:
        ValueError: a word is in no name.
    """
    if words is None:
        return providers
    names = [provider.name.lower() for provider in providers]
    wanted: set[str] = set()
    for word in map(str.lower, words):
        found = [word] if word in names else [name for name in names if word in name]
        if not found:
            there = ", ".join(provider.name for provider in providers)
            raise ValueError(f"no provider has {word!r} in its name; there are: {there}")
        wanted.update(found)
    return [provider for provider in providers if provider.name.lower() in wanted]


def empty_results(
    arguments: argparse.Namespace, num_tokens: list[int], rounds: int, command: str
) -> Results:
    """What is known before anything has run (see `report`)."""
    import torch
    from router_gemm_benchmark import report
    from router_gemm_benchmark.timing import LINKS

    from sglang.srt.layers.moe_router.kernel import dtype_name

    form = given_form(arguments)
    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU",
        "driver": report.driver_version(),
        "versions": report.versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "num_experts": arguments.num_experts,
        "hidden_size": arguments.hidden_dim,
        "weight": dtype_name(form.dtype),
        "logits": dtype_name(form.logits_dtype),
        "bias": form.bias,
        "num_tokens": num_tokens,
        "rounds": rounds,
        "modes": list(arguments.modes),
        "links": LINKS,
        "copy_bandwidth_gb_s": None,
        "producer": None,
        "providers": [],
        "accuracy": [],
        "bits_change_at": {},
        "timings": [],
        "failures": [],
        "not_run": [],
        "error": None,
    }


def run(
    results: Results,
    providers: list[Provider],
    tp_sizes: list[int],
    device: torch.device,
    save_path: Path | None,
    check_only: bool,
) -> int:
    """Accuracy, then speed. Whatever happens, what was found until then is written."""
    from router_gemm_benchmark import report

    def save() -> None:
        if save_path is not None:
            report.save_json(results, save_path)

    try:
        candidates = build_all(results, providers)
        right = check_all(results, candidates, device, save)
        if check_only:
            print(report.accuracy_table(results))
        else:
            time_all(results, right, tp_sizes, device, save)
    except Exception as error:  # a broken CUDA context takes everything after it along
        traceback.print_exc()
        results["error"] = f"{type(error).__name__}: {error}"
    finally:
        save()
    if results["error"] is not None:
        print(f"The run ended early: {results['error']}", file=sys.stderr)
    ours = {each["name"] for each in results["providers"] if each["ours"]}
    failed = {each["provider"] for each in results["accuracy"] if each["failure"]}
    failed |= {each["provider"] for each in results["failures"]}
    return int(bool(ours & failed) or results["error"] is not None)


def show(results: Results, save_path: Path | None, csv: bool, svg: bool) -> None:
    """Prints the tables, and writes the plots and what else was asked for."""
    from router_gemm_benchmark import report

    if results["timings"]:
        if save_path is not None:
            save_path.mkdir(parents=True, exist_ok=True)
            report.save_plots(results, save_path, svg)
            if csv:
                report.save_csv(results, save_path)
        print(report.detail_table(results) + "\n")
    print(report.summary(results))


def build_all(results: Results, providers: list[Provider]) -> list[Candidate]:
    """The providers that are there; the others are listed with the reason."""
    from router_gemm_benchmark.providers import Skip
    from router_gemm_benchmark.timing import Candidate

    from sglang.srt.layers.moe_router.kernel import dtype_name

    found = []
    for provider in providers:
        skipped = None
        try:
            found.append(Candidate(provider, provider.build()))
        except Skip as reason:
            skipped = str(reason)
        results["providers"].append(
            {
                "name": provider.name,
                "output": dtype_name(provider.output),
                "pdl": provider.pdl,
                "note": provider.note,
                "ours": provider.ours,
                "own_kernel": provider.own_kernel,
                "skipped": skipped,
            }
            | ({"tf32": True} if provider.tf32 else {})
        )
    return found


def check_all(
    results: Results, candidates: list[Candidate], device: torch.device, save: Callable[[], None]
) -> dict[int, list[Candidate]]:
    """Compares everyone with fp64 at every M; returns by M who was right there."""
    from router_gemm_benchmark import accuracy, report
    from tqdm import tqdm

    from sglang.srt.layers.moe_router.packages import first_line

    num_experts, hidden_size = results["num_experts"], results["hidden_size"]
    largest = max(results["num_tokens"])
    dtype = report.form_of(results).dtype
    rows = accuracy.make_inputs("random", largest, num_experts, hidden_size, device, dtype)
    right: dict[int, list[Candidate]] = {each: [] for each in results["num_tokens"]}
    for candidate in tqdm(candidates, desc="accuracy", disable=None):
        provider, gemm = candidate
        for num_tokens in results["num_tokens"]:
            if provider.supports(num_tokens) is None:
                found = accuracy.check(provider, gemm, num_tokens, num_experts, hidden_size, device)
                results["accuracy"].append(_finite(asdict(found)))
                if found.failure is None:
                    right[num_tokens].append(candidate)
        served = [each for each in right if candidate in right[each]]
        try:
            bits = accuracy.bits_by_num_tokens(provider, gemm, served, *rows)
            if served:
                results["bits_change_at"][provider.name] = accuracy.bits_change_at(bits)
        except Exception as error:
            results["failures"].append(
                {
                    "provider": provider.name,
                    "mode": "bits",
                    "num_tokens": largest,
                    "reason": first_line(error),
                }
            )
        save()
    return right


def time_all(
    results: Results,
    right: dict[int, list[Candidate]],
    tp_sizes: list[int],
    device: torch.device,
    save: Callable[[], None],
) -> None:
    """Times who was right, on one GPU and then on several at once."""
    import torch
    from router_gemm_benchmark.report import form_of
    from router_gemm_benchmark.timing import Bench, Work, measure_ranks

    from sglang.srt.layers.moe_router.packages import first_line

    shape, form = (results["num_experts"], results["hidden_size"]), form_of(results)
    if 1 in tp_sizes:
        bench = Bench(*shape, results["rounds"], device, form.dtype)
        results["copy_bandwidth_gb_s"] = bench.bandwidth
        results["producer"] = bench.producer_note
        print(f"copy bandwidth {bench.bandwidth:.0f} GB/s; producer: {bench.producer_note}")
        if bench.producer is None:
            print("'chain' is not measured.")
        time_one_gpu(results, right, bench, save)
        del bench
        torch.cuda.empty_cache()
    gpus = torch.cuda.device_count()
    names = {m: [each.provider.name for each in here] for m, here in right.items()}
    work = Work(names, *shape, results["rounds"], form, results["modes"])
    for tp_size in tp_sizes:
        if tp_size > gpus:
            reason = f"{gpus} GPU{'s' if gpus > 1 else ''} here"
            results["not_run"].append({"tp_size": tp_size, "reason": reason})
        elif tp_size > 1:
            try:
                results["timings"] += map(asdict, measure_ranks(tp_size, work))
            except Exception as error:  # a rank died: the other sizes may still run
                reason = first_line(error)
                results["not_run"].append({"tp_size": tp_size, "reason": reason})
        save()


def time_one_gpu(
    results: Results,
    right: dict[int, list[Candidate]],
    bench: Bench,
    save: Callable[[], None],
) -> None:
    from router_gemm_benchmark.timing import DO_BENCH, MODES
    from tqdm import tqdm

    from sglang.srt.layers.moe_router.packages import first_line

    for num_tokens, candidates in tqdm(right.items(), desc="timing", disable=None):
        for mode in MODES:
            if mode.name not in results["modes"] or (mode.produced and bench.producer is None):
                continue
            timings, failures = bench.measure(candidates, num_tokens, mode)
            results["timings"] += map(asdict, timings)
            results["failures"] += map(asdict, failures)
            failed = {each.provider for each in failures}
            candidates = [each for each in candidates if each.provider.name not in failed]
        for candidate in candidates if DO_BENCH in results["modes"] else ():
            try:
                results["timings"].append(asdict(bench.do_bench(candidate, num_tokens)))
            except Exception as error:
                results["failures"].append(
                    {
                        "provider": candidate.provider.name,
                        "mode": DO_BENCH,
                        "num_tokens": num_tokens,
                        "reason": first_line(error),
                    }
                )
        save()
        if not sys.stderr.isatty():
            print(f"timed M = {num_tokens}: {len(candidates)} providers", flush=True)


def _finite(found: dict[str, object]) -> dict[str, object]:
    """JSON has no infinity: a logit that is not finite is an error of 1e300."""
    for measure in ("relative", "scaled"):
        errors = found[measure]
        assert isinstance(errors, dict)
        found[measure] = {kind: min(error, 1e300) for kind, error in errors.items()}
    return found


def _integer_in(what: str, first: int, last: int) -> Callable[[str], int]:
    return _integer_of(what, range(first, last + 1), f"{first} to {last}")


def _integer_of(what: str, values: Sequence[int], phrase: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = values[0] - 1
        if number not in values:
            raise argparse.ArgumentTypeError(f"{what} is {text!r}, must be {phrase}")
        return number

    return parse


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(how_to_call(error))
