"""What the tests share: real SGLang, a published ServerArgs, fresh and forked processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sglang_router_gemm  # noqa: F401  makes the in-tree modules importable
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang_router_gemm import routing

VARIABLES = ("SGLANG_ROUTER_GEMM_BACKEND", "SGLANG_ROUTER_GEMM_PDL", "TRTLLM_ENABLE_PDL")

# A process that has looked at a GPU cannot be forked.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        _group(items)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability >= (9, 0):
        return
    skip = pytest.mark.skip(reason="needs a GPU of SM 90 or newer, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _group(items: list[pytest.Item]) -> None:
    """Says which tests run in one worker, one after the other (`--dist loadgroup`).

    Those of a module do, which may share a fixture, and those that use the GPU, which time it.
    What takes minutes says a group of its own, and begins first.
    """
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.xdist_group("gpu"))
        elif item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def publish_server_args() -> Iterator[Callable[..., None]]:
    """Publishes a real ServerArgs with the given fields, and a plain one afterwards."""

    def publish(**fields: object) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        server_args = ServerArgs(model_path="dummy", device=device, **fields)
        set_global_server_args_for_scheduler(server_args)

    publish()
    yield publish
    publish()


def run_code(code: str, python: str, environment: dict[str, str], cwd: str | Path | None) -> str:
    """Runs code in a fresh interpreter, which must exit with 0; returns its stdout and stderr."""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs code in a fresh interpreter and returns its stdout and stderr."""

    def run(code: str, python: str = sys.executable, cwd: str | None = None, **env: str) -> str:
        return run_code(code, python, _environment(env), cwd)

    return run


@pytest.fixture
def fork_python(_fork_server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., str]:
    """As `run_python`, in a fork of a process that has imported SGLang, which saves 5 to 15 s.

    Not for what happens at the start: `PYTHONPATH` and what SGLang reads while it is imported
    change nothing. It sees no GPU.
    """

    def run(code: str, cwd: str | None = None, **env: str) -> str:
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        environment = _environment(env) | NO_GPU
        request = {"code": code, "environment": environment, "cwd": cwd, "output": str(output)}
        assert _fork_server.stdin is not None
        assert _fork_server.stdout is not None
        _fork_server.stdin.write(json.dumps(request) + "\n")
        _fork_server.stdin.flush()
        reply = _fork_server.stdout.readline()
        said = output.read_text() if output.exists() else ""
        assert reply, "the fork server has died"
        assert json.loads(reply)["status"] == 0, said
        return said

    return run


@pytest.fixture(scope="session")
def _fork_server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "fork_server.py")]
    with subprocess.Popen(
        command,
        env=_environment(NO_GPU),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield server
        server.kill()  # its end would take seconds


def _environment(added: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | added


def assert_refused(
    main: Callable[[list[str]], object],
    argv: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bad argument is one line that names it, and exit 2."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert named in error


def write_nvcc(home: Path, script: str) -> None:
    """Makes `home` a CUDA_HOME whose nvcc is a shell script; `$NVCC` in it is the real one.

    Asked which GPUs it knows, it answers as the real one does.
    """
    from sglang.srt.layers.moe_router import jit  # needs TVM FFI, which not every test does

    nvcc = home / "bin" / "nvcc"
    real = jit.find_nvcc(90, [each for each in jit.nvcc_candidates() if each != nvcc])
    answer = '[ "$1" = --list-gpu-code ] && exec "$NVCC" "$@"'
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\nNVCC={real}\n{answer}\n{script}\n")
    nvcc.chmod(0o755)


def random_inputs(
    num_tokens: int,
    device: str = "cpu",
    num_experts: int = DEEPSEEK_V3.num_experts,
    hidden_size: int = DEEPSEEK_V3.hidden_size,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh bf16 `hidden_states`, and a `weight` of a dtype."""
    hidden_states = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16, device=device)
    weight = torch.randn(num_experts, hidden_size, dtype=dtype, device=device)
    return hidden_states, weight


def relative_error(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> float:
    """‖logits - fp64‖ / ‖fp64‖; infinite where a logit is not finite."""
    return routing.relative_error(logits, hidden_states.double() @ weight.double().t())
