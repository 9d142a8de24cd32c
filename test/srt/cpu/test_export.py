"""The pull requests: what the export makes of SGLang's sources, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import clang_format
import libcst as cst
import pytest
import torch
import triton
import tvm_ffi
from environments import copy_sglang

from sglang.srt.layers.moe_router import cluster_route, cluster_router_gemm, jit
from sglang.srt.layers.moe_router.cluster_route import Routing
from sglang.srt.layers.moe_router.models import MODELS, Auto, Model, Route
from sglang_router_gemm import pull_requests
from sglang_router_gemm.cli import main
from sglang_router_gemm.contract import MODEL
from sglang_router_gemm.export import PULL_REQUESTS, RELEASE
from sglang_router_gemm.pull_requests import edits, fp32, gate, header, routing
from sglang_router_gemm.pull_requests.gate_header import gate_header
from sglang_router_gemm.pull_requests.pull_request import RuleError
from sglang_router_gemm.pull_requests.routing_header import routing_header

SGLANG = Path(str(distribution("sglang").locate_file("sglang")))
UTILS = "srt/models/deepseek_common/utils.py"
REGISTRY = "kernels/ops/gemm/__init__.py"
WIDE_GATES = tuple(
    f"srt/models/{name}.py" for name in ("glm4_moe", "longcat_flash", "mimo_v2", "minimax_m2")
)
TOPK = "srt/layers/moe/topk.py"
MOE_REGISTRY = "kernels/ops/moe/__init__.py"
EDITED = (MODEL, UTILS, REGISTRY, TOPK, MOE_REGISTRY, *WIDE_GATES)
STYLE = "kernels/jit/.clang-format"
# The file whose branch takes the kernel.
MAIN = {"gate": MODEL, "flashinfer": MODEL, "fp32": MODEL, "routing": TOPK}
OP = "python/sglang/kernels/ops/gemm/cluster_router_gemm.py"
HEADER = "python/sglang/kernels/jit/csrc/gemm/cluster_router_gemm.cuh"
ROUTE_OP = "python/sglang/kernels/ops/moe/moe_route_warp.py"
ROUTE_HEADER = "python/sglang/kernels/jit/csrc/moe/route_warp.cuh"
TESTS = "test/registered/kernels/ops/gemm"
MOE_TESTS = "test/registered/kernels/ops/moe"
BENCHMARK = "benchmark/kernels/deepseek/benchmark_deepgemm_dsv3_router_gemm_blackwell.py"
CSRC = cluster_router_gemm.SOURCE.parent
# The settings of SGLang's hooks.
ISORT = "[settings]\nprofile=black\nknown_first_party=sglang\n"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TEXTS = Path(__file__).parents[3] / "docs" / "upstream"


def git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def commit(checkout: Path) -> None:
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "SGLang")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """SGLang's repository, with the files that the pull requests edit, and its settings."""
    folder = tmp_path / "checkout"
    for file in (*EDITED, STYLE):
        there = folder / "python" / "sglang" / file
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SGLANG / file, there)
    (folder / ".isort.cfg").write_text(ISORT)
    git(tmp_path, "init", "--quiet", str(folder))
    commit(folder)
    return folder


@pytest.fixture(params=pull_requests.NAMES)
def pr(request: pytest.FixtureRequest, checkout: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A pull request, what it needs being committed in the checkout."""
    name: str = request.param
    commit_what_it_needs(checkout, name)
    capsys.readouterr()
    return name


ALONE = pytest.mark.parametrize(
    "pr", [name for name, each in PULL_REQUESTS.items() if each.needs is None], indirect=True
)


def commit_what_it_needs(checkout: Path, pr: str) -> None:
    needed = PULL_REQUESTS[pr].needs
    if needed is not None:
        assert export(checkout, needed.name) == 0
        commit(checkout)


def export(checkout: Path, pr: str, *options: str) -> int:
    return main(["export", str(checkout), "--pr", pr, *options])


def contents(checkout: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(checkout)): file.read_bytes()
        for file in checkout.rglob("*")
        if file.is_file() and ".git" not in file.parts
    }


def run(command: list[str | Path], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def lint(checkout: Path, files: list[str]) -> None:
    """isort, ruff, its formatter, and clang-format, as SGLang runs them."""
    layout = [clang_format.get_executable("clang-format"), "--style=file", "--dry-run", "-Werror"]
    if headers := [file for file in files if file.endswith(".cuh")]:
        run([*layout, *headers], checkout)
    files = [file for file in files if file not in headers]
    ruff = [sys.executable, "-m", "ruff"]
    run([sys.executable, "-m", "isort", "--check-only", *files], checkout)
    run([*ruff, "check", "--isolated", "--select", "F401,F821", *files], checkout)
    form = [*ruff, "format", "--isolated", "--line-length", "88", "--check"]
    # SGLang's formatter and this one differ on some of its files.
    run([*form, *(file for file in files if is_formatted(checkout, file, form))], checkout)


def is_formatted(checkout: Path, file: str, form: list[str]) -> bool:
    """Whether it was before the last commit; a file that was not there counts as such."""
    if not git(checkout, "ls-tree", "--name-only", "HEAD~", file):
        return True
    old = git(checkout, "show", f"HEAD~:{file}")
    command = [*form, "--stdin-filename", file, "-"]
    return subprocess.run(command, input=old, capture_output=True, text=True).returncode == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["export", *map(str, arguments)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("sglang-router-gemm export: ")


# What it makes ---------------------------------------------------------------------------


def test_the_names_are_those_of_the_pull_requests() -> None:
    assert tuple(PULL_REQUESTS) == pull_requests.NAMES
    for each in PULL_REQUESTS.values():
        assert {*each.rules, *each.replaces} <= {*each.new_files()}


def test_a_pull_request_is_small(
    pr: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkout, pr) == 0
    stat = capsys.readouterr().out
    commit(checkout)
    rows = [row.split() for row in git(checkout, "diff", "--numstat", "HEAD~").splitlines()]
    for more, less, path in rows:
        said = re.search(rf"^{re.escape(path)} +\+(\d+) -(\d+)$", stat, re.MULTILINE)
        assert said is not None
        # Two diffs of one edit may differ in what they see as kept.
        assert int(said[1]) - int(said[2]) == int(more) - int(less)
    added, removed = (sum(int(row[i]) for row in rows) for i in (0, 1))
    said = re.search(rf"^{len(rows)} files, (\d+) added, (\d+) removed$", stat, re.MULTILINE)
    assert said is not None
    assert int(said[1]) - int(said[2]) == added - removed
    added, removed = max(added, int(said[1])), max(removed, int(said[2]))
    assert added <= {"gate": 900, "flashinfer": 300, "fp32": 900, "routing": 900}[pr]
    # `if` of the gate, which becomes `elif`; and what gate wrote for bf16 weights alone.
    assert removed <= {"fp32": 100}.get(pr, 1)
    assert len(rows) <= 10
    of_main = {path: int(more) for more, _, path in rows}[f"python/sglang/{MAIN[pr]}"]
    assert of_main <= {"routing": 90}.get(pr, 20)
    for model in WIDE_GATES if pr == "fp32" else ():
        assert 0 < {path: int(more) for more, _, path in rows}[f"python/sglang/{model}"] <= 7


def test_what_it_brings_knows_neither_this_project_nor_a_setting(pr: str, checkout: Path) -> None:
    assert export(checkout, pr) == 0
    git(checkout, "add", "--all")
    diff = git(checkout, "diff", "--cached", "--unified=0")
    added = [line for line in diff.splitlines() if line.startswith("+")]
    forbidden = r"plugin|sglang[-_]router[-_]gemm|environ|getenv|SGLANG_|csrc/ptx|docs/|// @"
    # SGLang's own, which ask for other kernels of its.
    names = "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK", "SGLANG_OPT_BF16_FP32_GEMM_ALGO"
    own = rf"envs\.({'|'.join(names)})\.(get|override)\("
    own += r"|sglang\.srt\.environ import envs|_SGLANG_EXPERIMENTAL_LORA_OPTI"
    added = [re.sub(own, "", line) for line in added]
    assert [line for line in added if re.search(forbidden, line, re.IGNORECASE)] == []


@pytest.mark.parametrize(
    "several",
    [
        ("gate", "flashinfer", "routing"),
        ("routing", "flashinfer", "gate", "fp32"),
        ("gate", "fp32", "flashinfer"),
    ],
)
def test_sglangs_own_linters_pass_for_one_and_for_several(
    several: tuple[str, ...], checkout: Path
) -> None:
    for each in several:
        assert export(checkout, each) == 0
        commit(checkout)
        files = git(checkout, "diff", "--name-only", "HEAD~", "--", "*.py", "*.cuh").split()
        assert any(file.endswith(".cuh") for file in files) == (each != "flashinfer")
        assert f"python/sglang/{MAIN[each]}" in files
        lint(checkout, files)


def test_again_is_the_same(pr: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(checkout, pr) == 0
    once, said = contents(checkout), capsys.readouterr().out
    assert export(checkout, pr) == 0
    assert (contents(checkout), capsys.readouterr().out) == (once, said)
    commit(checkout)
    assert export(checkout, pr) == 0
    assert contents(checkout) == once
    assert capsys.readouterr().out == "nothing to do: the checkout has it all\n"


def test_check_and_diff_change_nothing_and_the_diff_is_the_export(
    pr: str, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(checkout)
    assert export(checkout, pr, "--check") == 0
    assert capsys.readouterr().out == f"{checkout}: the export applies\n"
    assert export(checkout, pr, "--diff") == 0
    assert contents(checkout) == before
    patch = tmp_path / "patch"
    patch.write_text(capsys.readouterr().out)
    git(checkout, "apply", str(patch))
    applied = contents(checkout)
    git(checkout, "stash", "--include-untracked", "--quiet")
    assert export(checkout, pr) == 0
    assert contents(checkout) == applied


def test_an_unpacked_sdist(
    pr: str, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its root is the repository's folder `python`, and git does not know it."""
    sdist = shutil.copytree(checkout / "python", tmp_path / f"sglang-{RELEASE}")
    if (needed := PULL_REQUESTS[pr].needs) is not None:
        assert export(sdist, needed.name) == 0
        capsys.readouterr()
    assert export(sdist, pr) == 0
    said = capsys.readouterr().out
    assert f"sglang/{MAIN[pr]} " in said
    assert "python/sglang" not in said
    whole = {**PULL_REQUESTS[pr].edits, **PULL_REQUESTS[pr].new_files()}
    for path in (path for path in whole if path.startswith("python/")):
        assert (sdist / path.removeprefix("python/")).is_file()
    assert export(sdist, pr) == 0
    assert capsys.readouterr().out == "nothing to do: the checkout has it all\n"


def test_the_old_benchmark_of_its_name_is_replaced(checkout: Path) -> None:
    old = checkout / BENCHMARK
    old.parent.mkdir(parents=True)
    old.write_text("import sgl_kernel\n")
    commit(checkout)
    assert export(checkout, "flashinfer") == 0
    assert "sgl_kernel" not in old.read_text()


def test_the_table_is_that_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> dict[tuple[int, int], tuple[int, int]]:
        found = re.search(r"NUM_TOKENS: .* = (\{.*?\n\})", gate.GATE.new_files()[OP], re.DOTALL)
        assert found is not None
        evaluated: dict[tuple[int, int], tuple[int, int]] = eval(found[1])
        return evaluated

    assert table()[256, 7168] == (1, 128)
    assert table()[128, 7168] == (4, 128)
    assert set(table()) <= {(model.num_experts, model.hidden_size) for model in MODELS}
    assert max(most for _, most in table().values()) <= 128  # the header's kMaxTokens
    taken = {90: Auto("cluster", range(3, 6))}
    models = (
        Model("taken", 64, 1024, taken),
        Model("of its shape", 64, 1024, {90: Auto("cluster", range(1, 9))}),
        Model("elsewhere", 64, 2048, {100: Auto("cluster", range(1, 9))}),
        Model("another's kernel", 64, 3072, {90: Auto("flashinfer", range(1, 9))}),
        Model("fp32", 64, 4096, taken, dtype=torch.float32),
        Model("bf16 logits", 64, 5120, taken, logits_dtype=torch.bfloat16),
        Model("a bias", 64, 6144, taken, bias=True),
    )
    monkeypatch.setattr(gate, "MODELS", models)
    monkeypatch.setattr("sglang.srt.layers.moe_router.models.MODELS", models)
    assert table() == {(64, 1024): (3, 5)}
    assert "  # taken\n" in gate.GATE.new_files()[OP]


def test_the_table_of_fp32_has_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> dict[tuple[int, int, torch.dtype], tuple[int, int]]:
        edit = fp32.FP32.edits[OP]
        text = edit(gate.GATE.new_files()[OP])
        assert edit(text) == text
        found = re.search(r"NUM_TOKENS: .* = (\{.*?\n\})", text, re.DOTALL)
        assert found is not None
        evaluated: dict[tuple[int, int, torch.dtype], tuple[int, int]] = eval(found[1])
        return evaluated

    assert table()[160, 5120, torch.bfloat16] == (2, 128)  # DeepSeek-V2
    assert table()[160, 5120, torch.float32] == (1, 128)  # GLM-4.5
    assert table()[768, 6144, torch.float32] == (1, 63)  # LongCat-Flash
    assert len(table()) == 8 + 6
    taken = {90: Auto("cluster", range(3, 6))}
    wide = torch.float32
    models = (
        Model("fp32", 64, 1024, taken, dtype=wide),
        Model("elsewhere", 64, 2048, {100: Auto("cluster", range(1, 9))}, dtype=wide),
        Model("bf16 logits", 64, 3072, taken, dtype=wide, logits_dtype=torch.bfloat16),
        Model("a bias", 64, 4096, taken, dtype=wide, bias=True),
    )
    monkeypatch.setattr(gate, "MODELS", models)
    assert table() == {(64, 1024, wide): (3, 5)}


# The header -------------------------------------------------------------------------------


def test_the_header_has_bf16_weights_and_fp32_logits_alone() -> None:
    text = gate.GATE.new_files()[HEADER]
    unused = (
        r"kWide|[Bb]ias|[Tt]erm|Weight_|Logits|nv_bfloat16|high_halves|below\(|split\(|store\(bf16"
    )
    assert re.findall(unused, text) == []
    check_that_all_is_called(text)


def check_that_all_is_called(text: str) -> None:
    for name in re.findall(r"SGL_DEVICE \w+\s(\w+)\(", text):
        assert len(re.findall(rf"\b{name}(?:<[^>]*>)?\(", text)) > 1, f"nobody calls {name}"


def test_the_header_of_fp32_has_both_weights_and_fp32_logits_alone() -> None:
    edit = fp32.FP32.edits[HEADER]
    text = edit(gate.GATE.new_files()[HEADER])
    assert edit(text) == text
    assert re.findall(r"[Bb]ias|Logits|nv_bfloat16|store\(bf16|docs/", text) == []
    assert "S::kWide" in text
    check_that_all_is_called(text)


def test_the_header_of_the_routing_has_one_variant_and_no_plan() -> None:
    text = routing.ROUTING.new_files()[ROUTE_HEADER]
    unused = r"cluster|SumOrder|shared_of_sum|kRenormalize|block_shift|sorted_ids|kMax|barrier|----"
    assert re.findall(unused, text) == []
    for name in re.findall(r"SGL_DEVICE \w+(?:<[^>]*>)?\s(\w+)\(", text):
        assert len(re.findall(rf"\b{name}(?:<[^>]*>)?\(", text)) > 1, f"nobody calls {name}"


def test_the_table_of_routings_is_that_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> set[tuple[int, ...]]:
        text = routing.ROUTING.new_files()[ROUTE_OP]
        found = re.search(r"ROUTINGS: .* = frozenset\(\s*(\{.*?\n    \})", text, re.DOTALL)
        assert found is not None
        evaluated: set[tuple[int, ...]] = eval(found[1])
        return evaluated

    ungrouped = {(each, 1, 1, 8) for each in (128, 160, 256, 384)}
    assert table() == {(256, 8, 4, 8)} | ungrouped
    models = (
        Model("taken", 64, 1024, {}, Route(4, 2, 6, auto={90: "2026-11-30"})),
        Model("elsewhere", 64, 2048, {}, Route(1, 1, 6, auto={100: "2026-11-30"})),
        Model("no route", 96, 3072, {}),
    )
    monkeypatch.setattr(routing, "MODELS", models)
    assert table() == {(64, 4, 2, 6)}


COMPILE = """
import shutil, subprocess, sys, torch
from pathlib import Path
from sglang.kernels.jit.utils import override_jit_cuda_arch
from sglang.kernels.jit.utils.compile import ninja
from sglang.kernels.ops.PLACE import NAME

class Compiled(Exception):
    pass

def compile_only(*, spec, build_dir, build_file):  # no libcudart to link with is needed
    build_dir.mkdir(parents=True)
    for unit in spec.translation_units():
        (build_dir / unit.filename).write_text(unit.source)
    (build_dir / "build.ninja").write_text(build_file)
    subprocess.run(["ninja", "cuda_0.o"], cwd=build_dir, check=True)
    shutil.copy(build_dir / "cuda_0.o", OUT)
    raise Compiled

ninja.build = compile_only
with override_jit_cuda_arch(9, 0):
    try:
        MODULE
    except Compiled:
        print("compiled")
"""


def machine_code(binary: Path, name: str = "") -> list[str]:
    """The kernels of such a name without their names, in an order of their own."""
    sass = subprocess.check_output([CUOBJDUMP, "-sass", binary], text=True)
    kernels = [each.partition("\n") for each in sass.split("Function : ")[1:]]
    # How wide a column is depends on the longest line of the binary.
    return sorted(" ".join(code.split()) for named, _, code in kernels if name in named)


def compile_theirs(
    module: str, exported: Path, folder: Path, run_python: Callable[..., str]
) -> Path:
    """The object that SGLang's own `load_jit` makes, with its headers and flags, for SM 90."""
    theirs, name = folder / "theirs.o", module.partition(".")[0]
    said = run_python(
        COMPILE.replace("OUT", repr(str(theirs)))
        .replace("MODULE", module)
        .replace("PLACE", "moe" if name == "moe_route_warp" else "gemm")
        .replace("NAME", name),
        PYTHONPATH=str(exported / "python"),
        SGLANG_JIT_CACHE_DIR=str(folder / "cache"),
    )
    assert said.splitlines()[-1] == "compiled"
    return theirs


def compile_ours(spec: jit.Spec, folder: Path) -> Path:
    ours = folder / "ours.cubin"
    flags = [flag for flag in spec.flags() if flag != "-shared"]
    include = f"-I{Path(tvm_ffi.__file__).parent / 'include'}"
    run([jit.find_nvcc(90), *flags, include, "-cubin", spec.source, "-o", ours], folder)
    return ours


@pytest.mark.xdist_group("compiles")
@pytest.mark.parametrize(
    ("pr", "shape", "weight"),
    [
        ("gate", (256, 7168), torch.bfloat16),
        ("fp32", (256, 7168), torch.bfloat16),
        ("fp32", (160, 5120), torch.float32),
        ("fp32", (768, 6144), torch.float32),  # has narrow tiles for few tokens
    ],
    indirect=["pr"],
)
def test_sglang_compiles_the_same_machine_code(
    pr: str,
    shape: tuple[int, int],
    weight: torch.dtype,
    tmp_path: Path,
    run_python: Callable[..., str],
) -> None:
    """By its own `load_jit`, with its headers and flags."""
    folder = tmp_path / "exported"
    copy_sglang(folder / "python")
    for each in ("gate", pr)[pr == "gate" :]:
        assert export(folder, each) == 0
    arguments = ", ".join(map(str, (*shape, weight)[: 2 if pr == "gate" else 3]))
    module = f"cluster_router_gemm._jit_cluster_router_gemm_module({arguments})"
    theirs = machine_code(compile_theirs(module, folder, tmp_path, run_python))
    spec = cluster_router_gemm.spec(*shape, 90, weight)
    ours = machine_code(compile_ours(spec, tmp_path))
    assert len(ours) == 3
    assert theirs == ours


@pytest.mark.xdist_group("compiles")
def test_sglang_compiles_the_same_machine_code_of_the_routing(
    exported: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """For DeepSeek-V3's without a shared expert: there nothing is left to a variant."""
    module = "moe_route_warp._jit_route_warp_module(256, 8, 4, 8, 0)"
    theirs = machine_code(compile_theirs(module, exported, tmp_path, run_python))
    spec = cluster_route.spec(Routing(256, 8, 4, 8, 0, renormalize=True), 90)
    ours = machine_code(compile_ours(spec, tmp_path), name="12route_kernel")
    assert len(ours) == 1
    assert theirs == ours


@pytest.mark.xdist_group("compiles")
@pytest.mark.parametrize("of_module", ["384, 1, 1, 8, 0", "160, 1, 1, 8, 1"])
def test_sglang_compiles_the_routing_of_one_group(
    of_module: str, exported: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    module = f"moe_route_warp._jit_route_warp_module({of_module})"
    code = machine_code(compile_theirs(module, exported, tmp_path, run_python))
    assert len(code) == 1


SOURCE = """\
// Top.
#pragma once

namespace a {

// ---- First ----

// Of f.
template <int kN>
int f() {
  if constexpr (kYes) {
    one();
    if (x) {
      two();
    }
  } else {
    three();
  }
  if constexpr (!kYes) {
    four();
  }
#pragma unroll
  for (int once = 0;;) {
    five();
  }
}

int g() {
  return 1;
}

// ---- Second ----

int h();

}  // namespace a
"""


def test_the_rules_of_the_header() -> None:
    body = header.body(SOURCE, "a")
    assert body.startswith("// ---- First")
    assert body.endswith("int h();\n\n")
    assert header.opening_comment(SOURCE) == "// Top.\n"
    assert "h()" not in header.before(body, "Second")
    assert "----" not in header.without_sections(body)
    yes, no = (header.decided(SOURCE, "kYes", value) for value in (True, False))
    assert "{\n  one();\n  if (x) {\n    two();\n  }\n#pragma unroll\n" in yes
    assert "{\n  three();\n  four();\n#pragma unroll\n" in no
    assert "#pragma unroll" not in header.unrolled(SOURCE, "for (int once = 0;;)")
    without_f = header.without_definition(SOURCE, "int f()")
    assert "// ---- First ----\n\nint g() {\n" in without_f
    assert header.renamed("ab a_b a", "a", "c") == "ab a_b c"


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (lambda: header.body(SOURCE, "b"), "no namespace b"),
        (lambda: header.before(SOURCE, "Third"), "no section 'Third'"),
        (lambda: header.replaced(SOURCE, "six();", ""), r"no 'six\(\);'"),
        (lambda: header.renamed(SOURCE, "kY", ""), "names no kY"),
        (lambda: header.without_definition(SOURCE, "int i("), r"has 0 lines 'int i\('"),
        (lambda: header.decided(SOURCE, "kNo", True), r"no if constexpr \(kNo\)"),
        (lambda: header.unrolled(SOURCE, "for (;;)"), r"no 'for \(;;\)'"),
    ],
)
def test_a_rule_of_the_header_that_finds_nothing(rule: Callable[[], str], problem: str) -> None:
    with pytest.raises(RuleError, match=problem):
        rule()


def test_a_header_is_laid_out_as_sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    long = f"SGL_DEVICE int {'a' * 50}() {{\n  return {'b' * 100};\n}}\n"  # 110 columns of 120
    ours = long.replace("SGL_DEVICE", "__device__ __forceinline__").replace("return ", "return\n")
    assert header.in_sglangs_style(ours) == long
    monkeypatch.setattr(header, "_STYLE", "sglang/kernels/none")
    with pytest.raises(RuleError, match="no sglang/kernels/none, must have it"):
        header.in_sglangs_style(ours)


@pytest.mark.parametrize(
    ("pull_request", "kernel", "old", "new", "problem"),
    [
        (
            "gate",
            "cluster_router_gemm.cuh",
            "S::kTerms - 1",
            "S::kTerms - 2",
            "the header has no 'for (int term",
        ),
        ("routing", "cluster_route.cuh", "far ? 4", "far ? 2", "// The sum of the first eight"),
        ("routing", "cluster_route.cuh", "void push_bit(", "void push(", "has 0 lines"),
    ],
)
def test_a_kernel_that_has_moved_on_is_not_exported(
    pull_request: str,
    kernel: str,
    old: str,
    new: str,
    problem: str,
    tmp_path: Path,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    source = (csrc / kernel).read_text()
    assert old in source
    (csrc / kernel).write_text(source.replace(old, new))
    monkeypatch.setattr(gate, "gate_header", lambda glue, _: gate_header(glue, csrc))
    monkeypatch.setattr(routing, "routing_header", lambda glue, _: routing_header(glue, csrc))
    before = contents(checkout)
    assert problem in refused(capsys, checkout, "--pr", pull_request)
    assert contents(checkout) == before


# The edits --------------------------------------------------------------------------------

PYTHON = """\
from a import (
    x,
)

if c:
    from b import y


class Gate:
    def __init__(self):
        self.limit = 1

    def forward(self, m):
        if m <= self.limit:
            # One.
            return 1
        else:
            return 2


table: dict[int, int] = {}
"""


@pytest.mark.parametrize(
    ("edit", "gives"),
    [
        (lambda m: edits.with_name_imported(m, "a", "w"), "from a import (\n    w,\n    x,\n)"),
        (lambda m: edits.with_import_before(m, "b", "import z\n"), "if c:\n    import z\n    from"),
        (
            lambda m: edits.with_statement_after(m, "Gate", "self.limit", "self.flag = 2\n"),
            "self.limit = 1\n        self.flag = 2\n",
        ),
        (
            lambda m: edits.with_branch_before(m, "Gate", "m <= self.limit", "if m:\n    z()\n"),
            "        if m:\n            z()\n        elif m <= self.limit:\n",
        ),
        (
            lambda m: edits.with_statement_replaced(m, "Gate", "return  1", "x = 1\nreturn x\n"),
            "            # One.\n            x = 1\n            return x\n        else:\n",
        ),
        (
            lambda m: edits.with_beginning(m, "forward", "x = 1\n", class_name="Gate"),
            "(self, m):\n        x = 1\n        if m",
        ),
        (lambda m: edits.with_value(m, "table", "{1: 2}"), "table: dict[int, int] = {1: 2}\n"),
        (
            lambda m: edits.with_call_after(m, "table:dict", "z()\n"),
            "table: dict[int, int] = {}\nz()\n",
        ),
        (
            lambda m: edits.with_beginning(m, "forward", "if not m:\n    return 0\n"),
            "m):\n        if not m:\n            return 0\n        if m <= self.limit:\n",
        ),
    ],
)
def test_an_edit(edit: Callable[[cst.Module], cst.Module], gives: str) -> None:
    assert gives in edits.code_of(edit(cst.parse_module(PYTHON)))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: edits.with_name_imported(m, "d", "w"), "0 times a import of d"),
        (lambda m: edits.with_import_before(m, "d", "import z\n"), "0 times a import of d"),
        (lambda m: edits.with_statement_after(m, "Gate", "self.x", ""), "assignment to self.x in"),
        (lambda m: edits.with_statement_after(m, "MoE", "self.x", ""), "0 times a class MoE"),
        (lambda m: edits.with_branch_before(m, "Gate", "x", "if y:\n    z\n"), "branch on x in G"),
        (
            lambda m: edits.with_statement_replaced(m, "Gate", "return 1", "x\n", times=2),
            "1 times a statement return 1 in Gate, must be 2 times",
        ),
        (
            lambda m: edits.with_beginning(m, "back", "x\n", class_name="Gate"),
            "0 times a method back in Gate",
        ),
        (lambda m: edits.with_value(m, "tables", "{}"), "0 times a constant tables"),
        (lambda m: edits.with_call_after(m, "z()", "z()"), r"0 times a statement z\(\)"),
        (
            lambda m: edits.with_function_after(m, "f", "def g():\n    z()\n"),
            "0 times a function f",
        ),
        (lambda m: edits.with_beginning(m, "f", "z()\n"), "0 times a function f"),
        (
            lambda m: edits.with_beginning(
                cst.parse_module('def f():\n    """Doc."""\n'), "f", "z()\n"
            ),
            "the function f has a docstring",
        ),
    ],
)
def test_an_edit_without_its_place(edit: Callable[[cst.Module], cst.Module], problem: str) -> None:
    with pytest.raises(RuleError, match=problem):
        edit(cst.parse_module(PYTHON))


# What it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("only", [(), ("--check",), ("--diff",)])
@pytest.mark.parametrize("file", ["README.md", f"python/sglang/{MODEL}", ".isort.cfg"])
def test_a_dirty_checkout(
    file: str, only: tuple[str], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (checkout / file).open("a") as changed:
        changed.write("# changed\n")
    before = contents(checkout)
    assert refused(capsys, checkout, "--pr", "gate", *only) == (
        f"{checkout} is dirty ({file}), must be a clean checkout"
    )
    assert contents(checkout) == before


def test_a_change_beside_the_export_is_dirt(
    pr: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkout, pr) == 0
    capsys.readouterr()
    with (checkout / "python/sglang" / UTILS).open("a") as changed:
        changed.write("# changed\n")
    assert "is dirty" in refused(capsys, checkout, "--pr", pr)


def test_the_other_pull_request_is_dirt_until_it_is_committed(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkout, "gate") == 0
    capsys.readouterr()
    assert "is dirty" in refused(capsys, checkout, "--pr", "flashinfer")


@pytest.mark.parametrize("only", [(), ("--check",), ("--diff",)])
@pytest.mark.parametrize("exported", [False, True])
def test_fp32_without_a_committed_gate(
    exported: bool, only: tuple[str], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if exported:
        assert export(checkout, "gate") == 0
    capsys.readouterr()
    before = contents(checkout)
    said = refused(capsys, checkout, "--pr", "fp32", *only)
    assert re.fullmatch(
        rf"{checkout} has no \S*cluster_router_gemm\S*, must have --pr gate committed, "
        "which --pr fp32 edits",
        said,
    )
    assert contents(checkout) == before


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        (HEADER, "kRanks = 8;", "kRanks = 4;", "it is not what --pr gate makes, must be"),
        (OP, "*weight.shape)", "weight.shape[0])", "it is not what --pr gate makes, must be"),
        (f"python/sglang/{UTILS}", "_device_sm != 90", "_device_sm < 90", "must be once"),
        (f"python/sglang/{MODEL}", "F.linear(hidden_states.float(), self.weight)", "0", "MoEGate"),
        ("glm4_moe", "self.weight, None", "self.weight", "a statement logits = F.linear("),
        ("mimo_v2", "logits = F.linear", "out = F.linear", "a statement logits = F.linear("),
        ("longcat_flash", "class LongcatFlashRouter", "class Router", "a class LongcatFlashRouter"),
        ("minimax_m2", "logits, _ = self.gate", "logits = self.gate", "must be 2 times"),
        (f"{TESTS}/test_cluster_router_gemm.py", "SHAPES = ", "GATES = ", "not what --pr gate"),
    ],
)
def test_a_checkout_whose_gate_is_another(
    path: str,
    old: str,
    new: str,
    problem: str,
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit_what_it_needs(checkout, "fp32")
    capsys.readouterr()
    if "/" not in path:
        path = f"python/sglang/srt/models/{path}.py"
    text = (checkout / path).read_text()
    assert old in text
    (checkout / path).write_text(text.replace(old, new))
    commit(checkout)
    before = contents(checkout)
    said = refused(capsys, checkout, "--pr", "fp32")
    assert f"is not SGLang {RELEASE}, which the pull request is for: {path}: " in said
    assert problem in said
    assert contents(checkout) == before


def test_a_patch_of_other_sources_is_refused(
    tmp_path: Path,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit_what_it_needs(checkout, "fp32")
    capsys.readouterr()
    text = fp32.PATCH.read_text()
    assert "\n @cache_once\n" in text
    other = tmp_path / "fp32.patch"
    other.write_text(text.replace("\n @cache_once\n", "\n @cached\n"))
    monkeypatch.setattr(fp32, "PATCH", other)
    before = contents(checkout)
    assert "fp32.patch does not apply: " in refused(capsys, checkout, "--pr", "fp32")
    assert contents(checkout) == before


@ALONE
def test_a_file_of_its_name_is_not_overwritten(
    pr: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(each for each in PULL_REQUESTS[pr].new_files() if each.startswith("python/"))
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("# SGLang's\n")
    commit(checkout)
    before = contents(checkout)
    said = refused(capsys, checkout, "--pr", pr)
    assert said.endswith(f"{path}: it is there already, with another text")
    assert contents(checkout) == before


def test_a_folder_below_the_root_is_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would pass for an unpacked sdist, which has no commit to compare with."""
    before = contents(checkout)
    said = refused(capsys, checkout / "python", "--pr", "gate")
    assert said == f"{checkout / 'python'} is a folder of a checkout, must be its root {checkout}"
    assert contents(checkout) == before


def test_an_installed_sglang_is_refused(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(checkout / "python/sglang", site / "sglang")
    (site / f"sglang-{RELEASE}.dist-info").mkdir()
    before = contents(site)
    said = refused(capsys, site, "--pr", "gate")
    assert said == f"{site} is where SGLang is installed, must be a source checkout"
    assert contents(site) == before


def test_a_tree_that_is_not_sglang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, tmp_path, "--pr", "gate")
    assert said.startswith(f"{tmp_path} is not SGLang's source tree")


@pytest.mark.parametrize("arguments", [[], ["--pr", "gates"]])
def test_a_pull_request_must_be_named(
    arguments: list[str], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(checkout), *arguments])
    assert stopped.value.code == 2
    assert "--pr" in capsys.readouterr().err


OF_GATES = ("gate", "flashinfer")
OF_ROUTING = ("routing",)


@pytest.mark.parametrize(
    ("prs", "file", "old", "new", "problem"),
    [
        (OF_GATES, MODEL, "class MoEGate", "class Gate", "0 times a class MoEGate, must be once"),
        (OF_GATES, MODEL, "<= self.tiny_router", "< self.tiny_router", "0 times a branch on hid"),
        (OF_GATES, MODEL, "gemm.tiny_gemm import", "gemm.tiny import", "import of sglang.kernels"),
        (OF_GATES, UTILS, "def tiny_router", "def small_router", "0 times a function tiny_router"),
        (OF_GATES, REGISTRY, "gemm.tiny_gemm", "gemm.small", "0 times a statement register_kernel"),
        (OF_ROUTING, TOPK, "def select_experts", "def select", "0 times a function select_experts"),
        (OF_ROUTING, TOPK, "_is_cuda = is_", "_is_cuda = _is_", "0 times a statement _is_cuda"),
        (OF_ROUTING, TOPK, "def _post_process_topk_ids", "def _post", "0 times a function _post_"),
        (OF_ROUTING, TOPK, ".pynccl_allocator import", ".pynccl import", "import of sglang.srt.d"),
        (OF_ROUTING, MOE_REGISTRY, "moe.shuffle_weighted", "moe.shuffle", "0 times a statement"),
    ],
)
def test_a_release_that_it_cannot_edit(
    prs: tuple[str, ...],
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
    path = f"python/sglang/{file}"
    for pr in prs:
        said = refused(capsys, checkout, "--pr", pr)
        assert f"is not SGLang {RELEASE}, which the pull request is for: {path}: " in said
        assert problem in said
        assert contents(checkout) == before


@ALONE
def test_nothing_is_half_written(
    pr: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests, which come last, have no place; SGLang's files are not edited either."""
    (checkout / "test").write_text("a file where the folder must be\n")
    commit(checkout)
    before = contents(checkout)
    assert "test" in refused(capsys, checkout, "--pr", pr)
    assert contents(checkout) == before


# How it behaves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> Iterator[Path]:
    """The whole installed SGLang as a repository, with all pull requests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sglang(folder / "python")
        for each in pull_requests.NAMES:
            assert export(folder, each) == 0
        yield folder


GATE = """
import json
from types import SimpleNamespace
import torch
from sglang.srt.models import deepseek_v2
from sglang.srt.models.deepseek_common import utils

print(deepseek_v2.__file__)
torch.set_default_dtype(torch.bfloat16)
deterministic = SimpleNamespace(enable_deterministic_inference=False)
deepseek_v2.get_exec = lambda: SimpleNamespace(deterministic=deterministic)
served = []

def serves(name):
    def kernel(hidden_states, weight, **options):
        served.append(name)
        return hidden_states.float() @ weight.float().t()
    return kernel

for name in ("cluster_router_gemm", "flashinfer_dsv3_router_gemm", "tiny_gemm_bf16"):
    setattr(deepseek_v2, name, serves(name))

def who(num_experts, hidden_size, num_tokens, sm=None, wide=False, **config):
    utils._is_cuda, utils._device_sm = sm is not None, sm
    utils.is_flashinfer_available = lambda: True
    config = SimpleNamespace(
        n_routed_experts=num_experts, hidden_size=hidden_size, topk_method="greedy", **config
    )
    gate = deepseek_v2.MoEGate(config, quant_config=None)
    torch.nn.init.normal_(gate.weight)
    hidden_states = torch.randn(num_tokens, hidden_size * (2 if wide else 1))[:, :hidden_size]
    served.clear()
    logits = gate(hidden_states)
    expected = hidden_states.float() @ gate.weight.float().t()
    assert torch.allclose(logits.float(), expected, rtol=0.05, atol=1), num_tokens
    return served[0] if served else "the rest"

asked = {case: who(*json.loads(case)) for case in CASES}
asked["cpu"] = who(256, 7168, 8)
asked["wide"] = who(256, 7168, 8, 90, wide=True)
asked["wide, SM 100"] = who(256, 7168, 8, 100, wide=True)
asked["fp32"] = who(256, 7168, 8, 90, router_fp32=True)
with utils.envs.SGLANG_OPT_BF16_FP32_GEMM_ALGO.override("deep_gemm"):
    asked["another algorithm"] = [who(256, 7168, num_tokens, 90) for num_tokens in (16, 17)]
asked["FlashInfer"] = []
for sm in (80, 89, 90, 100, 103, 107, 120):
    utils._is_cuda, utils._device_sm = True, sm  # on SM 90 the other kernel comes first above
    if utils.use_flashinfer_dsv3_router_gemm(
        num_experts=256, hidden_size=7168, weight_dtype=torch.bfloat16
    ):
        asked["FlashInfer"].append(sm)
deterministic.enable_deterministic_inference = True
asked["deterministic"] = who(256, 7168, 8, 90)
print(json.dumps(asked))
"""


@pytest.mark.xdist_group("exported")
def test_the_gate_takes_a_kernel_where_it_was_measured(
    exported: Path, run_python: Callable[..., str]
) -> None:
    """SGLang's own gate on this CPU, which is told that it is on a GPU, with each kernel's name."""
    cluster, flashinfer, tiny = (
        "cluster_router_gemm",
        "flashinfer_dsv3_router_gemm",
        "tiny_gemm_bf16",
    )
    expected: dict[str, object] = {
        "cpu": "the rest",
        "FlashInfer": [100, 103],
        "wide": tiny,
        "wide, SM 100": tiny,
        "fp32": "the rest",
        "another algorithm": [cluster, "the rest"],
        "deterministic": "the rest",
    }
    for (num_experts, hidden_size), (_, num_tokens) in gate.taken().items():
        for m in {0, 1, num_tokens[0] - 1, num_tokens[0], num_tokens[-1], num_tokens[-1] + 1}:
            otherwise = tiny if m <= 16 else "the rest"
            case = json.dumps([num_experts, hidden_size, m, 90])
            expected[case] = cluster if m in num_tokens else otherwise
    for sm, of_sm in ((80, None), (89, None), (100, flashinfer), (103, flashinfer), (120, tiny)):
        for m in (0, 1, 16, 17):
            otherwise = tiny if sm >= 90 and m <= 16 else "the rest"
            taken = of_sm if of_sm and 1 <= m <= 16 else otherwise
            expected[json.dumps([256, 7168, m, sm])] = taken
    expected[json.dumps([256, 6144, 8, 100])] = tiny
    expected[json.dumps([64, 2048, 8, 90])] = tiny
    cases = [case for case in expected if case.startswith("[")]
    said = run_python(GATE.replace("CASES", repr(cases)), PYTHONPATH=str(exported / "python"))
    *_, file, asked = said.splitlines()
    assert file == str(exported / "python/sglang" / MODEL)
    assert json.loads(asked) == expected


WIDE = """
import json, sys
from types import SimpleNamespace as Config
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.models import deepseek_v2, glm4_moe, longcat_flash, mimo_v2, minimax_m2

print(deepseek_v2.__file__)
torch.set_default_dtype(torch.bfloat16)

def hy4():
    config = Config(n_routed_experts=256, hidden_size=2816, topk_method="greedy", router_fp32=True)
    return deepseek_v2.MoEGate(config, quant_config=None)

def glm4():
    return glm4_moe.Glm4MoeGate(Config(n_routed_experts=160, hidden_size=5120))

def mimo(**config):
    config = Config(n_routed_experts=256, hidden_size=4096, topk_method="greedy", **config)
    return mimo_v2.MoEGate(config, quant_config=None)

def longcat(bias=False):
    config = Config(n_routed_experts=512, hidden_size=6144, router_bias=bias)
    return longcat_flash.LongcatFlashRouter(config, zero_expert_num=256)

def minimax():
    block = minimax_m2.MiniMaxM2MoE.__new__(minimax_m2.MiniMaxM2MoE)
    torch.nn.Module.__init__(block)
    block.gate = ReplicatedLinear(3072, 256, bias=False, params_dtype=torch.float32)
    block.experts = lambda hidden_states, topk_output: hidden_states
    return block

BUILD = {each.__name__: each for each in (hy4, glm4, mimo, longcat, minimax)}

def built(build, **options):
    gate = build(**options)
    torch.manual_seed(0)
    for each in gate.parameters():
        each.data.normal_()
    return gate, next(each for each in gate.parameters() if each.dim() == 2)

@torch.no_grad()
def logits_of(gate, hidden_states):
    if not hasattr(gate, "forward_deepep"):
        return gate(hidden_states)
    seen = []
    gate.topk = lambda hidden_states, router_logits: seen.append(router_logits)
    gate.forward_normal(hidden_states)
    gate.forward_deepep(hidden_states, None)
    assert torch.equal(*seen)
    return seen[0]
"""

AS_BEFORE = """
import hashlib

asked = {}
for name, build in BUILD.items():
    gate, weight = built(build)
    for num_tokens in (1, 8, 130):
        hidden_states = torch.randn(num_tokens, weight.shape[1])
        logits = logits_of(gate, hidden_states)
        assert logits.dtype == torch.float32
        bits = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        asked[f"{name}, M = {num_tokens}"] = bits
print(json.dumps(asked))
"""


@pytest.mark.xdist_group("exported")
def test_on_a_cpu_the_gates_give_what_they_gave(
    exported: Path, run_python: Callable[..., str]
) -> None:
    *_, file, after = run_python(WIDE + AS_BEFORE, PYTHONPATH=str(exported / "python")).splitlines()
    assert file == str(exported / "python/sglang" / MODEL)
    *_, file, before = run_python(WIDE + AS_BEFORE, SGLANG_ROUTER_GEMM_BACKEND="off").splitlines()
    assert file == str(SGLANG / MODEL)
    assert len(json.loads(after)) == 5 * 3
    assert json.loads(after) == json.loads(before)


SERVED = """
from torch.utils._python_dispatch import TorchDispatchMode
from sglang.kernels.ops.gemm import cluster_router_gemm as op
from sglang.srt.lora.layers import ReplicatedLinearWithLoRA
from sglang.srt.models.deepseek_common import utils

class Casts(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))

deterministic = Config(enable_deterministic_inference=False)
utils.get_exec = lambda: Config(deterministic=deterministic)
utils._is_cuda = torch.Tensor.is_cuda = True
utils._device_sm = 90
served = []

def kernel(hidden_states, weight):
    served.append(weight)
    assert hidden_states.dtype == torch.bfloat16
    return torch.ones(hidden_states.shape[0], weight.shape[0], dtype=torch.float32)

op.cluster_router_gemm = kernel

def takes(gate, weight, hidden_states):
    served.clear()
    with Casts() as casts:
        casts.count = 0
        logits = logits_of(gate, hidden_states)
    if not served:
        expected = hidden_states.float() @ weight.float().t()
        assert torch.allclose(logits.float(), expected, rtol=0.05, atol=1)
        return False
    assert casts.count == 0, "hidden_states were cast"
    assert all(each is weight for each in served)
    assert torch.equal(logits, torch.ones_like(logits))
    return True

asked = {}
for name, build in BUILD.items():
    gate, weight = built(build)
    num_experts, hidden_size = weight.shape
    fewest, most = op.NUM_TOKENS[num_experts, hidden_size, torch.float32]
    hidden_states = torch.randn(8, 2 * hidden_size)
    plain = hidden_states[:, :hidden_size].contiguous()
    for num_tokens in (fewest, most, most + 1):
        others = torch.randn(num_tokens, hidden_size)
        asked[f"{name}, M = {num_tokens}"] = takes(gate, weight, others)
    asked[f"{name}, fp32 hidden_states"] = takes(gate, weight, plain.float())
    asked[f"{name}, strides"] = takes(gate, weight, hidden_states[:, :hidden_size])
    deterministic.enable_deterministic_inference = True
    asked[f"{name}, deterministic"] = takes(gate, weight, plain)
    deterministic.enable_deterministic_inference = False
    for sm in (80, 89, 100, 103, 120):
        utils._device_sm = sm
        asked[f"{name}, SM {sm}"] = takes(gate, weight, plain)
    utils._device_sm = 90
    utils._is_cuda = False
    asked[f"{name}, no CUDA"] = takes(gate, weight, plain)
    utils._is_cuda = True
    torch.Tensor.is_cuda = False
    asked[f"{name}, on a CPU"] = takes(gate, weight, plain)
    torch.Tensor.is_cuda = True
    for layer in ("classifier", "gate"):
        if hasattr(gate, layer):
            backend = Config(get_batch_info=lambda: None)
            setattr(gate, layer, ReplicatedLinearWithLoRA(getattr(gate, layer), backend))
            gate.hpc_kernel_min_m = None
            asked[f"{name}, LoRA"] = takes(gate, weight, plain)

gate, weight = built(longcat, bias=True)
with torch.no_grad():
    gate.classifier.bias.zero_()
asked["longcat, a bias"] = takes(gate, weight, torch.randn(8, 6144))
gate, weight = built(mimo, moe_router_dtype="bfloat16")
torch.Tensor.is_cuda = False
asked["mimo, bf16 weights"] = takes(gate, weight, torch.randn(8, 4096))
print(json.dumps(asked))
"""


@pytest.mark.xdist_group("exported")
def test_the_gates_with_fp32_weights_take_the_kernel_where_it_was_measured(
    exported: Path, run_python: Callable[..., str]
) -> None:
    """SGLang's own gates on this CPU, which is told that it is a GPU, with a kernel of its name."""
    said = run_python(WIDE + SERVED, PYTHONPATH=str(exported / "python"))
    asked = json.loads(said.splitlines()[-1])
    most = {"hy4": 128, "glm4": 128, "mimo": 128, "longcat": 63, "minimax": 128}
    taken = {f"{name}, M = {m}" for name, last in most.items() for m in (1, last)}
    assert {case for case, is_taken in asked.items() if is_taken} == taken
    assert len(asked) == 5 * 13 + 2 + 2


WIDE_COMPILED = """
import inspect
from sglang.srt import runtime_context
from sglang.srt.models.deepseek_common import utils

def kernel(hidden_states, weight, logits):
    served.append(hidden_states.shape[0])
    logits.copy_(hidden_states.float() @ weight.t())

torch.library.register_kernel("sglang::cluster_router_gemm_out", "cpu", kernel)
bags = {each: runtime_context._ConfigBag(each) for each in ("exec", "deterministic")}
bags["deterministic"]._set("enable_deterministic_inference", False)
bags["exec"].__dict__["deterministic"] = bags["deterministic"]
runtime_context._CONTEXT._config_bags = bags
utils._is_cuda, utils._device_sm = True, 90
# torch.compile knows by itself where a tensor is.
source = inspect.getsource(utils.try_cluster_router_gemm).replace("hidden_states.is_cuda", "True")
exec(source, vars(utils))
glm4_moe.try_cluster_router_gemm = utils.try_cluster_router_gemm
served = []
gate, weight = built(glm4)
compiled = torch.compile(gate, fullgraph=True, dynamic=True)
with torch.no_grad():
    for num_tokens in (300, 4, 128, 129):
        hidden_states = torch.randn(num_tokens, 5120)
        logits = compiled(hidden_states)
        expected = torch.nn.functional.linear(hidden_states.float(), weight)
        assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-2)
print(json.dumps(served))
"""


@pytest.mark.xdist_group("exported")
def test_a_gate_with_fp32_weights_under_torch_compile(
    exported: Path, run_python: Callable[..., str]
) -> None:
    said = run_python(
        WIDE + WIDE_COMPILED,
        PYTHONPATH=str(exported / "python"),
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert json.loads(said.splitlines()[-1]) == [4, 128]


SELECT = """
import json
from types import SimpleNamespace
from unittest.mock import patch
import torch
from sglang.srt.configs.shared_experts import SharedExpertsConfig
from sglang.srt.layers.moe import topk

PATCHED = hasattr(topk, "moe_route_warp")
served = []
deterministic = SimpleNamespace(enable_deterministic_inference=False)

def kernel(logits, bias, *, num_groups, top_groups, top_k, num_shared, scale, shared_weight):
    served.append([logits.shape[1], num_groups, top_groups, top_k, num_shared])
    scores = logits.sigmoid()
    ids = (scores + bias).topk(top_k).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(dim=1, keepdim=True) * scale
    if num_shared:
        ids = torch.nn.functional.pad(ids, (0, 1), value=logits.shape[1])
        weights = torch.nn.functional.pad(weights, (0, 1), value=shared_weight)
    return weights, ids.int()

def numbers(output):
    return [each.tolist() for each in (output.topk_weights, output.topk_ids)]

def select(num_tokens=8, num_experts=256, groups=(8, 4), top_k=8, shared=0, dtype=torch.float32,
           bias_dtype=torch.float32, call={}, wide=False, **fields):
    torch.manual_seed(num_tokens + num_experts)
    logits = torch.randn(num_tokens, num_experts * (2 if wide else 1))[:, :num_experts].to(dtype)
    usual = dict(
        top_k=top_k + shared, use_grouped_topk=True, num_expert_group=groups[0],
        topk_group=groups[1], shared_experts=SharedExpertsConfig(num_fused_shared_experts=shared),
        correction_bias=(torch.randn(num_experts) / 10).to(bias_dtype),
        routed_scaling_factor=2.5, scoring_func="sigmoid",
    )
    config = topk.TopKConfig(**usual | fields)
    return topk.select_experts(torch.zeros(num_tokens, 8), logits, config, layer_id=3, **call)

own = numbers(select())
if PATCHED:
    topk._is_sm90, topk.fused_topk_deepseek = True, "FlashInfer's"
    topk.moe_route_warp = kernel
    topk.get_exec = lambda: SimpleNamespace(deterministic=deterministic)

seen = []
class Recorder:
    def on_select_experts(self, topk_ids):
        seen.append(list(topk_ids.shape))
class Capturer:
    def capture(self, layer_id, topk_indices):
        seen.append([layer_id, *topk_indices.shape])
topk.get_global_expert_distribution_recorder = Recorder
topk.get_global_experts_capturer = Capturer

raised = []
def asked(*call):
    try:
        return own_takes(*call)
    except Exception as error:
        raised.append(repr(error))
        raise

def takes(**case):
    served.clear()
    try:
        select(**case)
    except Exception:  # SGLang's own, which is not for a CPU
        pass
    return raised or (served[0] if served else None)

answer = {"own": own, "file": topk.__file__}
if PATCHED:
    topk._takes_warp_routing, own_takes = asked, topk._takes_warp_routing
    U = (1, 1)
    cases = dict(
        deepseek=dict(), shared=dict(shared=1), kimi=dict(num_experts=384, groups=U),
        glm5=dict(groups=U), glm45=dict(num_experts=160, groups=U, shared=1),
        air=dict(num_experts=128, groups=U), most=dict(num_tokens=128),
        minimax=dict(groups=(None, None), use_grouped_topk=False),
        padded=dict(call=dict(num_token_non_padded=torch.tensor(5))),
        more=dict(num_tokens=129), none=dict(num_tokens=0), bf16=dict(dtype=torch.bfloat16),
        bf16_bias=dict(bias_dtype=torch.bfloat16), wide=dict(wide=True), top_6=dict(top_k=6),
        short_bias=dict(correction_bias=torch.zeros(128)),
        groups=dict(groups=(8, 3)), n=dict(num_experts=512), two_shared=dict(shared=2),
        softmax=dict(groups=(None, None), use_grouped_topk=False, scoring_func="softmax"),
        no_bias=dict(correction_bias=None), not_normalised=dict(renormalize=False),
        custom=dict(custom_routing_function=lambda **_: None), native=dict(torch_native=True),
        dynamic=dict(call=dict(dynamic_expert_bias=torch.zeros(8, 256))),
        dispatch=dict(call=dict(expert_location_dispatch_info=SimpleNamespace(
            ep_dispatch_algorithm="static"))),
        partials=dict(call=dict(router_logits_partials=torch.zeros(1))),
    )
    answer["takes"] = {name: takes(**case) for name, case in cases.items()}
    for name in ("SIMULATE_UNIFORM_EXPERTS", "OPT_USE_JIT_KERNEL_GROUPED_TOPK"):
        with getattr(topk.envs, "SGLANG_" + name).override(True):
            answer["takes"][name] = takes()
    deterministic.enable_deterministic_inference = True
    answer["takes"]["deterministic"] = takes()
    deterministic.enable_deterministic_inference = False
    def no_server():
        raise ValueError
    topk.get_exec, before = no_server, topk.get_exec
    answer["takes"]["no server"] = takes()
    topk.get_exec = before
    with patch.object(topk, "has_per_rank_fused_shared_slots", lambda num_shared: num_shared > 0):
        answer["takes"]["per rank"] = takes(shared=1)
    for name, value in (
        ("_is_sm90", False), ("fused_topk_deepseek", None), ("_SGLANG_EXPERIMENTAL_LORA_OPTI", True)
    ):
        with patch.object(topk, name, value):
            answer["takes"][name] = takes()
    seen.clear()
    weights, ids = numbers(select(shared=1))
    answer["shared"] = [ids[0][-1], weights[0][-1], sum(weights[0][:-1]), seen[:]]
    scaled = select(shared=1, apply_routed_scaling_factor_on_output=True)
    answer["scaled"] = [scaled.topk_weights[0, -1].item(), scaled.topk_weights[0, :-1].sum().item()]
    factor = select(shared=1, fused_shared_experts_scaling_factor=0.5)
    answer["factor"] = factor.topk_weights[0, -1].item()
    seen.clear()
    padded = select(call=dict(num_token_non_padded=torch.tensor(5)))
    answer["padded"] = [(padded.topk_ids == -1).all(dim=1).tolist(), seen[:]]
print(json.dumps(answer))
"""


@pytest.mark.xdist_group("exported")
def test_the_top_k_takes_the_kernel_where_it_was_measured(
    exported: Path, run_python: Callable[..., str]
) -> None:
    """SGLang's own `select_experts` on this CPU, which is told that it is on a GPU."""
    said = run_python(SELECT, PYTHONPATH=str(exported / "python"))
    *_, answer = said.splitlines()
    found = json.loads(answer)
    assert found["file"] == str(exported / "python/sglang" / TOPK)
    *_, answer = run_python(SELECT, PYTHONPATH=str(SGLANG.parent)).splitlines()
    assert found["own"] == json.loads(answer)["own"]  # not on a GPU: what it gave before
    deepseek, glm5 = [256, 8, 4, 8, 0], [256, 1, 1, 8, 0]
    expected = {
        "deepseek": deepseek,
        "shared": [256, 8, 4, 8, 1],
        "kimi": [384, 1, 1, 8, 0],
        "glm5": glm5,
        "glm45": [160, 1, 1, 8, 1],
        "air": [128, 1, 1, 8, 0],
        "most": deepseek,
        "minimax": glm5,
        "padded": deepseek,
        "no server": deepseek,
    }
    assert {name: each for name, each in found["takes"].items() if each} == expected
    assert len(found["takes"]) == 35
    shared_id, shared_weight, sum_of_weights, seen = found["shared"]
    assert (shared_id, seen) == (256, [[3, 8, 9], [8, 8]])  # captured, and the recorder's
    assert shared_weight == pytest.approx(1 / 2.5)
    assert sum_of_weights == pytest.approx(1)
    assert found["scaled"] == pytest.approx([1, 2.5])
    assert found["factor"] == pytest.approx(0.5 / 2.5)
    assert found["padded"] == [[False] * 5 + [True] * 3, [[3, 8, 8], [8, 8]]]


COMPILED = """
import torch
from sglang.kernels.ops.gemm.MODULE import FUNCTION

def kernel(hidden_states, weight, logits):
    logits.copy_(hidden_states.float() @ weight.float().t())

def of_order(ORDER):
    kernel(hidden_states, weight, logits)

torch.library.register_kernel("sglang::NAME", "cpu", of_order)
weight = torch.randn(32, 64).to(torch.DTYPE)

@torch.no_grad()
def doubled(hidden_states):
    return FUNCTION(hidden_states, weight) * 2

compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
for num_tokens in (2, 5, 16):
    hidden_states = torch.randn(num_tokens, 64).bfloat16()
    logits = compiled(hidden_states)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, 2 * (hidden_states.float() @ weight.float().t()))
print("right")
"""


@pytest.mark.xdist_group("exported")
@pytest.mark.parametrize(
    ("function", "name", "order", "dtype"),
    [
        *(
            (
                "cluster_router_gemm",
                "cluster_router_gemm_out",
                "hidden_states, weight, logits",
                dtype,
            )
            for dtype in ("bfloat16", "float32")
        ),
        (
            "flashinfer_dsv3_router_gemm",
            "flashinfer_dsv3_router_gemm",
            "logits, hidden_states, weight",
            "bfloat16",
        ),
    ],
)
def test_an_op_under_torch_compile(
    function: str,
    name: str,
    order: str,
    dtype: str,
    exported: Path,
    run_python: Callable[..., str],
) -> None:
    """The op says what it writes: torch neither drops nor moves it, and M may be symbolic."""
    code = COMPILED.replace("MODULE", function).replace("FUNCTION", function)
    code = code.replace("DTYPE", dtype)
    said = run_python(
        code.replace("NAME", name).replace("ORDER", order),
        PYTHONPATH=str(exported / "python"),
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert said.splitlines()[-1] == "right"


COMPILED_ROUTING = """
import torch
from sglang.kernels.ops.moe.moe_route_warp import moe_route_warp

def kernel(logits, bias, weights, ids, num_groups, top_groups, num_shared, scale, shared_weight):
    top = (logits + bias).topk(ids.shape[1] - num_shared)
    weights[:, :-1], weights[:, -1] = top.values * scale, shared_weight
    ids[:, :-1], ids[:, -1] = top.indices, logits.shape[1]

torch.library.register_kernel("sglang::moe_route_warp_out", "cpu", kernel)
bias = torch.randn(64)

def routed(logits):
    weights, ids = moe_route_warp(
        logits, bias, num_groups=1, top_groups=1, top_k=4, num_shared=1, scale=2.0
    )
    return weights * 2, ids + 1

compiled = torch.compile(routed, fullgraph=True, dynamic=True)
for num_tokens in (2, 5, 16):
    logits = torch.randn(num_tokens, 64)
    weights, ids = compiled(logits)
    top = (logits + bias).topk(4)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(weights[:, :4], 4 * top.values) and (weights[:, 4] == 2).all()
    assert torch.equal(ids[:, :4], top.indices.int() + 1) and (ids[:, 4] == 65).all()

# With all that asks whether it serves.
from sglang.srt.configs.shared_experts import SharedExpertsConfig
from sglang.srt.layers.moe import topk

topk._is_sm90, topk.fused_topk_deepseek = True, "FlashInfer's"
config = topk.TopKConfig(
    top_k=9, use_grouped_topk=True, num_expert_group=8, topk_group=4, scoring_func="sigmoid",
    shared_experts=SharedExpertsConfig(num_fused_shared_experts=1), routed_scaling_factor=2.5,
    correction_bias=torch.randn(256),
)

def select(logits):
    return topk.select_experts(torch.zeros(8, 8), logits, config)[:2]

logits = torch.randn(8, 256)
eager = select(logits)  # what SGLang makes when it is first asked for is there from now on
assert (eager[1][:, 8] == 256).all()
assert all(map(torch.equal, torch.compile(select, fullgraph=True)(logits), eager))
print("right")
"""


@pytest.mark.xdist_group("exported")
def test_the_routing_under_torch_compile(exported: Path, run_python: Callable[..., str]) -> None:
    said = run_python(
        COMPILED_ROUTING,
        PYTHONPATH=str(exported / "python"),
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert said.splitlines()[-1] == "right"


REGISTERED = """
import sys
from sglang.kernels import KernelBackend, registry
import sglang.kernels.ops
from sglang.test.ci.ci_register import ut_parse_one_file

for op, backend in (
    ("gemm.cluster_router_gemm", KernelBackend.JIT),
    ("gemm.flashinfer_dsv3_router_gemm", KernelBackend.FLASHINFER),
    ("moe.moe_route_warp", KernelBackend.JIT),
):
    assert callable(registry.get_backend(op, backend).load())
for file in FILES:
    (found,), _ = ut_parse_one_file(file)
    print(found.effective_suite)
"""


@pytest.mark.xdist_group("exported")
def test_sglang_finds_the_kernels_and_the_tests(
    exported: Path, run_python: Callable[..., str]
) -> None:
    files = [
        f"{exported}/{TESTS}/test_cluster_router_gemm.py",
        f"{exported}/test/registered/kernels/benchmark/gemm/bench_cluster_router_gemm.py",
        f"{exported}/{TESTS}/test_flashinfer_dsv3_router_gemm.py",
        f"{exported}/{MOE_TESTS}/test_moe_route_warp.py",
        f"{exported}/test/registered/kernels/benchmark/moe/bench_moe_route_warp.py",
    ]
    said = run_python(REGISTERED.replace("FILES", repr(files)), PYTHONPATH=str(exported / "python"))
    assert said.splitlines()[-5:] == [
        "base-b-kernel-unit-test-1-gpu-large",
        "base-b-kernel-benchmark-test-1-gpu-large",
        "base-b-kernel-unit-test-4-gpu-b200",
        "base-b-kernel-unit-test-1-gpu-large",
        "base-b-kernel-benchmark-test-1-gpu-large",
    ]


@pytest.mark.xdist_group("exported")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what the tests do without a GPU")
@pytest.mark.parametrize(
    ("tests", "outcome"),
    [(TESTS, r"^1 passed, \d{2,} skipped"), (MOE_TESTS, r"^\d{2,} skipped")],
)
def test_the_registered_tests_without_a_gpu(
    tests: str, outcome: str, exported: Path, run_python: Callable[..., str]
) -> None:
    code = f"import pytest; pytest.main(['-q', '-p', 'no:cacheprovider', '{exported}/{tests}'])"
    said = run_python(code, PYTHONPATH=str(exported / "python"))
    assert re.search(outcome, said, re.MULTILINE), said


# The texts of the pull requests ------------------------------------------------------------


@pytest.mark.parametrize("heading", ["Motivation", "Modifications", "Accuracy Tests", "Checklist"])
def test_a_text_follows_sglangs_template(heading: str, pr: str) -> None:
    assert f"\n## {heading}\n" in (TEXTS / f"{pr}.md").read_text()


def test_a_text_names_each_file(pr: str, checkout: Path) -> None:
    assert export(checkout, pr) == 0
    commit(checkout)
    text = (TEXTS / f"{pr}.md").read_text()
    for path in git(checkout, "diff", "--name-only", "HEAD~").split():
        assert Path(path).name in text, path


def test_its_reproduction_prints_what_it_shows(run_python: Callable[..., str]) -> None:
    text = (TEXTS / "flashinfer.md").read_text()
    _, code, shown, *_ = re.split(r"```(?:python)?\n", text.replace("\n```\n\n", "\n"))
    assert len([line for line in code.splitlines() if line]) <= 10
    right = code.replace("mutates_args=[]", 'mutates_args=["logits"]')
    for program, printed in (
        (code, shown.splitlines()[0]),
        (right, "tensor([1., 1.]) tensor([1., 1.])"),
    ):
        # torch's cache of compiled graphs does not tell the two ops apart: one name.
        said = run_python(program, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
        assert said.splitlines()[-1] == printed
