"""Virtual environments that have this project installed, and SGLang as its users have it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

from conftest import run_code

ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment that finds everything but SGLang and this project outside."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python3.*/site-packages")
        outside = folder / "outside"
        outside.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not re.match(r"sglang([-_.](?!kernel)|$)|_editable|.*\.pth$", entry.name):
                (outside / entry.name).symlink_to(entry)
        (self.site / "outside.pth").write_text(f"{outside}\n")

    def install(self, *arguments: str | Path) -> None:
        """`pip install`, offline."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-q"]
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
        pip += ["--disable-pip-version-check", *offline]
        subprocess.run([*pip, *arguments], check=True)

    def run(self, code: str, cwd: Path) -> str:
        """Runs code in a fresh interpreter and returns its stdout and stderr."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return run_code(code, str(self.python), clean, cwd)


def build_wheel(folder: Path) -> Path:
    """This project's wheel in `folder`, built as it would be for PyPI."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def copy_sglang(folder: Path, metadata: bool = False) -> None:
    """Copies the installed package `sglang` into `folder`, with what pip says about it or without.

    With its compiled files, which hold as long as the sources have their times.
    """
    installed = distribution("sglang")
    names = ["sglang"]
    if metadata:
        names.append(f"sglang-{installed.version}.dist-info")
    unused = shutil.ignore_patterns("multimodal_gen")
    for name in names:
        shutil.copytree(str(installed.locate_file(name)), folder / name, ignore=unused)
