"""`sglang-router-gemm prebuild`: builds kernels ahead of the server, without a GPU.

By default it builds what `auto` takes on each kind of GPU. FlashInfer reads the kind from
`FLASHINFER_CUDA_ARCH_LIST` when it is imported, so each kind is built in a process of its own.

FlashInfer compiles into `$FLASHINFER_WORKSPACE_BASE/.cache/flashinfer/<version>/<GPUs>/` and
lets ninja decide, at every start, whether what lies there is current. The server compiles
nothing if it looks into the same folder and writes the same `build.ninja`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sglang_router_gemm.model_config import ConfigError, GateConfig, read_gate

if TYPE_CHECKING:
    import torch

    from sglang.srt.layers.moe_router.kernel import Target

    Computed = tuple[int, int, torch.dtype, torch.dtype, bool]

ARCH_LIST = "FLASHINFER_CUDA_ARCH_LIST"

_BUILD = "from sglang_router_gemm.prebuild import build_jobs; build_jobs()"
_STEP = re.compile(r"\[\d+/\d+\]")


class PrebuildError(Exception):
    """Why nothing can be built, in one line."""


class Job(NamedTuple):
    """One kernel to build: for an SM, and a gate as in a `Target`, with its dtypes' names."""

    backend: str
    sm: int
    num_experts: int
    hidden_size: int
    dtype: str
    logits_dtype: str
    bias: bool
    routing: tuple[int, int, int] | None = None
    """`num_groups`, `top_groups` and `top_k`, where the routing behind the gate is built, too."""


def run(
    backend: str | None,
    archs: Sequence[str] | None,
    out: Path | None,
    model: Path | None = None,
    shape: Sequence[int] | None = None,
) -> int:
    """Builds for each of `archs` and shows progress; 1 after a failure, else 0.

    Args:
        backend: whose kernels; by default what `auto` takes.
        archs: compute capabilities, as in `9.0a`; by default those of this machine.
        out: becomes each cache variable of what is built; by default they stay as they are.
            A folder that was not there before is removed after a failure.
        model: a config.json or its folder, for its gate alone.
        shape: N and K, for such gates alone. By default all models of the table.
    """
    try:
        jobs = plan_jobs(backend, archs, _gates(model, shape))
        variables = _cache_variables(jobs)
        environment = dict(os.environ)
        if out is not None:
            environment |= dict.fromkeys(variables, str(out.absolute()))
        for variable in variables:
            _check_writable(environment.get(variable))
        with _all_or_nothing(out):
            for arch_list, group in jobs.items():
                _build(group, jobs, environment | {ARCH_LIST: arch_list})
            if out is not None:
                _let_others_read(out)
    except (PrebuildError, ConfigError) as error:
        print(f"sglang-router-gemm prebuild: {error}", file=sys.stderr)
        return 1
    if out is not None:
        print("Start the server with", *(f"{name}={environment[name]}" for name in variables))
    for folder in _to_be_owned(jobs, environment):
        print(
            "If it runs as another user, that user must own the folder, for the kernel's library "
            f"writes there too: chown -R USER {folder}"
        )
    return 0


# ---- What to build -----------------------------------------------------------------------------


def _gates(model: Path | None, shape: Sequence[int] | None) -> list[Computed]:
    """What the gates to build for compute."""
    from sglang.srt.layers.moe_router.models import MODELS

    table = [each.gate for each in MODELS]
    if model is not None:
        gate = read_gate(model)
        return [(*gate.shape, *gate.form)]
    if shape is not None:
        plain = GateConfig(shape[0], shape[1], None)
        return [each for each in table if each[:2] == plain.shape] or [(*plain.shape, *plain.form)]
    return table


def plan_jobs(
    backend: str | None, archs: Sequence[str] | None, gates: Sequence[Computed]
) -> dict[str, list[Job]]:
    """The kernels to build, by the `FLASHINFER_CUDA_ARCH_LIST` to build them with.

    Says in a line where there is nothing to build for one of several archs.

    Args:
        backend: one that is compiled; None for what `auto` takes.
        archs: as in `9.0a`; None for the GPUs of this machine.
        gates: N, K, the dtypes of weight and logits, and whether there is a bias.

    Raises:
        PrebuildError: there is nothing to build, or an argument is not that.
    """
    import torch

    from sglang.srt.layers.moe_router.backends import BACKENDS, either
    from sglang.srt.layers.moe_router.environ import AUTO, asked_logits_dtype
    from sglang.srt.layers.moe_router.kernel import Target, dtype_name
    from sglang.srt.layers.moe_router.plan import decide

    compiled = [each.name for each in BACKENDS.values() if each.build is not None]
    if backend is not None and backend not in compiled:
        raise PrebuildError(f"backend is {backend!r}, must be {either(compiled)}")
    jobs: dict[str, list[Job]] = {}
    nothing = []
    for arch_list, arch in _arch_lists(archs):
        major, minor = _capability(arch)
        sm = 10 * major + minor
        reasons = []
        for n, k, dtype, own_logits_dtype, bias in dict.fromkeys(gates):
            logits_dtype = asked_logits_dtype(own_logits_dtype, bias)
            target = Target(torch.device("cuda"), sm, n, k, dtype, logits_dtype, bias)
            decision = decide(
                backend or AUTO,
                target,
                lambda backend: None,
                own_logits_dtype=own_logits_dtype,
            )
            if decision.backend is not None and decision.backend.build is not None:
                names = dtype_name(dtype), dtype_name(logits_dtype)
                routing = _routing(backend, target)
                job = Job(decision.backend.name, sm, n, k, *names, bias, routing)
                jobs.setdefault(arch_list, []).append(job)
            else:
                reasons.append(decision.reason)
        if len(reasons) == len(dict.fromkeys(gates)):
            nothing.append(f"{arch}: nothing to build: {reasons[0]}")
    if nothing and (backend is not None or not jobs):
        raise PrebuildError(nothing[0])
    for line in nothing:
        print(line, flush=True)
    return jobs


def _routing(backend: str | None, target: Target) -> tuple[int, int, int] | None:
    """The routing behind a gate of the table, where the same setting takes our kernel for it."""
    from sglang.srt.layers.moe_router.models import find_model

    model = find_model(*target.gate)
    route = model.route if model is not None else None
    taken = route is not None and target.sm in route.auto
    if route is None or not (backend == "cluster" or (backend is None and taken)):
        return None
    return route[:3]


def _arch_lists(archs: Sequence[str] | None) -> list[tuple[str, str]]:
    """Each arch, after the list with which FlashInfer is to build for it."""
    listed = os.environ.get(ARCH_LIST)
    if listed is not None:
        if archs:
            raise PrebuildError(
                f"{ARCH_LIST} is {listed!r} and names FlashInfer's folder, also in the server: "
                "must be unset, or --arch left out"
            )
        return [(listed, arch) for arch in listed.split()]
    # With the "a" that FlashInfer adds to the capability of a GPU it sees.
    capabilities = [_capability(arch) for arch in archs] if archs else _gpus()
    names = [f"{major}.{minor}a" for major, minor in dict.fromkeys(capabilities)]
    return list(zip(names, names, strict=True))


def _capability(arch: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d)[af]?", arch)
    if match is None:
        raise PrebuildError(f"arch is {arch!r}, must be a compute capability such as 9.0a")
    return int(match[1]), int(match[2])


def _gpus() -> list[tuple[int, int]]:
    import torch

    found = range(torch.cuda.device_count())
    if not found:
        raise PrebuildError("--arch is missing, must be given where there is no GPU, as in 9.0a")
    return sorted({torch.cuda.get_device_capability(index) for index in found})


# ---- Where it goes -----------------------------------------------------------------------------


def _cache_variables(jobs: Mapping[str, Sequence[Job]]) -> list[str]:
    from sglang.srt.layers.moe_router.backends import BACKENDS

    found = [BACKENDS[job.backend].cache_variable for group in jobs.values() for job in group]
    return [variable for variable in dict.fromkeys(found) if variable is not None]


def _to_be_owned(
    jobs: Mapping[str, Sequence[Job]], environment: Mapping[str, str]
) -> dict[str, None]:
    """The folders, of those that a variable names, to which the server's user must write."""
    from sglang.srt.layers.moe_router.backends import BACKENDS

    used = {BACKENDS[job.backend] for group in jobs.values() for job in group}
    variables = [each.cache_variable or "" for each in used if each.writes_cache]
    return {environment[name]: None for name in variables if name in environment}


def _check_writable(folder: str | None) -> None:
    from sglang.srt.layers.moe_router.jit import BuildError, check_writable

    try:
        # Every default lies in the home's .cache.
        check_writable(Path(folder or "~/.cache").expanduser())
    except RuntimeError as error:
        raise PrebuildError(f"{error}: set HOME, or give --out") from error
    except BuildError as error:
        raise PrebuildError(str(error)) from error


@contextmanager
def _all_or_nothing(out: Path | None) -> Iterator[None]:
    """Leaves no `out`, and no folder above it, that was not there before and is not whole."""
    made: Path | None = None
    if out is not None:
        for folder in (out.absolute(), *out.absolute().parents):
            if folder.exists():
                break
            made = folder
    try:
        yield
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise


def _let_others_read(folder: Path) -> None:
    """The same for what an earlier run, under another umask, has left there."""
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        if found.st_uid == os.geteuid() and not path.is_symlink():
            path.chmod(found.st_mode | (0o555 if path.is_dir() else 0o444))


# ---- Building ----------------------------------------------------------------------------------


def build_jobs() -> None:
    """Builds in this process: `sys.argv` has the jobs to build, and all those of the whole run.

    Raises:
        SystemExit: the installed packages cannot do that, with the reason.
    """
    import torch

    from sglang.srt.layers.moe_router.backends import BACKENDS
    from sglang.srt.layers.moe_router.jit import BuildError
    from sglang.srt.layers.moe_router.kernel import Target
    from sglang.srt.layers.moe_router.packages import first_line

    jobs, all_jobs = ([Job(*job) for job in json.loads(text)] for text in sys.argv[1:])
    for job in all_jobs:  # before the first minute is spent
        if reason := BACKENDS[job.backend].missing(job.sm):
            sys.exit(reason)
    for job in jobs:
        backend = BACKENDS[job.backend]
        dtypes = getattr(torch, job.dtype), getattr(torch, job.logits_dtype)
        target = Target(torch.device("cuda"), *job[1:4], *dtypes, job.bias)
        assert backend.build is not None
        assert backend.find_builder is not None
        name = f"{backend.kernel} {target}"
        started = time.perf_counter()
        try:
            if nvcc := backend.find_builder(target):
                print(f"building {name} with {nvcc}", flush=True)
            module = backend.build(target)
        except BuildError as error:
            sys.exit(f"{backend.name}: {error}")
        except (OSError, RuntimeError) as error:
            sys.exit(f"{name} does not build ({first_line(error)})")
        seconds = time.perf_counter() - started
        print(f"ready: {module}, after {seconds:.0f} s" if nvcc else f"ready: {module}", flush=True)
        if job.routing is not None:
            _build_routes(job, *job.routing)


def _build_routes(job: Job, num_groups: int, top_groups: int, top_k: int) -> None:
    """The routing behind a gate, without a fused shared expert and with one."""
    from sglang.srt.layers.moe_router import cluster_route
    from sglang.srt.layers.moe_router.jit import BuildError

    for num_shared in (0, 1):
        routing = cluster_route.Routing(
            job.num_experts, num_groups, top_groups, top_k, num_shared, renormalize=True
        )
        try:
            print(f"ready: {cluster_route.build(routing, job.sm)}", flush=True)
        except BuildError as error:
            sys.exit(f"cluster_route: {error}")


def _build(
    jobs: Sequence[Job], all_jobs: Mapping[str, Sequence[Job]], environment: dict[str, str]
) -> None:
    arch_list = environment[ARCH_LIST]
    every = [job for group in all_jobs.values() for job in group]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _BUILD, json.dumps(jobs), json.dumps(every)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        umask=0o022,  # a cache that root made is read by whoever runs the server
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        step = _STEP.match(line)
        if step is not None or line.startswith(("building ", "ready: ")):
            print(f"{arch_list}: {step[0] if step else line.rstrip()}", flush=True)
    if process.wait() != 0:
        if any(map(_STEP.match, lines)):
            print("\n".join(lines), file=sys.stderr)
        raise PrebuildError(f"{arch_list}: {lines[-1] if lines else 'the build was killed'}")
