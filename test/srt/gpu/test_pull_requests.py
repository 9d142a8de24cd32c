"""The pull requests on a real GPU: their own tests, and the bits of what this project runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from environments import copy_sglang

import sglang
from sglang.srt.layers.moe_router import cluster_router_gemm
from sglang.srt.layers.moe_router.kernel import Target

pytest.importorskip("libcst", reason="the export needs it")

from sglang_router_gemm.export import run as export
from sglang_router_gemm.pull_requests.gate import taken

pytestmark = pytest.mark.gpu

# fp32 edits what gate has written.
ORDER = ("gate", "fp32", "routing")
NUM_TOKENS = (1, 7, 8, 9, 16, 17, 32, 64, 128)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The installed SGLang as an unpacked sdist, with the pull requests for SM 90."""
    folder = tmp_path_factory.mktemp("exported")
    copy_sglang(folder / "python")
    for name in ORDER:
        assert export(folder, name) == 0
    yield folder
    shutil.rmtree(folder)


def run_there(checkout: Path, *arguments: str) -> str:
    """Runs Python with the SGLang of a checkout, and without this project."""
    installed = str(Path(*sglang.__path__).parent)
    path = os.pathsep.join([str(checkout / "python"), installed])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "SGLANG_PLUGINS": "none"},
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.parametrize("file", ["gemm/test_cluster_router_gemm.py", "moe/test_moe_route_warp.py"])
def test_their_registered_tests_pass(file: str, exported: Path) -> None:
    test = f"test/registered/kernels/ops/{file}"
    # A worker each: what takes long is nvcc, once a shape.
    options = ("-q", "-n", "8", "-p", "no:cacheprovider")
    said = run_there(exported, "-m", "pytest", *options, test)
    last = said.splitlines()[-1]
    assert " passed" in last, said[-2000:]
    assert "skipped" not in last, said[-2000:]


THEIRS = """
import sys
from types import SimpleNamespace
import torch
from sglang.kernels.ops.gemm.cluster_router_gemm import NUM_TOKENS, cluster_router_gemm
from sglang.srt.models import deepseek_v2

given, result = sys.argv[1:]
operands = torch.load(given)
assert set(operands["of"]) == set(NUM_TOKENS), "other gates"

def logits(of, shape):
    hidden_states, weight = (each.cuda() for each in operands["of"][shape])
    return [of(hidden_states[:m], weight).cpu() for m in operands["num_tokens"]]

execution = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
deepseek_v2.get_exec = lambda: execution
config = SimpleNamespace(n_routed_experts=256, hidden_size=7168, topk_method="greedy")
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"), torch.no_grad():
    gate = deepseek_v2.MoEGate(config, quant_config=None)

@torch.no_grad()
def by_gate(hidden_states, weight):
    gate.weight.data.copy_(weight)
    return gate(hidden_states)

found = {shape: logits(cluster_router_gemm, shape) for shape in NUM_TOKENS}
deepseek_v3 = (256, 7168, torch.bfloat16)
torch.save({"op": found, "gate": logits(by_gate, deepseek_v3)}, result)
"""


def test_op_and_gate_have_the_bits_of_this_projects(exported: Path, tmp_path: Path) -> None:
    dtypes = torch.bfloat16, torch.float32
    gates = [(*shape, dtype) for dtype in dtypes for shape in taken(dtype)]
    generator = torch.Generator().manual_seed(0)
    operands = {
        gate: (
            torch.randn(NUM_TOKENS[-1], gate[1], generator=generator).bfloat16(),
            torch.randn(*gate[:2], generator=generator).to(gate[2]),
        )
        for gate in gates
    }
    given, result = tmp_path / "operands.pt", tmp_path / "logits.pt"
    torch.save({"of": operands, "num_tokens": NUM_TOKENS}, given)
    run_there(exported, "-c", THEIRS, str(given), str(result))
    theirs = torch.load(result)
    device = torch.device("cuda", torch.cuda.current_device())
    for gate, (hidden_states, weight) in operands.items():
        run, _ = cluster_router_gemm.load(Target(device, 90, *gate))
        for num_tokens, found in zip(NUM_TOKENS, theirs["op"][gate], strict=True):
            ours = torch.empty(num_tokens, gate[0], device=device)
            run(hidden_states[:num_tokens].to(device), weight.to(device), ours, True)
            assert torch.equal(ours.cpu(), found), (gate, num_tokens)
    of_deepseek = theirs["op"][256, 7168, torch.bfloat16]
    assert all(map(torch.equal, theirs["gate"], of_deepseek))
