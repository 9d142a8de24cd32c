"""Compiling the cluster kernel: every SM, a cache that can be trusted, and whatever goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import write_nvcc

from sglang.srt.layers.moe_router import cluster_router_gemm as cluster
from sglang.srt.layers.moe_router import jit, kernels

SPEC = cluster.spec(256, 7168, 90)
COUNT = Path("compilations")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(folder))
    jit.find_nvcc.cache_clear()
    yield folder
    jit.find_nvcc.cache_clear()


@pytest.fixture
def use_nvcc(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts the script of a `write_nvcc` in nvcc's place."""

    def use(script: str) -> Path:
        home = tmp_path / "cuda"
        write_nvcc(home, script)
        monkeypatch.setenv("CUDA_HOME", str(home))
        jit.find_nvcc.cache_clear()
        return home

    return use


# Every SM for DeepSeek-V3, other models on SM 90, and the ends of the rule.
COMPILED = [(256, 7168, sm) for sm in (90, 100, 103, 120)]
COMPILED += [(384, 7168, 90), (128, 7168, 90), (256, 6144, 90), (160, 5120, 90)]
COMPILED += [(16, 512, 90), (1024, 8192, 90), (1024, 8192, 120), (256, 3584, 120)]


@pytest.mark.parametrize(("num_experts", "hidden_size", "sm"), COMPILED)
def test_it_compiles_without_spills_in_20_seconds(
    num_experts: int, hidden_size: int, sm: int, tmp_path: Path, cache: Path
) -> None:
    spec = cluster.spec(num_experts, hidden_size, sm)
    include = Path(jit.tvm_ffi.__file__).parent / "include"
    started = time.perf_counter()
    done = subprocess.run(
        [
            *(str(jit.find_nvcc()), *spec.flags(), "-Xptxas", "-v", f"-I{include}"),
            *(str(spec.source), "-o", str(tmp_path / "module.so")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 20
    said = done.stdout + done.stderr
    assert len(re.findall(r"Function properties for \S*cluster_router_gemm_kernel", said)) >= 2
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spilled
    assert {stores + loads for _, stores, loads in spilled} == {"00"}


def test_it_is_built_once_and_loaded(cache: Path) -> None:
    library = jit.build(SPEC)
    written = library.stat().st_mtime_ns
    assert library.is_relative_to(cache)
    assert callable(jit.load(SPEC).run)
    assert jit.build(SPEC) == library
    assert library.stat().st_mtime_ns == written
    assert not list(library.parent.glob("module.*.so"))


def test_the_key_is_what_the_binary_depends_on(tmp_path: Path) -> None:
    keys = {
        cluster.spec(n, k, sm).key() for n in (256, 384) for k in (512, 7168) for sm in (90, 100)
    }
    assert len(keys) == 8
    copy = tmp_path / SPEC.source.name
    for file in SPEC.source.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert SPEC._replace(source=copy).key() == SPEC.key()
    header = tmp_path / "cluster_router_gemm.cuh"
    header.write_text(header.read_text() + "\n")
    assert SPEC._replace(source=copy).key() != SPEC.key()


CHILD = """
import sglang_router_gemm
from sglang.srt.layers.moe_router import cluster_router_gemm as cluster, jit
assert callable(jit.load(cluster.spec(256, 7168, 90)).run)
"""


def test_eight_processes_starting_cold_build_once(
    use_nvcc: Callable[[str], Path], tmp_path: Path, run_python: Callable[..., str]
) -> None:
    use_nvcc(f'echo x >> {tmp_path / COUNT}\nexec "$NVCC" "$@"')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run_python, [CHILD] * 8))
    assert (tmp_path / COUNT).read_text() == "x\n"


def test_a_build_that_is_killed_leaves_nothing_that_is_loaded(
    use_nvcc: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = use_nvcc("exec sleep 60")
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CHILD])
    folder = cache / f"{SPEC.name}_{SPEC.key()}"
    deadline = time.monotonic() + 60
    while not (folder / "lock").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.kill()
    child.wait()
    (folder / "module.so").write_bytes(b"half")  # what a linker that was killed leaves
    (home / "bin/nvcc").unlink()
    monkeypatch.delenv("CUDA_HOME")
    jit.find_nvcc.cache_clear()
    assert callable(jit.load(SPEC).run)


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_corrupt_binary_is_built_again(damage: bytes | None, cache: Path) -> None:
    library = jit.build(SPEC)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert callable(jit.load(SPEC).run)
    assert len(library.read_bytes()) > len(whole) // 2


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 3", "exits with 3: no message"),
        ("echo 'x.cu(1): error: broken' >&2; exit 2", r"exits with 2: x\.cu\(1\): error: broken"),
    ],
)
def test_a_broken_nvcc(script: str, problem: str, use_nvcc: Callable[[str], Path]) -> None:
    use_nvcc(script)
    with pytest.raises(jit.BuildError, match=problem):
        jit.build(SPEC)


def test_an_sm_that_nvcc_does_not_know(cache: Path) -> None:
    with pytest.raises(jit.BuildError, match=r"exits with 1: .*compute_300"):
        jit.build(cluster.spec(256, 7168, 300))


def test_a_missing_nvcc(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(jit.BuildError, match="nvcc is missing; install the CUDA toolkit"):
        jit.build(SPEC)


def test_the_nvcc_of_a_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with SGLang's dependencies, and there is no CUDA toolkit beside it."""
    wheels = [path for path in jit._nvcc_candidates() if "nvidia" in path.parts]
    assert wheels, "no wheel of this environment has an nvcc"
    monkeypatch.setenv("CUDA_HOME", str(wheels[0].parent.parent))
    assert callable(jit.load(SPEC).run)


def test_a_cache_that_others_may_write_is_not_loaded_from(cache: Path) -> None:
    library = jit.build(SPEC)
    for path in (library, library.parent, cache):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(jit.BuildError, match="is writable by others"):
            jit.load(SPEC)
        path.chmod(mode)
    assert callable(jit.load(SPEC).run)


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_any_umask_will_do(umask: int, cache: Path) -> None:
    before = os.umask(umask)
    try:
        library = jit.build(SPEC)
    finally:
        os.umask(before)
    assert jit.build(SPEC) == library
    assert [path.stat().st_mode & 0o777 for path in (library, library.parent, cache)] == [0o700] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize(("group", "trusted"), [(0, True), (1234, True), (5678, False)])
def test_a_group_may_write_where_it_is_the_users_own_or_roots(
    group: int, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    os.chown(tmp_path, 1234, group)
    tmp_path.chmod(0o770)
    if trusted:
        jit.check_trusted(tmp_path)
    else:
        with pytest.raises(jit.BuildError, match=r"is writable by others \(mode 770\)"):
            jit.check_trusted(tmp_path)


def test_flashinfers_cache_is_not_loaded_from_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashinfer.jit import env

    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path / "cached_ops")
    kernels._check_flashinfer_cache()  # nothing there yet
    library = tmp_path / "cached_ops/dsv3_router_gemm/dsv3_router_gemm.so"
    library.parent.mkdir(parents=True)
    library.touch()
    kernels._check_flashinfer_cache()
    for path in (library, library.parent, library.parents[1]):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(jit.BuildError, match="is writable by others"):
            kernels._check_flashinfer_cache()
        path.chmod(mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_binary_of_another_user_is_not_loaded(cache: Path) -> None:
    library = jit.build(SPEC)
    os.chown(library, 1234, -1)
    with pytest.raises(jit.BuildError, match="belongs to user 1234, must be yours or root's"):
        jit.load(SPEC)


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder must be\n")
    with pytest.raises(jit.BuildError, match="cannot be used"):
        jit.build(SPEC)


def test_a_full_disk(use_nvcc: Callable[[str], Path]) -> None:
    use_nvcc("echo 'fatal error: No space left on device' >&2; exit 1")
    with pytest.raises(jit.BuildError, match="No space left on device"):
        jit.build(SPEC)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the failure is that there is no GPU")
def test_a_kernel_that_does_not_load_is_unavailable_and_nothing_tries_again(
    use_nvcc: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvcc(f"echo x >> {tmp_path / COUNT}; exit 1")
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "_check_compiled", lambda *arguments: jit.build(SPEC))
    device = torch.device("cuda", 0)
    for _ in range(3):
        kernels.load("cluster", device, 256, 7168)
        reason = kernels.unavailable("cluster", device, 256, 7168)
        assert reason is not None
        assert "exits with 1" in reason
        assert "install the CUDA toolkit" in reason
    assert (tmp_path / COUNT).read_text() == "x\n"
