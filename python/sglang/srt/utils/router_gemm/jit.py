"""Compiles one .cu file with nvcc into a TVM FFI module, cached on disk.

`tvm_ffi.cpp.build` does this too, for the GPU that nvidia-smi names and with a CUDA
toolkit that has `lib64`. Here the SM is given, so that it can be built without a GPU,
the nvcc that comes as a wheel with SGLang serves as well, and what lies in the cache is
loaded only if nobody else could have put it there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tvm_ffi
from filelock import FileLock, Timeout

_BUILD_TIMEOUT_S = 600
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

        An image may have the binary and no compiler.
        """
        found = hashlib.sha256()
        for file in sorted(self.source.parent.iterdir()):
            if file.suffix in (".cu", ".cuh"):
                found.update(file.read_bytes())
        found.update(repr((self.flags(), tvm_ffi.__version__)).encode())
        return found.hexdigest()[:16]


def load(spec: Spec) -> Any:
    """The module; builds it where the cache does not have it.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be trusted.
    """
    library = build(spec)
    try:
        return tvm_ffi.load_module(str(library))
    except Exception as error:
        raise BuildError(f"{library} does not load: {error}") from error


def build(spec: Spec) -> Path:
    """Path of the module, built where it is not cached.

    Raises:
        BuildError: as `load`.
    """
    folder = cache_folder() / f"{spec.name}_{spec.key()}"
    library = folder / "module.so"
    try:
        _make_private(folder)
        if not _is_whole(library):
            with FileLock(folder / "lock", timeout=_BUILD_TIMEOUT_S):
                if not _is_whole(library):
                    _compile(spec, library)
        check_trusted(library)
    except Timeout as error:
        raise BuildError(f"{folder} is locked for {_BUILD_TIMEOUT_S} s") from error
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be used ({error})") from error
    return library


def cache_folder() -> Path:
    """Where TVM FFI keeps compiled modules: `TVM_FFI_CACHE_DIR` or its default."""
    return Path(os.environ.get("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi")).expanduser()


@functools.cache
def find_nvcc() -> Path:
    """`$CUDA_HOME/bin/nvcc`, or that on the PATH, in /usr/local/cuda, or of a wheel.

    Raises:
        BuildError: there is none.
    """
    for candidate in _nvcc_candidates():
        if os.access(candidate, os.X_OK):
            return candidate
    raise BuildError(
        "nvcc is missing; install the CUDA toolkit and set CUDA_HOME, or pip install "
        "nvidia-cuda-nvcc"
    )


def _nvcc_candidates() -> Iterator[Path]:
    if cuda_home := os.environ.get("CUDA_HOME"):
        yield Path(cuda_home, "bin", "nvcc")
        return  # whoever sets it means it
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")
    yield from sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))


def _compile(spec: Spec, library: Path) -> None:
    package = Path(tvm_ffi.__file__).parent
    partial = library.with_suffix(f".{os.getpid()}.so")
    command = [str(find_nvcc()), *spec.flags(), f"-I{package / 'include'}", str(spec.source)]
    command += ["-o", str(partial), f"-L{package / 'lib'}", "-ltvm_ffi"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S
        )
        if done.returncode != 0:
            said = _first_complaint(done.stderr + done.stdout)
            raise BuildError(f"{command[0]} exits with {done.returncode}: {said}")
        partial.chmod(0o700)  # whatever the umask is
        _digest_file(library).write_text(_digest(partial))
        partial.replace(library)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} takes more than {_BUILD_TIMEOUT_S} s") from error
    finally:
        partial.unlink(missing_ok=True)


def _first_complaint(output: str) -> str:
    """The line of nvcc's output that says what is wrong: an error, or "nvcc fatal"."""
    found = re.search(r"^.*\b(error|fatal)\b.*$", output, re.IGNORECASE | re.MULTILINE)
    return found[0].strip() if found else "no message"


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_whole(library: Path) -> bool:
    """Whether it is what the compiler wrote: a cut-off library may crash the process."""
    try:
        return _digest_file(library).read_text() == _digest(library)
    except FileNotFoundError:
        return False


def _make_private(folder: Path) -> None:
    for each in (folder.parent, folder):  # one by one: the mode is only that of the last
        each.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_trusted(each)


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
        raise BuildError(f"{path} belongs to user {found.st_uid}, must be yours or root's")
    others = 0o002 if found.st_gid in (found.st_uid, 0) else 0o022
    if found.st_mode & others:
        raise BuildError(f"{path} is writable by others (mode {found.st_mode & 0o777:o})")
