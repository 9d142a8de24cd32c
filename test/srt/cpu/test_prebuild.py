"""Prebuilt kernels: what the build leaves, the server's start finds and does not touch.

The compiler is a script that writes empty files and counts its calls, and the GPU of the
server is one that torch is told of; FlashInfer and ninja are the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang.srt.layers.moe_router import cluster_router_gemm, jit
from sglang_router_gemm.cli import main
from sglang_router_gemm.doctor import MODELS

COMPILER = """#!/bin/sh
case " $* " in *" -c "*) ;; *) exit 0 ;; esac
echo "$*" >> "{calls}"
while [ $# -gt 0 ]; do
    case "$1" in -o) object=$2 ;; -MF) depends=$2 ;; -c) source=$2 ;; esac
    shift
done
touch "$object"
echo "$object: $source" > "$depends"
"""
LINKER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
touch "$2"
"""

# Eight GPUs of one kind, and a module that is built but, being empty, not loaded.
SERVER = """
import json, torch
from types import SimpleNamespace
major, minor = {capability}
torch.cuda.device_count = lambda: 8
torch.cuda.get_device_capability = lambda device=None: (major, minor)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=major, minor=minor)
from flashinfer.gemm import routergemm
from flashinfer.jit.core import JitSpecNvcc
loaded = []
JitSpecNvcc.load = lambda spec, so_path=None: loaded.append(str(spec.jit_library_path))
routergemm._router_gemm_module_for_device(0)
print(json.dumps(loaded))
"""

UNSET = ("FLASHINFER_CUDA_ARCH_LIST", "FLASHINFER_WORKSPACE_BASE", "FLASHINFER_NVCC", "CUDA_PATH")


class Machine:
    """A machine without a GPU whose compiler is counted."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._calls = folder / "calls"
        self.nvcc = folder / "cuda" / "bin" / "nvcc"
        linker = folder / "linker"
        self.nvcc.parent.mkdir(parents=True)
        for tool, script in ((self.nvcc, COMPILER.format(calls=self._calls)), (linker, LINKER)):
            tool.write_text(script)
            tool.chmod(0o755)
        self.environment = {name: os.environ[name] for name in os.environ if name not in UNSET}
        self.environment |= {"CUDA_HOME": str(folder / "cuda"), "CXX": str(linker)}
        self.environment |= {"CUDA_VISIBLE_DEVICES": ""}

    @property
    def compiled(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def prebuild(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        main = "import sys; from sglang_router_gemm.cli import main; sys.exit(main())"
        command = ["-c", main, "prebuild", *arguments, "--out", str(self.out)]
        return self.python(*command, **environment)

    def start_server(self, capability: tuple[int, int]) -> list[str]:
        """The modules that FlashInfer loads for `mm_M1_16_K7168_N256` on such GPUs."""
        code = SERVER.format(capability=capability)
        done = self.python("-c", code, FLASHINFER_WORKSPACE_BASE=str(self.out))
        assert done.returncode == 0, done.stderr
        loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
        return loaded


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_server_finds_all_and_compiles_nothing(machine: Machine) -> None:
    done = machine.prebuild("--arch", "9.0a", "10.3")
    assert done.returncode == 0, done.stderr
    assert "9.0a: building dsv3_router_gemm" in done.stdout
    assert "10.3a: building cake_router_gemm" in done.stdout
    assert "9.0a: [2/2]" in done.stdout  # ninja's own steps
    assert f"FLASHINFER_WORKSPACE_BASE={machine.out}" in done.stdout
    compiled = machine.compiled
    assert compiled > 2
    for capability, module in ((9, 0), "dsv3_router_gemm"), ((10, 3), "cake_router_gemm"):
        (library,) = machine.start_server(capability)
        assert library.startswith(str(machine.out))
        assert library.endswith(f"/{module}/{module}.so")
        assert machine.compiled == compiled
    # The control: GPUs that were not built for make the server compile.
    machine.start_server((10, 0))
    assert machine.compiled > compiled


def test_a_given_arch_list_names_the_folder_as_in_the_server(machine: Machine) -> None:
    done = machine.prebuild(FLASHINFER_CUDA_ARCH_LIST="9.0a")
    assert done.returncode == 0, done.stderr
    compiled = machine.compiled
    machine.start_server((9, 0))
    assert machine.compiled == compiled


def _only_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_without_nvcc_there_is_one_clear_line(machine: Machine) -> None:
    machine.nvcc.unlink()
    line = _only_line(machine.prebuild("--arch", "9.0a"))
    assert line.startswith(f"sglang-router-gemm prebuild: 9.0a: {machine.nvcc} is missing")
    assert "install the CUDA toolkit" in line


@pytest.mark.parametrize(
    ("arguments", "listed", "reason"),
    [
        (["--arch", "hopper"], None, "arch is 'hopper', must be a compute capability"),
        ([], "9.0a hopper", "arch is 'hopper', must be a compute capability"),
        (["--arch", "12.0a"], None, "does not declare SM 120"),
        ([], None, "--arch is missing, must be given where there is no GPU"),
        (["--arch", "9.0a"], "10.0a", "FLASHINFER_CUDA_ARCH_LIST is '10.0a'"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    arguments: list[str], listed: str | None, reason: str, machine: Machine
) -> None:
    environment = {"FLASHINFER_CUDA_ARCH_LIST": listed} if listed else {}
    assert reason in _only_line(machine.prebuild(*arguments, **environment))
    assert machine.compiled == 0


def test_a_failed_build_shows_the_compilers_words(machine: Machine) -> None:
    machine.nvcc.write_text("#!/bin/sh\necho no space left; exit 1\n")
    done = machine.prebuild("--arch", "9.0a")
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "dsv3_router_gemm does not build with CUDA_HOME=" in done.stderr.splitlines()[-1]


LOAD = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from sglang.srt.layers.moe_router import kernels
device = torch.device("cuda", 0)
kernels.load("flashinfer", device, 256, 7168)
assert kernels.unavailable("flashinfer", device, 256, 7168) is None
"""


@pytest.mark.gpu
def test_a_prebuilt_kernel_is_loaded_as_it_lies(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """The real compiler, without the GPU; then the real load, on it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    main = "from sglang_router_gemm.cli import main; assert main({}) == 0"
    command = ["prebuild", "--arch", f"{major}.{minor}a", "--out", str(tmp_path)]
    run_python(main.format(command), CUDA_VISIBLE_DEVICES="")
    (library,) = tmp_path.rglob("*_router_gemm.so")
    built = library.stat().st_mtime_ns
    said = run_python(LOAD, FLASHINFER_WORKSPACE_BASE=str(tmp_path))
    assert "is ready after" in said
    assert "Building JIT module" not in said
    assert [*tmp_path.rglob("*_router_gemm.so")] == [library]
    assert library.stat().st_mtime_ns == built


def test_cluster_needs_no_compiler_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, no_cuda = tmp_path / "out", tmp_path / "no_cuda"
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", "another")
    built = ["prebuild", "--backend", "cluster", "--arch", "9.0a", "--out", str(out)]
    assert main(built) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"Start the server with TVM_FFI_CACHE_DIR={out}\n")
    assert said.count("ready after") == len(MODELS)
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(out))
    monkeypatch.setenv("CUDA_HOME", str(no_cuda))
    jit.find_nvcc.cache_clear()
    for _, num_experts, hidden_size in MODELS:
        assert callable(jit.load(cluster_router_gemm.spec(num_experts, hidden_size, 90)).run)
    assert main([*built[:-1], str(tmp_path / "again")]) == 1
    assert "nvcc is missing" in capsys.readouterr().err
    jit.find_nvcc.cache_clear()
