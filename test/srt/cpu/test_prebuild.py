"""Prebuilt kernels: what the build leaves, the server's start finds and does not touch.

The compiler is a script that writes empty files and counts its calls, and the GPU of the
server is one that torch is told of; FlashInfer and ninja are the real ones.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from sglang.srt.layers.moe_router import cluster_router_gemm, jit
from sglang.srt.layers.moe_router.kernel import Target
from sglang.srt.layers.moe_router.models import MODELS
from sglang_router_gemm.cli import main
from sglang_router_gemm.model_config import ConfigError, read_gate
from sglang_router_gemm.prebuild import _gates, plan_jobs

COMPILER = """#!/bin/sh
case " $* " in
    *" --list-gpu-code "*) echo sm_90 sm_100 sm_103 sm_120; exit 0 ;;
    *" -o "*) echo "$*" >> "{calls}" ;;
    *) exit 0 ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in -o) object=$2 ;; -MF) depends=$2 ;; -c) source=$2 ;; esac
    shift
done
touch "$object"
[ -z "$depends" ] || echo "$object: $source" > "$depends"
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

pytestmark = pytest.mark.xdist_group("prebuild")  # it begins early: it takes minutes

VARIABLES = ("TVM_FFI_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
UNSET = (*VARIABLES, "FLASHINFER_CUDA_ARCH_LIST", "FLASHINFER_NVCC", "CUDA_PATH")
NONE: Mapping[str, str] = {}


class Machine:
    """A machine without a GPU whose compiler is counted."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._calls = folder / "calls"
        self.nvcc = folder / "cuda" / "bin" / "nvcc"
        self.linker = linker = folder / "linker"
        self.nvcc.parent.mkdir(parents=True)
        for tool, script in ((self.nvcc, COMPILER.format(calls=self._calls)), (linker, LINKER)):
            tool.write_text(script)
            tool.chmod(0o755)
        self.environment = {name: os.environ[name] for name in os.environ if name not in UNSET}
        self.environment |= {"CUDA_HOME": str(folder / "cuda"), "CXX": str(linker)}
        self.environment |= {"CUDA_VISIBLE_DEVICES": "", "HOME": str(folder)}

    @property
    def compiled(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0

    def prebuild(
        self, *arguments: str, environment: Mapping[str, str] = NONE, umask: int = 0o022
    ) -> subprocess.CompletedProcess[str]:
        """The command in this process; what it builds, it builds in others."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name in UNSET:
                patch.delenv(name, raising=False)
            for name, value in (self.environment | dict(environment)).items():
                patch.setenv(name, value)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            before = os.umask(umask)
            try:
                status = main(["prebuild", *arguments])
            finally:
                os.umask(before)
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    def prebuild_out(
        self, *arguments: str, environment: Mapping[str, str] = NONE, umask: int = 0o022
    ) -> subprocess.CompletedProcess[str]:
        return self.prebuild(
            "--out", str(self.out), *arguments, environment=environment, umask=umask
        )

    def start_server(self, capability: tuple[int, int]) -> list[str]:
        """The modules that FlashInfer loads for `mm_M1_16_K7168_N256` on such GPUs."""
        code = SERVER.format(capability=capability)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=self.environment | {"FLASHINFER_WORKSPACE_BASE": str(self.out)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
        return loaded


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_server_finds_all_and_compiles_nothing(machine: Machine) -> None:
    done = machine.prebuild_out("--backend", "flashinfer", "--arch", "9.0a", "10.3")
    assert done.returncode == 0, done.stderr
    assert f"9.0a: building FlashInfer's mm_M1_16_K7168_N256 [256, 7168] with {machine.nvcc}" in (
        done.stdout
    )
    assert "9.0a: [2/2]" in done.stdout  # ninja's own steps
    assert "9.0a: ready: dsv3_router_gemm, after" in done.stdout
    assert "10.3a: ready: cake_router_gemm, after" in done.stdout
    assert f"Start the server with FLASHINFER_WORKSPACE_BASE={machine.out}\n" in done.stdout
    assert (f"chown -R USER {machine.out}\n" in done.stdout) == (os.geteuid() == 0)
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


def test_by_default_each_gpu_gets_what_auto_takes_and_others_may_read_it(machine: Machine) -> None:
    done = machine.prebuild_out("--arch", "9.0a", "10.3a", umask=0)
    assert done.returncode == 0, done.stderr
    settings = " ".join(f"{name}={machine.out}" for name in VARIABLES)
    assert f"Start the server with {settings}\n" in done.stdout
    built = {path.name.rpartition("_")[0] for path in machine.out.glob("cluster_router_gemm_*")}
    assert built == {
        cluster_router_gemm.spec_of(Target(torch.device("cuda"), 90, *model.gate)).name
        for model in MODELS
        if 90 in model.auto
    }
    assert [path.name for path in machine.out.rglob("*router_gemm.so")] == ["cake_router_gemm.so"]
    _assert_that_others_may_read(machine.out)
    compiled = machine.compiled
    machine.start_server((10, 3))
    again = machine.prebuild_out("--arch", "9.0a")
    assert "building" not in again.stdout
    assert machine.compiled == compiled


def test_what_an_earlier_run_left_private_is_opened(machine: Machine) -> None:
    done = machine.prebuild_out("--backend", "flashinfer", "--arch", "9.0a")
    assert done.returncode == 0, done.stderr
    for path in (machine.out, *machine.out.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    assert machine.prebuild_out("--backend", "flashinfer", "--arch", "9.0a").returncode == 0
    _assert_that_others_may_read(machine.out)


def _assert_that_others_may_read(folder: Path) -> None:
    """And that they may not write. The linker may mark a library as executable."""
    found = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    allowed = {path: (0o755,) if path.is_dir() else (0o644, 0o755) for path in found}
    assert [path for path in found if found[path] not in allowed[path]] == []


def test_the_variables_as_in_the_server_name_the_folder(machine: Machine) -> None:
    setting = {"FLASHINFER_CUDA_ARCH_LIST": "9.0a", "FLASHINFER_WORKSPACE_BASE": str(machine.out)}
    done = machine.prebuild("--backend", "flashinfer", environment=setting, umask=0o077)
    assert done.returncode == 0, done.stderr
    assert "Start the server" not in done.stdout
    _assert_that_others_may_read(machine.out)
    compiled = machine.compiled
    machine.start_server((9, 0))
    assert machine.compiled == compiled


def test_one_model_alone(machine: Machine, tmp_path: Path) -> None:
    config = {"text_config": {"num_local_experts": 384, "hidden_size": 7168}, "hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (tmp_path, tmp_path / "config.json"):
        done = machine.prebuild_out("--arch", "9.0a", "10.3a", "--model", str(model))
        assert done.returncode == 0, done.stderr
        assert (
            "10.3a: nothing to build: the gate is [384, 7168], auto takes [256, 7168]"
            in done.stdout
        )
        assert "9.0a: ready: cluster_router_gemm_n384_k7168_sm90" in done.stdout
        assert machine.compiled == 3  # the routing, too, without a shared expert and with one
        assert "chown" not in done.stdout  # anybody may read cluster's


def test_fp32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    for setting, logits_dtype in (("auto", "bfloat16"), ("auto,fp32", "float32")):
        monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", setting)
        jobs = plan_jobs(None, ["9.0a"], _gates(None, (512, 2048)))["9.0a"]
        assert [(job.backend, job.logits_dtype) for job in jobs] == [("cluster", logits_dtype)]


def test_a_shape_that_auto_does_not_take(machine: Machine) -> None:
    shape = ["--arch", "9.0a", "--shape", "64", "2048"]
    line = _only_line(machine, machine.prebuild_out(*shape))
    assert "9.0a: nothing to build: the gate is [64, 2048], auto takes [256, 7168] or" in line
    done = machine.prebuild_out(*shape, "--backend", "cluster")
    assert done.returncode == 0, done.stderr
    assert "9.0a: ready: cluster_router_gemm_n64_k2048_sm90, after" in done.stdout


def test_a_shape_of_two_models_is_built_for_both(machine: Machine) -> None:
    """DeepSeek-V2's gate is bf16, GLM-4.5's fp32."""
    shape = ["--arch", "9.0a", "--shape", "160", "5120", "--backend", "cluster"]
    done = machine.prebuild_out(*shape)
    assert done.returncode == 0, done.stderr
    assert "9.0a: ready: cluster_router_gemm_n160_k5120_sm90, after" in done.stdout
    assert "building cluster_router_gemm [160, 5120] float32 with" in done.stdout
    assert "9.0a: ready: cluster_router_gemm_n160_k5120_fp32_sm90, after" in done.stdout


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_routed_experts": 256, "num_experts": 1, "hidden_size": 7168}, (256, 7168)),
        ({"num_experts": 128, "hidden_size": 4096, "text_config": None}, (128, 4096)),
        ({"n_routed_experts": None, "num_local_experts": 8, "hidden_size": 512}, (8, 512)),
        ({"hidden_size": 7168}, None),
        ({"n_routed_experts": 256}, None),
        ({"n_routed_experts": "256", "hidden_size": 7168}, None),
        ([], None),
    ],
)
def test_the_shape_in_a_config(
    config: object, expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps(config))
    if expected is not None:
        assert read_gate(file).shape == expected
        return
    with pytest.raises(ConfigError, match=r"must be the config\.json of an MoE"):
        read_gate(file)


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read: No such file"):
        read_gate(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not JSON"):
        read_gate(tmp_path)


def _only_line(machine: Machine, done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert not machine.out.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("sglang-router-gemm prebuild: ")
    return line


def test_without_nvcc_there_is_one_clear_line(machine: Machine) -> None:
    machine.nvcc.unlink()
    line = _only_line(machine, machine.prebuild_out("--backend", "flashinfer", "--arch", "9.0a"))
    assert f"9.0a: flashinfer: no nvcc for SM 90 ({machine.nvcc} is missing); install" in line


def test_without_a_libcuda_to_link_with_there_is_one_clear_line(machine: Machine) -> None:
    machine.linker.write_text("#!/bin/sh\necho ld: cannot find -lcuda: no >&2; exit 1\n")
    line = _only_line(machine, machine.prebuild_out("--arch", "10.3a"))
    assert "10.3a: flashinfer: the linker finds no libcuda.so; install" in line
    assert machine.compiled == 0


@pytest.mark.parametrize(
    ("arguments", "listed", "reason"),
    [
        (["--arch", "hopper"], None, "arch is 'hopper', must be a compute capability"),
        ([], "9.0a hopper", "arch is 'hopper', must be a compute capability"),
        (["--arch", "12.0a"], None, "12.0a: nothing to build: auto takes cluster on SM 90, "),
        (["--arch", "9.0a", "12.0a", "--backend", "flashinfer"], None, "does not declare SM 120"),
        (["--arch", "8.0", "--backend", "cluster"], None, "SM is 80, must be 90 or newer"),
        (["--arch", "9.9", "--backend", "cluster"], None, "no nvcc for SM 99 ("),
        (["--arch", "9.0a", "--backend", "torch"], None, "backend is 'torch', must be cluster or"),
        (["--arch", "9.0a", "--out", "/dev/null/kernels"], None, "/dev/null is a file, must be a"),
        (["--arch", "9.0a", "--model", "nowhere"], None, "nowhere cannot be read"),
        ([], None, "--arch is missing, must be given where there is no GPU"),
        (["--arch", "9.0a"], "10.0a", "FLASHINFER_CUDA_ARCH_LIST is '10.0a'"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    arguments: list[str], listed: str | None, reason: str, machine: Machine
) -> None:
    environment = {"FLASHINFER_CUDA_ARCH_LIST": listed} if listed else {}
    assert reason in _only_line(machine, machine.prebuild_out(*arguments, environment=environment))
    assert machine.compiled == 0


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_cache_that_cannot_be_written_is_one_line(variable: str, machine: Machine) -> None:
    file = machine.out.with_name("file")
    file.touch()
    setting = {variable: str(file / "kernels")}
    done = machine.prebuild("--arch", "9.0a", "10.3a", environment=setting)
    line = _only_line(machine, done)
    assert line.endswith(f": {file} is a file, must be a folder")


def test_a_failed_build_shows_the_compilers_words_and_leaves_nothing(machine: Machine) -> None:
    machine.out = machine.out / "not/there/before"
    machine.nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 && exit\necho no space left; exit 1\n'
    )
    done = machine.prebuild_out("--backend", "flashinfer", "--arch", "9.0a")
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert (
        "[256, 7168] does not build (RuntimeError: Ninja build failed.)"
        in (done.stderr.splitlines()[-1])
    )
    assert not machine.out.parents[2].exists()


LOAD = """
import logging, sglang_router_gemm, torch
logging.basicConfig(level=logging.INFO)
from sglang.srt.layers.moe_router.plan import make_plan
weight = torch.empty(256, 7168, dtype=torch.bfloat16, device="cuda")
plan = make_plan(weight, "flashinfer")
assert plan.run is not None, plan.decision.reason
"""


@pytest.mark.gpu
def test_a_prebuilt_kernel_is_loaded_as_it_lies(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """The real compiler, without the GPU; then the real load, on it."""
    major, minor = torch.cuda.get_device_capability()
    main = "from sglang_router_gemm.cli import main; assert main({}) == 0"
    command = ["prebuild", "--backend", "flashinfer", "--arch", f"{major}.{minor}a"]
    command += ["--out", str(tmp_path)]
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
    """The real compiler, and the real load of a module."""
    out = tmp_path / "out"
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", "another")
    built = ["prebuild", "--shape", "160", "5120", "--arch", "9.0a", "--out", str(out)]
    assert main(built) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"Start the server with TVM_FFI_CACHE_DIR={out}\n")
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(out))
    monkeypatch.setattr(jit, "nvcc_candidates", lambda: iter([tmp_path / "nvcc"]))
    assert callable(jit.load(cluster_router_gemm.spec(160, 5120, 90)).run)
    with pytest.raises(jit.BuildError, match="is missing"):
        jit.load(cluster_router_gemm.spec(384, 7168, 90))
