"""2,000 requests to SGLang's real server with the patch, and to one without it.

    python3 benchmark/server/run_dsv3_load.py --output-dir results

Needs one Hopper or Blackwell GPU with 80 GB, SGLang and this package, no model files. Two
servers run on the GPU at once, one with the backend and one with `off`, on the model of
run_dsv3_server.py. Prompts have 1 to 3,000 tokens, answers 4 to 64, one request in ten hangs up
half-way; 1, 4, 16, then 64 clients. Every request goes to the server with the backend once and
to the other one twice, before and after, so that the share of answers that are alike can be
compared with the share between two runs without the patch: batches form differently each time.
What is compiled at a first use, for both, the first pass pays for.

Then each server has the heaviest part again, until two rounds in a row took no memory. PyTorch's
allocator takes another block now and then, whenever batches form as they never did before; a leak
never ends.

Writes `dsv3_load.json` and `dsv3_load.md`; exits with 1 where a request failed, a server no
longer answers, or the GPU's memory still grows after the last of those rounds.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import _setup  # noqa: F401
import torch
from dsv3_server import (
    Server,
    argument_parser,
    deepseek_v3_config,
    environment,
    graph_options,
    parse_arguments,
    prompts,
    side_by_side,
)
from tabulate import tabulate

CLIENTS = {1: 100, 4: 300, 16: 600, 64: 1000}  # clients: requests
LONGEST_PROMPT = 3000
NEW_TOKENS = range(4, 65)
ONE_IN_ABORTS = 10
CAPTURED_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# What a CUDA context or an allocator's next block may take, far less than a leak would.
MEMORY_MARGIN_MIB = 64
MOST_ROUNDS = 10
FLAT_ROUNDS = 2


class Request(NamedTuple):
    prompt: list[int]
    new_tokens: int
    aborted: bool


@dataclass
class Pass:
    """All requests to one server once, by number of clients."""

    backend: str
    answers: dict[int, list[list[int] | None]] = field(default_factory=dict)
    """None where the client hung up or the request failed."""
    seconds: dict[int, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    memory_mib: list[int] = field(default_factory=list)


def plan(count: int, seed: int) -> list[Request]:
    """Requests whose prompts are short more often than long: the logarithm is uniform."""
    source = random.Random(seed)
    requests = []
    for index in range(count):
        length = int(LONGEST_PROMPT ** source.random())
        [prompt] = prompts(1, seed=seed * 10_000 + index, lengths=range(length, length + 1))
        new_tokens = source.choice(NEW_TOKENS)
        requests.append(Request(prompt, new_tokens, source.randrange(ONE_IN_ABORTS) == 0))
    return requests


def send(server: Server, errors: list[str], request: Request) -> list[int] | None:
    try:
        if request.aborted:
            server.abandon(request.prompt, request.new_tokens, chunks=request.new_tokens // 2)
            return None
        [tokens] = server.generate([request.prompt], request.new_tokens)
    except Exception as error:  # whatever it is, it is counted and the load goes on
        errors.append(f"{len(request.prompt)} tokens: {type(error).__name__}: {error}"[:300])
        return None
    return tokens


def used_mib() -> int:
    """Memory of the GPU that is in use, by everyone, with the context that this process has."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


def load(server: Server, done: Pass, clients: int) -> None:
    requests = plan(CLIENTS[clients], seed=clients)
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        done.answers[clients] = list(pool.map(partial(send, server, done.errors), requests))
    done.seconds[clients] = time.monotonic() - started
    server.generate(prompts(1, seed=0), 4)  # it still answers
    done.memory_mib.append(used_mib())


def is_flat(memory_mib: Sequence[int]) -> bool:
    """Whether the last `FLAT_ROUNDS` rounds took no memory."""
    last = memory_mib[-FLAT_ROUNDS - 1 :]
    return len(last) > FLAT_ROUNDS and last[-1] - last[0] <= MEMORY_MARGIN_MIB


def load_until_flat(server: Server, done: Pass) -> None:
    """The heaviest part again and again; `done.memory_mib` has what is in use before and after."""
    done.memory_mib.append(used_mib())
    while len(done.memory_mib) <= MOST_ROUNDS and not is_flat(done.memory_mib):
        load(server, done, max(CLIENTS))


def alike(a: Pass, b: Pass) -> tuple[int, int]:
    """Answers that are the same in both passes, of those that both have."""
    pairs = [
        pair
        for clients in a.answers
        for pair in zip(a.answers[clients], b.answers[clients], strict=True)
        if None not in pair
    ]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)


def report(
    where: dict[str, str], command: str, passes: Sequence[Pass], again: Sequence[Pass]
) -> tuple[str, dict[str, Any]]:
    off, ours, off_again = passes
    rows = [
        (
            clients,
            len(each.answers[clients]),
            sum(answer is None for answer in each.answers[clients]),
            f"{each.seconds[clients]:.1f}",
            each.backend,
            memory,
        )
        for each in passes
        for clients, memory in zip(each.answers, each.memory_mib, strict=True)
    ]
    shares = {
        f"{ours.backend} and off": alike(ours, off),
        "off and off": alike(off, off_again),
    }
    errors = [error for each in (*passes, *again) for error in each.errors]
    text = "\n\n".join(
        [
            "# Load on SGLang's server, a DeepSeek-V3-shaped model",
            "\n".join(f"- {name}: {value}" for name, value in where.items()),
            f"```\n{command}\n```",
            tabulate(
                rows,
                ["clients", "requests", "hung up", "seconds", "backend", "GPU memory, MiB"],
                tablefmt="github",
            ),
            "The same tokens, of the requests that were not given up: "
            + "; ".join(f"{name} {same} of {count}" for name, (same, count) in shares.items())
            + f". Errors: {len(errors)}.",
            f"{max(CLIENTS)} clients again, until {FLAT_ROUNDS} rounds in a row took no memory "
            f"(at most {MOST_ROUNDS} rounds); the GPU's memory before and after each, MiB:",
            "\n".join(
                f"- `{each.backend}`: {', '.join(map(str, each.memory_mib))}"
                + ("" if is_flat(each.memory_mib) else ": still growing")
                for each in again
            ),
            *errors[:20],
        ]
    )
    results = {
        "environment": where,
        "command": command,
        "passes": [asdict(each) for each in passes],
        "alike": shares,
        "again": [asdict(each) for each in again],
        "errors": errors,
    }
    return text, results


def main() -> int:
    parser = argument_parser(__doc__, backend="auto", num_layers=5)
    arguments = parse_arguments(parser)
    extra = [*graph_options(CAPTURED_BATCH_SIZES), *arguments.server_options]
    passes = [Pass("off"), Pass(arguments.backend), Pass("off")]
    config = deepseek_v3_config(arguments.num_layers)
    backends = (arguments.backend, "off")
    with side_by_side(config, backends, arguments.output_dir, arguments.port, extra) as (ours, off):
        for server, each in zip((off, ours, off), passes, strict=True):
            for clients in CLIENTS:
                load(server, each, clients)
            print(f"{each.backend}: {sum(each.seconds.values()):.0f} s", flush=True)
        again = [Pass(arguments.backend), Pass("off")]
        for server, each in zip((ours, off), again, strict=True):
            load_until_flat(server, each)
        command = ours.shown_command
    text, results = report(environment(), command, passes, again)
    (arguments.output_dir / "dsv3_load.md").write_text(text + "\n")
    (arguments.output_dir / "dsv3_load.json").write_text(json.dumps(results))
    print(text)
    return int(bool(results["errors"]) or not all(is_flat(each.memory_mib) for each in again))


if __name__ == "__main__":
    sys.exit(main())
