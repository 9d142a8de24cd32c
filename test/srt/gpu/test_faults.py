"""The build and the cache of the cluster kernel, broken: a fresh process's gates answer on a GPU.

Each case is a cache and an nvcc as they might be found, and what must follow: `cluster` serves,
or SGLang's path does after one warning with the reason. nvcc runs no oftener than it must.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import write_nvcc
from on_gpu import SM

from sglang.srt.layers.moe_router import cluster_router_gemm as cluster
from sglang.srt.layers.moe_router import jit

pytestmark = pytest.mark.gpu

# Three layers' gates, as a model has them, each called before and after the others.
GATES = """
import logging, os, pathlib, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import sglang_router_gemm
from sglang.srt.layers.moe_router import jit
from sglang_router_gemm.check import check_gate, deepseek_v2_gate
# The only nvcc of this machine is the test's.
jit.nvcc_candidates = lambda: iter([pathlib.Path(os.environ["CUDA_HOME"], "bin/nvcc")])
gates = [deepseek_v2_gate(torch.device("cuda")) for _ in range(3)]
for gate in gates * 2:
    check = check_gate("gate", gate)
    assert check.passed, check
print("ANSWERED")
"""
WARNING = "SGLang's own path serves instead"
SERVED = "M 1-128 cluster"


class Broken(NamedTuple):
    """What is broken in `Machine`, and the reason that the warning must give."""

    prepare: Callable[[Machine], None]
    reason: str | None
    """A regular expression; None where the cluster kernel serves all the same."""
    needs_root: bool = False
    builds: int = 1
    """How often nvcc may run: one that is killed is tried once more."""


class Machine:
    """A cache and a CUDA toolkit of one test's own; the cache holds the kernel."""

    def __init__(self, folder: Path, built: Path) -> None:
        self.cache = folder / "cache"
        self.home = folder / "cuda"
        self.count = folder / "count"
        self.environment = {
            "TVM_FFI_CACHE_DIR": str(self.cache),
            "CUDA_HOME": str(self.home),
            "SGLANG_ROUTER_GEMM_BACKEND": "cluster",
        }
        shutil.copytree(built, self.cache)
        self.nvcc('exec "$NVCC" "$@"')

    @property
    def library(self) -> Path:
        (found,) = self.cache.glob("*/module.so")
        return found

    def nvcc(self, script: str) -> None:
        """As `write_nvcc`, and each run of it is counted."""
        asked = 'case "$1" in --list-gpu-code) exec "$NVCC" "$@" ;; esac'
        write_nvcc(self.home, f"{asked}\necho x >> {self.count}\n{script}")

    def without_nvcc(self) -> None:
        (self.home / "bin/nvcc").unlink()

    def without_cache(self) -> None:
        shutil.rmtree(self.cache)

    def num_builds(self) -> int:
        return self.count.read_text().count("x") if self.count.exists() else 0


def _spec() -> jit.Spec:
    return cluster.spec(256, 7168, SM)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the kernel."""
    cache = tmp_path_factory.mktemp("built") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_FFI_CACHE_DIR", str(cache))
        jit.build(_spec())
    return cache


@pytest.fixture
def machine(tmp_path: Path, built: Path) -> Machine:
    return Machine(tmp_path, built)


def _no_nvcc(machine: Machine) -> None:
    machine.without_cache()
    machine.without_nvcc()


def _nvcc(script: str) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        machine.without_cache()
        machine.nvcc(script)

    return prepare


def _no_cache_folder(machine: Machine) -> None:
    """/proc takes no folders, from root neither, which a mode would not stop."""
    machine.environment["TVM_FFI_CACHE_DIR"] = "/proc/router_gemm"


def _cut_off(machine: Machine) -> None:
    whole = machine.library.read_bytes()
    machine.library.write_bytes(whole[: len(whole) // 2])


def _cut_off_without_nvcc(machine: Machine) -> None:
    _cut_off(machine)
    machine.without_nvcc()


def _replace_library(machine: Machine, library: bytes) -> None:
    """In place, so that its mode stays, and as whole as what the compiler wrote."""
    machine.library.write_bytes(jit._sealed(library))


def _no_library(machine: Machine) -> None:
    _replace_library(machine, b"\x7fELF, and then nothing")


def _no_library_without_nvcc(machine: Machine) -> None:
    _no_library(machine)
    machine.without_nvcc()


def _killed_once(machine: Machine) -> None:
    machine.without_cache()
    machine.nvcc(f'[ $(wc -l < {machine.count}) = 1 ] && kill -9 $$; exec "$NVCC" "$@"')


def _wrong_numbers(machine: Machine) -> None:
    """A kernel that multiplies half of the weights."""
    source = machine.cache.parent / "csrc" / cluster.SOURCE.name
    shutil.copytree(cluster.SOURCE.parent, source.parent)
    header = source.with_suffix(".cuh")
    half = "  load_weights(kWeightLoads / 2, kWeightLoads);\n"
    assert header.read_text().count(half) == 1
    header.write_text(header.read_text().replace(half, ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_FFI_CACHE_DIR", str(machine.cache.parent / "wrong"))
        _replace_library(machine, jit.build(_spec()._replace(source=source)).read_bytes())


def _killed_half_way(machine: Machine) -> None:
    """The first process is killed while it builds, and a half library lies there."""
    machine.without_cache()
    machine.nvcc("exec sleep 60")
    first = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", GATES],
        env=os.environ | machine.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not machine.count.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert machine.num_builds() == 1
    (lock,) = machine.cache.glob("*/lock")
    (lock.parent / "module.so").write_bytes(b"half")
    machine.count.unlink()
    machine.nvcc('exec "$NVCC" "$@"')


def _writable_by_others(machine: Machine) -> None:
    machine.cache.chmod(0o777)


def _library_writable_by_others(machine: Machine) -> None:
    machine.library.chmod(0o777)


def _of_another_user(machine: Machine) -> None:
    os.chown(machine.library, 1234, -1)


BROKEN = {
    "nothing": Broken(lambda machine: None, None),
    "no cache yet": Broken(Machine.without_cache, None),
    "no nvcc": Broken(_no_nvcc, r"nvcc is missing\); install the CUDA toolkit"),
    "nvcc fails": Broken(_nvcc("echo 'x.cu(1): error: no' >&2; exit 3"), r"exits with 3: x\.cu"),
    "nvcc is killed": Broken(_nvcc("kill -9 $$"), "exits with -9", builds=2),
    "nvcc is killed once": Broken(_killed_once, None, builds=2),
    "no room for what nvcc writes": Broken(
        _nvcc('ulimit -f 16; exec "$NVCC" "$@"'), r"exits with \d+"
    ),
    "no cache folder": Broken(_no_cache_folder, "/proc/router_gemm.* cannot be used"),
    "cut-off binary": Broken(_cut_off, None),
    "cut-off binary, no nvcc": Broken(_cut_off_without_nvcc, r"nvcc is missing\)"),
    "no library": Broken(_no_library, None),
    "no library, no nvcc": Broken(
        _no_library_without_nvcc, r"does not load: .*; built again: no nvcc for SM"
    ),
    "a kernel that is wrong": Broken(_wrong_numbers, "is off by .* at M = 1"),
    "killed half-way": Broken(_killed_half_way, None),
    "cache writable by others": Broken(_writable_by_others, r"cache is writable by others"),
    "binary writable by others": Broken(
        _library_writable_by_others, r"module\.so is writable by others"
    ),
    "binary of another user": Broken(_of_another_user, "belongs to user 1234", needs_root=True),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_gate_answers(what: str, machine: Machine, run_python: Callable[..., str]) -> None:
    broken = BROKEN[what]
    if broken.needs_root and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    broken.prepare(machine)
    output = run_python(GATES, **machine.environment)
    assert "ANSWERED" in output
    assert output.count("loading cluster_router_gemm [256, 7168]") == 1
    assert machine.num_builds() <= broken.builds
    if broken.reason is None:
        assert SERVED in output
        assert "WARNING" not in output, output
    else:
        assert SERVED not in output
        assert output.count("WARNING") == 1, output
        assert re.search(f"WARNING .*{WARNING}: .*{broken.reason}", output), output


def test_auto_says_it_too(machine: Machine, run_python: Callable[..., str]) -> None:
    """What a user who chose nothing sees where the kernel cannot be built."""
    if SM != 90:
        pytest.skip("auto takes cluster on SM 90 alone")
    _no_nvcc(machine)
    output = run_python(GATES, **machine.environment | {"SGLANG_ROUTER_GEMM_BACKEND": "auto"})
    assert "ANSWERED" in output
    assert output.count("WARNING") == 1, output
    assert re.search(f"WARNING .*{WARNING}: .*nvcc is missing", output), output


def test_eight_processes_start_cold(machine: Machine, run_python: Callable[..., str]) -> None:
    machine.without_cache()
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: run_python(GATES, **machine.environment), range(8)))
    assert machine.num_builds() == 1
    for output in outputs:
        assert "ANSWERED" in output
        assert SERVED in output
        assert "WARNING" not in output, output
