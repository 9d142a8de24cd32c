"""Compiling the cluster kernel: every SM, a cache that can be trusted, and whatever goes wrong."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
import tvm_ffi
from conftest import write_nvcc

from sglang.srt.layers.moe_router import backends, flashinfer_router_gemm, jit
from sglang.srt.layers.moe_router import cluster_router_gemm as cluster
from sglang.srt.layers.moe_router.kernel import Target

SPEC = cluster.spec(256, 7168, 90)
COUNT = Path("compilations")

# An nvcc that writes something, for tests that load nothing.
WRITES = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(folder))
    monkeypatch.setattr(jit, "_lost_s", 0.0)
    return folder


@pytest.fixture(scope="module")
def _built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_FFI_CACHE_DIR", str(folder))
        jit.build(SPEC)
    return folder


@pytest.fixture
def built(_built_once: Path, cache: Path) -> Path:
    """The library in a cache that has it."""
    shutil.copytree(_built_once, cache)
    return jit.library_path(SPEC)


@pytest.fixture
def use_nvcc(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts the script of a `write_nvcc` in nvcc's place."""

    def use(script: str) -> Path:
        home = tmp_path / "cuda"
        write_nvcc(home, script)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home

    return use


# Every SM for DeepSeek-V3, other models on SM 90, and the ends of the rule.
BF16, FP32 = torch.bfloat16, torch.float32
COMPILED = [(256, 7168, BF16, sm) for sm in (90, 100, 103, 120)]
COMPILED += [(384, 7168, BF16, 90), (128, 7168, BF16, 90), (256, 6144, BF16, 90)]
COMPILED += [(16, 64, BF16, 90), (1024, 8192, BF16, 90), (1024, 8192, BF16, 120)]
COMPILED += [(256, 3584, BF16, 120), (128, 2880, BF16, 90), (160, 5120, FP32, 90)]
COMPILED += [(256, 3072, FP32, 90), (256, 2816, FP32, 100), (128, 4096, FP32, 120)]


@pytest.mark.xdist_group("compiles")
@pytest.mark.parametrize(("num_experts", "hidden_size", "dtype", "sm"), COMPILED)
def test_it_compiles_without_spills_in_20_seconds(
    num_experts: int, hidden_size: int, dtype: torch.dtype, sm: int, tmp_path: Path
) -> None:
    spec = cluster.spec(num_experts, hidden_size, sm, dtype)
    include = Path(tvm_ffi.__file__).parent / "include"
    started = time.perf_counter()
    done = subprocess.run(
        [
            *(str(jit.find_nvcc(sm)), *spec.flags(), "-Xptxas", "-v", f"-I{include}"),
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


def test_the_rule_and_the_kernel_have_one_largest_m(built: Path) -> None:
    rule = backends.BACKENDS["cluster"].rule
    module = jit.load(SPEC)
    assert list(module.largest_num_tokens())[-1] == rule.num_tokens[-1]
    assert cluster.num_tokens_to_check(module) == [1, 8, 9, 16, 17, 128]


def test_the_key_is_what_the_binary_depends_on(tmp_path: Path) -> None:
    keys = {
        cluster.spec(n, k, sm, dtype).key()
        for n in (256, 384)
        for k in (512, 7168)
        for sm in (90, 100)
        for dtype in (BF16, FP32)
    }
    assert len(keys) == 16
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


EIGHT = """
import os
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        try:
            exec({child!r})
        except BaseException:
            os._exit(1)
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
"""


def test_eight_processes_starting_cold_build_once(
    use_nvcc: Callable[[str], Path], tmp_path: Path, fork_python: Callable[..., str]
) -> None:
    use_nvcc(f'echo x >> {tmp_path / COUNT}\nexec "$NVCC" "$@"')
    fork_python(EIGHT.format(child=CHILD))
    assert (tmp_path / COUNT).read_text() == "x\n"


def test_a_build_that_is_killed_leaves_nothing_that_is_loaded(
    use_nvcc: Callable[[str], Path], cache: Path
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
    assert callable(jit.load(SPEC).run)


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_corrupt_binary_is_built_again(damage: bytes | None, built: Path) -> None:
    whole = built.read_bytes()
    built.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert callable(jit.load(SPEC).run)
    assert len(built.read_bytes()) > len(whole) // 2


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
    with pytest.raises(jit.BuildError, match=r"no nvcc for SM 300 \(.*nvcc does not know sm_300"):
        jit.build(cluster.spec(256, 7168, 300))


def test_every_candidate_is_tried_until_one_knows_the_sm(tmp_path: Path) -> None:
    said = {"old": "echo sm_80", "broken": "exit 7", "right": "echo sm_80; echo sm_90", "next": ""}
    tried = [tmp_path / "nothing"]
    for name, script in said.items():
        tried.append(tmp_path / name)
        tried[-1].write_text(f"#!/bin/sh\n{script}\n")
        tried[-1].chmod(0o755)
    assert jit.find_nvcc(90, tried) == tmp_path / "right"
    with pytest.raises(jit.BuildError) as raised:
        jit.find_nvcc(100, tried)
    assert str(raised.value) == (
        f"no nvcc for SM 100 ({tmp_path}/nothing is missing, {tmp_path}/old does not know sm_100, "
        f"{tmp_path}/broken exits with 7, {tmp_path}/right does not know sm_100, {tmp_path}/next "
        "does not know sm_100); install the CUDA toolkit and set CUDA_HOME"
    )


def test_a_cuda_home_without_nvcc_does_not_end_the_search(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [each for each in jit.nvcc_candidates() if each != tmp_path / "bin/nvcc"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert next(jit.nvcc_candidates()) == tmp_path / "bin/nvcc"
    assert jit.find_nvcc(90) == jit.find_nvcc(90, found)


def test_a_missing_nvcc(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "nvcc_candidates", lambda: iter([tmp_path / "nvcc"]))
    for find in (jit.build, jit.find_builder):
        with pytest.raises(jit.BuildError) as raised:
            find(SPEC)
        assert str(raised.value) == (
            f"no nvcc for SM 90 ({tmp_path}/nvcc is missing); install the CUDA toolkit and set "
            "CUDA_HOME, or pip install nvidia-cuda-nvcc"
        )


def test_the_builder_is_the_nvcc_until_the_module_is_cached(
    use_nvcc: Callable[[str], Path], cache: Path
) -> None:
    home = use_nvcc(WRITES)
    assert jit.find_builder(SPEC) == home / "bin/nvcc"
    assert not cache.exists()
    library = jit.build(SPEC)
    assert jit.find_builder(SPEC) is None
    library.chmod(0o666)
    with pytest.raises(jit.BuildError, match="is writable by others"):
        jit.find_builder(SPEC)


def test_there_is_no_builder_for_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder must be\n")
    with pytest.raises(jit.BuildError, match=r"cannot be used|must be a folder"):
        jit.find_builder(SPEC)
    with pytest.raises(jit.BuildError, match=f"{cache} is a file, must be a folder"):
        jit.check_writable(cache / "deeper")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_folder_of_another_user_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("TVM_FFI_CACHE_DIR", name)
        os.seteuid(1234)
        try:
            with pytest.raises(jit.BuildError, match=f"{name} cannot be written by user 1234"):
                jit.check_writable(Path(name, "new"))
            with pytest.raises(jit.BuildError, match=f"{name} cannot be written by user 1234"):
                jit.find_builder(SPEC)
        finally:
            os.seteuid(0)
        jit.check_writable(Path(name, "new"))


def test_the_nvcc_of_a_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with SGLang's dependencies, and there is no CUDA toolkit beside it."""
    wheels = [path for path in jit.nvcc_candidates() if "nvidia" in path.parts]
    assert wheels, "no wheel of this environment has an nvcc"
    monkeypatch.setenv("CUDA_HOME", str(wheels[0].parent.parent))
    assert callable(jit.load(SPEC).run)


def test_a_cache_that_others_may_write_is_not_loaded_from(built: Path) -> None:
    for path in (built, built.parent, built.parents[1]):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(jit.BuildError, match="is writable by others"):
            jit.load(SPEC)
        path.chmod(mode)
    assert callable(jit.load(SPEC).run)


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o000])
def test_others_may_read_and_not_write_whatever_the_umask(
    umask: int, use_nvcc: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvcc(WRITES)
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(cache / "deep/down"))
    before = os.umask(umask)
    try:
        library = jit.build(SPEC)
    finally:
        os.umask(before)
    assert jit.build(SPEC) == library
    made = {path.relative_to(cache): path.stat().st_mode & 0o777 for path in cache.rglob("*")}
    folders = {path for path in made if (cache / path).is_dir()}
    assert made == {path: 0o755 if path in folders else 0o644 for path in made}
    assert len(folders) == 3
    assert len(made) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_cache_that_root_made_serves_another_user(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        shutil.copytree(built.parents[1], name, dirs_exist_ok=True)
        monkeypatch.setenv("TVM_FFI_CACHE_DIR", name)
        library = jit.library_path(SPEC)
        (library.parent / "lock").unlink()  # nothing is written, not even that
        os.seteuid(1234)
        try:
            assert jit.build(SPEC) == library
            assert callable(tvm_ffi.load_module(str(library)).run)
        finally:
            os.seteuid(0)


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
        with pytest.raises(jit.BuildError, match=r"is writable by others \(mode 770, group 5678\)"):
            jit.check_trusted(tmp_path)


def test_flashinfers_cache_is_not_loaded_from_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashinfer.jit import env

    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path / "cached_ops")
    target = Target(torch.device("cuda", 0), 90, 256, 7168)
    flashinfer_router_gemm.load(target)  # nothing there yet
    library = tmp_path / "cached_ops/dsv3_router_gemm/dsv3_router_gemm.so"
    library.parent.mkdir(parents=True)
    library.touch()
    flashinfer_router_gemm.load(target)
    assert flashinfer_router_gemm.find_builder(target) is None
    for path in (library, library.parent, library.parents[1]):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        for each in (flashinfer_router_gemm.load, flashinfer_router_gemm.find_builder):
            with pytest.raises(jit.BuildError, match="is writable by others"):
                each(target)
        path.chmod(mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_binary_of_another_user_is_not_loaded(built: Path) -> None:
    os.chown(built, 1234, -1)
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
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    cluster_backend = backends.BACKENDS["cluster"]
    target = Target(torch.device("cuda", 0), 90, 256, 7168)
    for _ in range(3):
        reason = backends.load_kernel(cluster_backend, target)
        assert reason == backends.find_kernel(cluster_backend, target)
        assert isinstance(reason, str)
        assert "exits with 1" in reason
    assert (tmp_path / COUNT).read_text() == "x\n"


# What a build can run into ---------------------------------------------------------------


def test_a_compiler_that_hangs_is_killed_at_the_limit_and_the_waiting_give_up_with_it(
    use_nvcc: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvcc(f"echo $$ >> {tmp_path / COUNT}; exec sleep 60")
    monkeypatch.setattr(jit, "BUILD_LIMIT_S", 4.0)

    def build(later_s: float) -> tuple[str, float]:
        time.sleep(later_s)
        started = time.monotonic()
        with pytest.raises(jit.BuildError) as error:
            jit.build(SPEC)
        return str(error.value), time.monotonic() - started

    with ThreadPoolExecutor(2) as pool:
        (reason, seconds), (waiting_reason, waiting_seconds) = pool.map(build, (0.0, 2.5))
    assert "is killed, it takes more than 4 s" in reason
    assert seconds < 6
    # Not a limit of its own after that, but the reason of the one that it waited for.
    assert waiting_reason == reason
    assert waiting_seconds < 3
    (pid,) = (tmp_path / COUNT).read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_all_builds_of_a_process_that_fail_have_one_limit(
    built: Path,
    use_nvcc: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gate's and its routing's, whose compiler hangs. What the cache has is still there."""
    use_nvcc(f"echo $$ >> {tmp_path / COUNT}; exec sleep 60")
    monkeypatch.setattr(jit, "BUILD_LIMIT_S", 2.0)
    started = time.monotonic()
    with pytest.raises(jit.BuildError, match="is killed, it takes more than 2 s"):
        jit.build(SPEC._replace(name="first"))
    with pytest.raises(jit.BuildError, match="this process has waited 2 s for builds that failed"):
        jit.build(SPEC._replace(name="second"))
    assert time.monotonic() - started < 4
    assert len((tmp_path / COUNT).read_text().split()) == 1
    assert jit.build(SPEC) == built


def test_a_compiler_that_was_killed_is_tried_once_more(
    use_nvcc: Callable[[str], Path], tmp_path: Path
) -> None:
    calls = tmp_path / COUNT
    use_nvcc(f'echo x >> {calls}; [ $(wc -l < {calls}) = 1 ] && kill -9 $$; exec "$NVCC" "$@"')
    assert callable(jit.load(SPEC).run)
    assert calls.read_text() == "x\nx\n"


def test_a_failed_build_is_tried_again_by_who_comes_later(
    use_nvcc: Callable[[str], Path],
) -> None:
    use_nvcc("exit 3")
    with pytest.raises(jit.BuildError, match="exits with 3"):
        jit.build(SPEC)
    use_nvcc('exec "$NVCC" "$@"')
    assert callable(jit.load(SPEC).run)


def test_a_library_that_does_not_load_here_is_built_again(cache: Path) -> None:
    """Whole, and of another machine: of another C library, say."""
    library = jit.build(SPEC)
    library.write_bytes(jit._sealed(b"\x7fELF, and then nothing"))
    assert callable(jit.load(SPEC).run)
    assert jit._is_whole(library)


def test_where_nothing_loads_the_reason_has_both_tries(use_nvcc: Callable[[str], Path]) -> None:
    library = jit.build(SPEC)
    library.write_bytes(jit._sealed(b"\x7fELF, and then nothing"))
    use_nvcc("exit 3")
    with pytest.raises(jit.BuildError, match=r"does not load: .*; built again: .*exits with 3"):
        jit.load(SPEC)


def test_machines_that_differ_share_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    key = SPEC.key()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    other = SPEC.key()
    monkeypatch.undo()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.17"))
    assert len({key, other, SPEC.key()}) == 3


def test_a_volume_without_locks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may build at once then; neither disturbs the other."""

    def acquire(lock: filelock.FileLock, *arguments: object, **options: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: jit.build(SPEC), range(2)))
    assert libraries[0] == libraries[1]
    assert callable(jit.load(SPEC).run)
    assert not list(libraries[0].parent.glob("module.?*.so"))


def test_a_folder_as_tmp_is_gets_a_subfolder_of_this_users_own(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o1777)
    library = jit.build(SPEC)
    assert library.parents[1] == cache / f"user-{os.geteuid()}"
    assert library.parents[1].stat().st_mode & 0o777 == 0o755
    assert callable(jit.load(SPEC).run)


@pytest.mark.parametrize("mode", [0o777, 0o2775])
def test_a_volume_that_others_may_write_is_refused_with_what_to_do(mode: int, cache: Path) -> None:
    """As Kubernetes mounts them: an emptyDir, and root:fsGroup."""
    cache.mkdir()
    if os.geteuid() == 0:
        os.chown(cache, -1, 4321)
    cache.chmod(mode)
    with pytest.raises(jit.BuildError) as error:
        jit.build(SPEC)
    assert f"{cache} is writable by others (mode {mode:o}, group " in str(error.value)
    assert "set TVM_FFI_CACHE_DIR" in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_FFI_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(jit.BuildError, match="set HOME or TVM_FFI_CACHE_DIR"):
        jit.build(SPEC)
