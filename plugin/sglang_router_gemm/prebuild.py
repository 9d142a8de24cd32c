"""`sglang-router-gemm prebuild`: builds kernels ahead of the server, without a GPU.

FlashInfer compiles into `$FLASHINFER_WORKSPACE_BASE/.cache/flashinfer/<version>/<GPUs>/`
and lets ninja decide, at every start, whether what lies there is current. The server
compiles nothing if it looks into the same folder and writes the same `build.ninja`.
`<GPUs>` and the compiler's flags are those of the GPUs that FlashInfer sees, or of
`FLASHINFER_CUDA_ARCH_LIST`. A server sees one kind, so each kind is built by itself.

The cluster kernel lies in TVM FFI's cache, a module for each N, K and GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARCH_LIST = "FLASHINFER_CUDA_ARCH_LIST"
WORKSPACE_BASE = "FLASHINFER_WORKSPACE_BASE"

_BUILD = "from sglang_router_gemm.prebuild import build_listed; build_listed()"
_STEP = re.compile(r"\[\d+/\d+\]")


class PrebuildError(Exception):
    """Why nothing can be built, in one line."""


def run(backend: str, archs: Sequence[str] | None, out: Path | None) -> int:
    """Builds for each of `archs` and shows progress; 1 after a failure, else 0.

    Args:
        backend: `flashinfer` or `cluster`.
        archs: compute capabilities, as in `9.0a`; by default those of this machine.
        out: becomes `FLASHINFER_WORKSPACE_BASE`, for `cluster` `TVM_FFI_CACHE_DIR`; by
            default their own choice.
    """
    variable, build = _BUILDERS[backend]
    environment = dict(os.environ)
    if out is not None:
        environment[variable] = str(out.absolute())
    try:
        build(archs, environment)
    except PrebuildError as error:
        print(f"sglang-router-gemm prebuild: {error}", file=sys.stderr)
        return 1
    if out is not None:
        print(f"Start the server with {variable}={environment[variable]}")
    return 0


def _build_flashinfer(archs: Sequence[str] | None, environment: dict[str, str]) -> None:
    for arch_list in _arch_lists(archs):
        _build(environment | {ARCH_LIST: arch_list})


def _build_cluster(archs: Sequence[str] | None, environment: dict[str, str]) -> None:
    from sglang.srt.layers.moe_router import cluster_router_gemm, jit
    from sglang_router_gemm.doctor import MODELS

    os.environ |= environment
    for major, minor in [_capability(arch) for arch in archs] if archs else _gpus():
        for _, num_experts, hidden_size in MODELS:
            spec = cluster_router_gemm.spec(num_experts, hidden_size, 10 * major + minor)
            started = time.perf_counter()
            try:
                jit.build(spec)
            except jit.BuildError as error:
                raise PrebuildError(f"{spec.name}: {error}") from error
            seconds = time.perf_counter() - started
            print(f"{spec.name}: ready after {seconds:.0f} s", flush=True)


_BUILDERS = {
    "flashinfer": (WORKSPACE_BASE, _build_flashinfer),
    "cluster": ("TVM_FFI_CACHE_DIR", _build_cluster),
}


def build_listed() -> None:
    """Builds for `FLASHINFER_CUDA_ARCH_LIST`, which FlashInfer reads when it is imported.

    Raises:
        SystemExit: the installed packages cannot do that, with the reason.
    """
    from sglang.srt.layers.moe_router import kernels

    capabilities = [_capability(arch) for arch in os.environ[ARCH_LIST].split()]
    for major, minor in capabilities:
        if reason := kernels.missing("flashinfer", 10 * major + minor):
            sys.exit(reason)
    _require_compiler()
    # Two GPUs may share a module.
    specs = {spec.name: spec for spec in map(_spec_for, capabilities)}
    for name, spec in specs.items():
        if spec.is_aot:
            print(f"{name} is in flashinfer-jit-cache already", flush=True)
            continue
        print(f"building {name}, which takes a minute or two", flush=True)
        try:
            # FLASHINFER_JIT_VERBOSE would show ninja's steps too, but it also compiles for
            # debugging, and the server would then compile again.
            spec.build(verbose=True, need_lock=True)
        except RuntimeError as error:
            sys.exit(f"{name} does not build with CUDA_HOME={_cuda_home()}: {error}")


def _arch_lists(archs: Sequence[str] | None) -> list[str]:
    listed = os.environ.get(ARCH_LIST)
    if listed is not None:
        if archs:
            raise PrebuildError(
                f"{ARCH_LIST} is {listed!r} and names FlashInfer's folder, also in the server: "
                "must be unset, or --arch left out"
            )
        for arch in listed.split():
            _capability(arch)
        return [listed]
    # With the "a" that FlashInfer adds to the capability of a GPU it sees.
    capabilities = [_capability(arch) for arch in archs] if archs else _gpus()
    return [f"{major}.{minor}a" for major, minor in dict.fromkeys(capabilities)]


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


def _build(environment: dict[str, str]) -> None:
    arch_list = environment[ARCH_LIST]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _BUILD],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        step = _STEP.match(line)
        if step is not None or line.startswith("building "):
            print(f"{arch_list}: {step[0] if step else line.rstrip()}", flush=True)
    if process.wait() != 0:
        if any(map(_STEP.match, lines)):
            print("\n".join(lines), file=sys.stderr)
        raise PrebuildError(f"{arch_list}: {lines[-1] if lines else 'the build was killed'}")
    print(f"{arch_list}: ready after {time.perf_counter() - started:.0f} s", flush=True)


def _spec_for(capability: tuple[int, int]) -> Any:
    """The module that `mm_M1_16_K7168_N256` loads on such a GPU."""
    from flashinfer.jit import gen_dsv3_router_gemm_module

    try:
        from flashinfer.jit import cake_router_gemm
    except ImportError:  # FlashInfer < 0.7 has one module for all GPUs
        return gen_dsv3_router_gemm_module()
    if cake_router_gemm.supported_capability(capability) is None:
        return gen_dsv3_router_gemm_module()
    return cake_router_gemm.gen_cake_router_gemm_module()


def _cuda_home() -> str | None:
    from flashinfer.jit.cpp_ext import get_cuda_path

    try:
        return str(get_cuda_path())
    except RuntimeError:
        return None


def _require_compiler() -> None:
    cuda_home = _cuda_home()
    nvcc = f"{cuda_home}/bin/nvcc" if cuda_home is not None else "nvcc"
    for tool in (os.environ.get("FLASHINFER_NVCC", nvcc), "ninja"):
        if shutil.which(tool) is None:
            sys.exit(
                f"{tool} is missing; FlashInfer builds with nvcc and ninja: install the CUDA "
                "toolkit, set CUDA_HOME, and pip install ninja"
            )
