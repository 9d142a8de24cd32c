"""Compiles one .cu file with nvcc into a TVM FFI module, cached on disk.

`tvm_ffi.cpp.build` does this too, for the GPU that nvidia-smi names and with a CUDA
toolkit that has `lib64`. Here the SM is given, so that it can be built without a GPU,
the nvcc that comes as a wheel with SGLang serves as well, and what lies in the cache is
loaded only if nobody else could have put it there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

# What builds may take that come to nothing: of one module in all processes that wait for it, and
# of all modules in one process. A collective of SGLang's waits 300 s or more.
BUILD_LIMIT_S = 200.0
_lost_s = 0.0  # by this process, so far
_SEAL = b"\nrouter-gemm sha256 "
_ADVICE = "set TVM_FFI_CACHE_DIR or FLASHINFER_WORKSPACE_BASE to a folder that only you may write"
# With the features of exactly that GPU ("a"), as SGLang and FlashInfer compile.
_FLAGS = ("-shared", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-cudart", "static")


class BuildError(Exception):
    """Why a module cannot be had, in one line."""


class Spec(NamedTuple):
    """One module: a source, and what it is compiled with."""

    name: str
    source: Path
    sm: int
    defines: tuple[tuple[str, int], ...]

    def flags(self) -> list[str]:
        """nvcc's flags, without the paths of this machine."""
        arch = f"-gencode=arch=compute_{self.sm}a,code=sm_{self.sm}a"
        return [*_FLAGS, arch, *(f"-D{name}={value}" for name, value in self.defines)]

    def key(self) -> str:
        """Hash of everything that the binary depends on, but for the compiler.

        An image may have the binary and no compiler. A cache may be shared by machines that
        differ, so their processor and C library are part of it.
        """
        import tvm_ffi

        found = hashlib.sha256()
        for file in sorted(self.source.parent.iterdir()):
            if file.suffix in (".cu", ".cuh"):
                found.update(file.read_bytes())
        machine = platform.machine(), *platform.libc_ver()
        found.update(repr((self.flags(), tvm_ffi.__version__, machine)).encode())
        return found.hexdigest()[:16]


def load(spec: Spec) -> Any:
    """The module; builds it where the cache does not have it.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be trusted.
    """
    library = build(spec)
    try:
        return _load(library)
    except BuildError as error:
        try:
            return _load(build(spec, instead_of=_sealed_digest(library)))
        except BuildError as again:
            raise BuildError(f"{error}; built again: {again}") from again


def _load(library: Path) -> Any:
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(library))
    except Exception as error:
        raise BuildError(f"{library} does not load: {error}") from error


def build(spec: Spec, instead_of: bytes | None = None) -> Path:
    """Path of the module, built where it is not cached.

    Args:
        instead_of: the digest of a module that does not load here; one with that is built again.

    Raises:
        BuildError: as `load`.
    """
    library = library_path(spec)

    def is_there() -> bool:
        return _is_whole(library) and (instead_of is None or _sealed_digest(library) != instead_of)

    try:
        if not is_there():  # a cache that is whole need not be ours to write
            _make_folder(library.parent)
            with _counting_lost_time() as deadline:
                _build_once(spec, library, deadline, is_there)
        _check_trusted(library)
    except OSError as error:
        raise BuildError(f"the cache {library.parent} cannot be used ({error})") from error
    return library


@contextmanager
def _counting_lost_time() -> Iterator[float]:
    """Gives the time at which a build must end, and counts its seconds where it fails."""
    global _lost_s
    started = time.time()
    if _lost_s >= BUILD_LIMIT_S:
        raise BuildError(f"this process has waited {_lost_s:.0f} s for builds that failed")
    try:
        yield started + BUILD_LIMIT_S - _lost_s
    except BaseException:
        _lost_s += time.time() - started
        raise


def _build_once(spec: Spec, library: Path, deadline: float, is_there: Callable[[], bool]) -> None:
    """Builds the module, or waits for whoever does."""
    folder, started = library.parent, time.time()
    try:
        with _lock(folder, deadline - started):
            # Whoever waited for a build that failed gives up with the builder.
            if reason := _failure_since(folder, started):
                raise BuildError(reason)
            if not is_there():
                _compile(spec, library, deadline)
    except Timeout as error:
        raise BuildError(f"{folder} is locked for {deadline - started:.0f} s") from error


@contextmanager
def _lock(folder: Path, limit_s: float) -> Iterator[None]:
    lock = FileLock(folder / "lock", timeout=limit_s, mode=0o644)
    try:
        lock.acquire()
    except NotImplementedError:  # a volume without locks: two may build, each its own file
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _failure_since(folder: Path, started: float) -> str | None:
    """Why the last build failed, if that was after `started`."""
    failed = folder / "failed"
    try:
        return failed.read_text() if failed.stat().st_mtime >= started else None
    except FileNotFoundError:
        return None


def find_builder(spec: Spec) -> Path | None:
    """The nvcc that `build` would run; None where the cache has the module.

    Raises:
        BuildError: neither: no nvcc knows the SM, or the cache cannot be read, written or
            trusted.
    """
    library = library_path(spec)
    try:
        if is_cached(spec):
            _check_trusted(library)
            return None
        for path in (library.parents[1], library.parent):
            if path.exists():
                check_trusted(path)
    except OSError as error:
        raise BuildError(f"the cache {library.parent} cannot be used ({error})") from error
    check_writable(library.parent)
    return find_nvcc(spec.sm)


def library_path(spec: Spec) -> Path:
    """Where the module lies in the cache, or will lie."""
    return cache_folder() / f"{spec.name}_{spec.key()}" / "module.so"


def is_cached(spec: Spec) -> bool:
    """Whether the cache has the module, whole.

    Raises:
        OSError: the cache cannot be read.
    """
    return _is_whole(library_path(spec))


def cache_folder() -> Path:
    """Where compiled modules lie: TVM FFI's cache, `TVM_FFI_CACHE_DIR` or its default.

    In a folder that everybody may write and nobody may take from others (as /tmp), it is a
    subfolder of this user's own.

    Raises:
        BuildError: the variable is not set, and this user has no home.
    """
    try:
        folder = Path(os.environ.get("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi")).expanduser()
    except RuntimeError as error:
        raise BuildError(f"{error}: set HOME or TVM_FFI_CACHE_DIR") from error
    try:
        mode = folder.stat().st_mode
    except OSError:  # not there yet, or not to be seen: the build will say
        return folder
    shared = mode & stat.S_IWOTH and mode & stat.S_ISVTX
    return folder / f"user-{os.geteuid()}" if shared else folder


def find_nvcc(sm: int, candidates: Iterable[Path] | None = None) -> Path:
    """The first nvcc that runs and knows the SM.

    Args:
        sm: 10 * major + minor of a compute capability.
        candidates: where to look, of a library that takes no other; by default
            `$CUDA_HOME/bin`, the PATH, /usr/local/cuda and the wheels of this environment,
            in this order.

    Raises:
        BuildError: there is none; it says what was tried.
    """
    advice = "install the CUDA toolkit and set CUDA_HOME"
    if candidates is None:
        advice += ", or pip install nvidia-cuda-nvcc"
    problems = []
    for nvcc in dict.fromkeys(nvcc_candidates() if candidates is None else candidates):
        problem = _nvcc_problem(nvcc, sm)
        if problem is None:
            return nvcc
        problems.append(f"{nvcc} {problem}")
    raise BuildError(f"no nvcc for SM {sm} ({', '.join(problems)}); {advice}")


def nvcc_candidates() -> Iterator[Path]:
    """Where an nvcc may be, the likeliest first."""
    if cuda_home := os.environ.get("CUDA_HOME"):
        yield Path(cuda_home, "bin", "nvcc")
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")
    yield from sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))


def _nvcc_problem(nvcc: Path, sm: int) -> str | None:
    if shutil.which(nvcc) is None:
        return "is missing"
    try:
        done = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    if done.returncode != 0:
        return f"exits with {done.returncode}"
    return None if f"sm_{sm}" in done.stdout.split() else f"does not know sm_{sm}"


def _compile(spec: Spec, library: Path, deadline: float) -> None:
    """Puts the module into place with one rename, or says in the folder why it cannot."""
    folder = library.parent
    handle, name = tempfile.mkstemp(dir=folder, prefix="module.", suffix=".so")
    os.close(handle)
    partial = Path(name)
    try:
        _run_nvcc(spec, partial, deadline)
        partial.write_bytes(_sealed(partial.read_bytes()))
        partial.chmod(0o644)  # whatever the umask is
        partial.replace(library)
    except BuildError as error:
        failed = folder / "failed"
        failed.write_text(str(error))
        failed.chmod(0o644)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _run_nvcc(spec: Spec, output: Path, deadline: float) -> None:
    import tvm_ffi

    package = Path(tvm_ffi.__file__).parent
    nvcc = find_nvcc(spec.sm)
    command = [str(nvcc), *spec.flags(), f"-I{package / 'include'}", str(spec.source)]
    command += ["-o", str(output), f"-L{package / 'lib'}", "-ltvm_ffi"]
    started = time.time()
    for attempt in ("first", "second"):
        # A session of its own: with nvcc end the compilers that it has started.
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=max(deadline - time.time(), 0))
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)
                limit = f"it takes more than {deadline - started:.0f} s"
                raise BuildError(f"{nvcc} is killed, {limit}") from error
        if process.returncode == 0:
            return
        # Killed from outside, for want of memory perhaps: that may pass.
        if process.returncode > 0 or attempt == "second":
            complaint = _first_complaint(said)
            raise BuildError(f"{nvcc} exits with {process.returncode}: {complaint}")


def _first_complaint(output: str) -> str:
    """The line of nvcc's output that says what is wrong: an error, or "nvcc fatal"."""
    found = re.search(r"^.*\b(error|fatal)\b.*$", output, re.IGNORECASE | re.MULTILINE)
    return found[0].strip() if found else "no message"


def _sealed(library: bytes) -> bytes:
    """The library with its digest behind it, which a loader does not mind: one file, one rename."""
    return library + _SEAL + hashlib.sha256(library).hexdigest().encode()


def _is_whole(library: Path) -> bool:
    """Whether it is what the compiler wrote: a cut-off library may crash the process."""
    try:
        written = library.read_bytes()
    except FileNotFoundError:
        return False
    content, _, _ = written.rpartition(_SEAL)
    return written == _sealed(content)


def _sealed_digest(library: Path) -> bytes:
    return library.read_bytes().rpartition(_SEAL)[2]


def _make_folder(folder: Path) -> None:
    """Makes what is missing of the cache: everybody may read it, its owner alone may write."""
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            if each == folder:
                check_trusted(folder.parent)  # or it would be left behind there
            each.mkdir(exist_ok=True)
            each.chmod(0o755)  # whatever the umask is
    check_trusted(folder.parent)
    check_trusted(folder)


def check_writable(folder: Path) -> None:
    """This user may write into the folder, or may make it.

    Raises:
        BuildError: neither; it names the folder, or the one in which it would be made.
    """
    existing = folder.absolute()
    while not _is_seen(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise BuildError(f"{existing} is a file, must be a folder")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        raise BuildError(f"{existing} cannot be written by user {os.geteuid()}")


def _is_seen(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


def _check_trusted(library: Path) -> None:
    for path in (library.parents[1], library.parent, library):
        check_trusted(path)


def check_trusted(path: Path) -> None:
    """Nobody but this user and root may have written what is about to run.

    A group may write where it has its owner's number, or 0: that is a user's private
    group, for which many distributions set the umask to 002, or root's, in which
    containers run whose user is picked by the platform.

    Raises:
        BuildError: somebody else may; it says who, and where.
    """
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise BuildError(
            f"{path} belongs to user {found.st_uid}, must be yours or root's; {_ADVICE}"
        )
    others = 0o002 if found.st_gid in (found.st_uid, 0) else 0o022
    if found.st_mode & others:
        mode = found.st_mode & 0o7777
        raise BuildError(
            f"{path} is writable by others (mode {mode:o}, group {found.st_gid}); {_ADVICE}"
        )
