"""The upstream PR: what the export makes of SGLang's sources, and what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from environments import copy_sglang

from sglang.srt.layers.moe_router import cluster_router_gemm
from sglang.srt.layers.moe_router.environ import CHOICES
from sglang_router_gemm.cli import main
from sglang_router_gemm.contract import MODEL, examine

SGLANG = Path(str(distribution("sglang").locate_file("sglang")))
ENVIRON = "srt/environ.py"
# All that the export reads.
READ = (
    MODEL,
    ENVIRON,
    "srt/runtime_context.py",
    "srt/utils/custom_op.py",
)
# The settings of SGLang's pre-commit hooks.
ISORT = "[settings]\nprofile=black\nknown_first_party=sglang\n"


def git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def commit(checkout: Path) -> None:
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "SGLang")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """SGLang's repository, with the files that the export reads."""
    folder = tmp_path / "checkout"
    for file in READ:
        there = folder / "python" / "sglang" / file
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SGLANG / file, there)
    (folder / ".isort.cfg").write_text(ISORT)
    git(tmp_path, "init", "--quiet", str(folder))
    commit(folder)
    return folder


def contents(checkout: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(checkout)): file.read_bytes()
        for file in checkout.rglob("*")
        if file.is_file() and ".git" not in file.parts
    }


def lint(checkout: Path, files: list[str], rules: str) -> None:
    """isort and ruff, as SGLang runs them."""
    for linter in (["isort", "--check-only"], ["ruff", "check", "--isolated", "--select", rules]):
        done = subprocess.run(
            [sys.executable, "-m", *linter, *files],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["export", *map(str, arguments)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("sglang-router-gemm export: ")


# What it makes ---------------------------------------------------------------------------


def test_the_edits_are_few_and_nothing_else_moves(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(checkout)
    assert main(["export", str(checkout)]) == 0
    stat = capsys.readouterr().out
    added = {
        path: (int(more), int(less))
        for more, less, path in map(str.split, git(checkout, "diff", "--numstat").splitlines())
    }
    assert added == {f"python/sglang/{MODEL}": (6, 0), f"python/sglang/{ENVIRON}": (4, 0)}
    for path, (more, less) in added.items():
        assert f"{path} " in stat
        assert f"+{more} -{less}\n" in stat
    new = contents(checkout).keys() - before.keys()
    assert f"{len(new) + 2} files" in stat
    for path in (
        "python/sglang/srt/models/deepseek_v2_gate.py",
        "python/sglang/srt/layers/moe_router/plan.py",
        "test/srt/router_gemm/cpu/test_gate.py",
        "benchmark/kernels/deepseek/router_gemm_benchmark/timing.py",
    ):
        assert path in new
    assert examine(checkout / "python/sglang").in_tree
    text = (checkout / "python/sglang" / ENVIRON).read_text()
    assert f"# Router GEMM of the MoE gate: {', '.join(CHOICES[:-1])} or {CHOICES[-1]}.\n" in text


def test_what_it_brings_does_not_know_this_project(checkout: Path) -> None:
    assert main(["export", str(checkout)]) == 0
    for path, content in contents(checkout).items():
        assert b"sglang_router_gemm" not in content, path


def test_sglangs_own_linters_pass(checkout: Path) -> None:
    assert main(["export", str(checkout)]) == 0
    commit(checkout)
    files = git(checkout, "diff", "--name-only", "HEAD~", "--", "*.py").split()
    lint(checkout, files, "F401,F821")


def test_again_is_the_same(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkout)]) == 0
    once, said = contents(checkout), capsys.readouterr().out
    assert main(["export", str(checkout)]) == 0
    assert (contents(checkout), capsys.readouterr().out) == (once, said)
    commit(checkout)
    assert main(["export", str(checkout)]) == 0
    assert contents(checkout) == once
    assert capsys.readouterr().out == "nothing to do: the checkout has it all\n"


def test_check_and_diff_change_nothing_and_the_diff_is_the_export(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(checkout)
    assert main(["export", str(checkout), "--check"]) == 0
    assert capsys.readouterr().out == f"{checkout}: the export applies\n"
    assert main(["export", str(checkout), "--diff"]) == 0
    assert contents(checkout) == before
    patch = tmp_path / "patch"
    patch.write_text(capsys.readouterr().out)
    git(checkout, "apply", str(patch))
    applied = contents(checkout)
    git(checkout, "stash", "--include-untracked", "--quiet")
    assert main(["export", str(checkout)]) == 0
    assert contents(checkout) == applied


def test_an_unpacked_sdist(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its root is the repository's folder `python`, and git does not know it."""
    sdist = shutil.copytree(checkout / "python", tmp_path / "sglang-0.5.23")
    assert main(["export", str(sdist)]) == 0
    assert (sdist / "sglang/srt/models/deepseek_v2_gate.py").is_file()
    assert "sglang/srt/models/deepseek_v2.py " in capsys.readouterr().out
    assert main(["export", str(sdist)]) == 0
    assert capsys.readouterr().out == "nothing to do: the checkout has it all\n"


# What it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("only", [(), ("--check",), ("--diff",)])
@pytest.mark.parametrize("file", ["README.md", f"python/sglang/{MODEL}", ".isort.cfg"])
def test_a_dirty_checkout(
    file: str, only: tuple[str], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (checkout / file).open("a") as changed:
        changed.write("# changed\n")
    before = contents(checkout)
    assert refused(capsys, checkout, *only) == (
        f"{checkout} is dirty ({file}), must be a clean checkout"
    )
    assert contents(checkout) == before


def test_a_change_beside_the_export_is_dirt(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkout)]) == 0
    capsys.readouterr()
    with (checkout / "python/sglang" / ENVIRON).open("a") as changed:
        changed.write("# changed\n")
    assert "is dirty" in refused(capsys, checkout)


def test_a_folder_below_the_root_is_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would pass for an unpacked sdist, which has no commit to compare with."""
    before = contents(checkout)
    said = refused(capsys, checkout / "python")
    assert said == f"{checkout / 'python'} is a folder of a checkout, must be its root {checkout}"
    assert contents(checkout) == before


def test_an_installed_sglang_is_refused(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(checkout / "python/sglang", site / "sglang")
    (site / "sglang-0.5.23.dist-info").mkdir()
    before = contents(site)
    assert (
        refused(capsys, site) == f"{site} is where SGLang is installed, must be a source checkout"
    )
    assert contents(site) == before


def test_a_tree_that_is_not_sglang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, tmp_path).startswith(f"{tmp_path} is not SGLang's source tree")


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (MODEL, "forward_batch: F", "batch: F", "MoEGate.forward takes (self, hidden_states"),
        (ENVIRON, "SGLANG_FLASHINFER_USE_PAGED", "PAGED", "has no SGLANG_FLASHINFER_USE_PAGED"),
        (MODEL, "from sglang", "from slang", "imports nothing of SGLang's that sorts before"),
    ],
)
def test_a_release_that_it_cannot_edit(
    file: str,
    old: str,
    new: str,
    problem: str,
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edited = checkout / "python/sglang" / file
    edited.write_text(edited.read_text().replace(old, new))
    commit(checkout)
    before = contents(checkout)
    assert problem in refused(capsys, checkout)
    assert contents(checkout) == before


def test_nothing_is_half_written(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark, which comes last, has no place; SGLang's files are not edited either."""
    (checkout / "benchmark").write_text("a file where the folder must be\n")
    commit(checkout)
    before = contents(checkout)
    assert "benchmark" in refused(capsys, checkout)
    assert contents(checkout) == before


# How it behaves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> Iterator[Path]:
    """The whole installed SGLang as an sdist, exported, where every user may read it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy_sglang(folder / "python")
        assert main(["export", str(folder)]) == 0
        yield folder


IN_TREE = """
import sys
sys.modules["sglang_router_gemm"] = None
sys.meta_path[:] = [finder for finder in sys.meta_path if "InTree" not in str(finder)]
from sglang.srt.environ import envs
from sglang.srt.models import deepseek_v2, deepseek_v2_gate
from sglang.srt.layers.moe_router import environ
assert environ.SGLANG_ROUTER_GEMM_BACKEND is envs.SGLANG_ROUTER_GEMM_BACKEND
assert environ.SGLANG_ROUTER_GEMM_PDL is envs.SGLANG_ROUTER_GEMM_PDL
assert environ.requested_backend() == "torch"
assert environ.pdl_enabled()
print(deepseek_v2.__file__, deepseek_v2_gate.__file__)
"""


@pytest.mark.xdist_group("exported")
def test_sglang_has_it_without_this_project(exported: Path, run_python: Callable[..., str]) -> None:
    models = exported / "python/sglang/srt/models"
    said = run_python(
        IN_TREE, PYTHONPATH=str(exported / "python"), SGLANG_ROUTER_GEMM_BACKEND="torch"
    )
    assert f"{models}/deepseek_v2.py {models}/deepseek_v2_gate.py" in said


@pytest.mark.xdist_group("exported")
def test_the_gate_behaves_as_under_the_plugin(exported: Path) -> None:
    """The same tests, from their place in SGLang's tree, against SGLang's own gate there.

    Without those that compile what is compiled here already, from the same text.
    """
    there = exported / "python/sglang/srt/layers/moe_router/csrc"
    here = cluster_router_gemm.SOURCE.parent
    assert {file.name: file.read_text() for file in there.iterdir()} == {
        file.name: file.read_text() for file in here.iterdir()
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, "-k", "not compiles_without_spills", str(exported / "test/srt/router_gemm")],
        cwd=exported,
        env=os.environ | {"PYTHONPATH": str(exported / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# The text of the PR ----------------------------------------------------------------------

TEXT = Path(__file__).parents[3] / "docs" / "upstream_pr.md"


def test_its_reproduction_prints_what_it_shows(run_python: Callable[..., str]) -> None:
    _, code, shown, *_ = re.split(r"```(?:python)?\n", TEXT.read_text().replace("\n```\n\n", "\n"))
    assert len([line for line in code.splitlines() if line]) <= 10
    right = code.replace("mutates_args=[]", 'mutates_args=["logits"]')
    for program, printed in (
        (code, shown.splitlines()[0]),
        (right, "tensor([1., 1.]) tensor([1., 1.])"),
    ):
        # torch's cache of compiled graphs does not tell the two ops apart: one name.
        said = run_python(program, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
        assert said.splitlines()[-1] == printed
