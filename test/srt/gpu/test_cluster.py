"""The cluster kernel on a real GPU: numbers, bits, arguments, graphs, compile, sanitizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_inputs, relative_error
from on_gpu import (
    SM,
    assert_sanitized,
    build_program,
    each_target,
    gate_with,
    random_bias,
    run_of,
)
from torch._dynamo.testing import CompileCounterWithBackend

from sglang.srt.layers.moe_router import cluster_router_gemm as cluster
from sglang.srt.layers.moe_router import jit
from sglang.srt.layers.moe_router.kernel import Target
from sglang.srt.layers.moe_router.ops import cluster_router_gemm
from sglang.srt.models.deepseek_v2_gate import router_logits
from sglang_router_gemm.check import deepseek_v2_gate, sglang_gate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cluster_backend")]

MAX_RELATIVE_ERROR = 1e-6
# cuBLAS, which serves more tokens: 3.8e-6 on an H100 with torch 2.11 (2026-11-25).
MAX_RELATIVE_ERROR_CUBLAS = 1e-5
# DeepSeek-V3, Kimi-K2, Mistral Large 3, GLM-5, DeepSeek-V2, and the ends of the rule.
SHAPES = [(256, 7168), (384, 7168), (128, 7168), (256, 6144), (160, 5120)]
SHAPES += [(16, 512), (48, 1536), (256, 3584), (512, 8192)]
# Where the last warps have no chunk of K: gpt-oss, Kimi-Linear, and as few as can be.
SHAPES += [(128, 2880), (256, 2304), (128, 1088), (32, 64)]
WEIGHTS = [(*shape, torch.bfloat16) for shape in SHAPES]
# GLM-4.5, GLM-4.5-Air, MiniMax-M2, GLM-4.7-Flash, Hy4, LongCat-Flash, and the ends of the rule: the
# most that a CTA holds, with wide tiles for every M and with narrow ones for few.
FP32_SHAPES = [(160, 5120), (128, 4096), (256, 3072), (64, 2048), (256, 2816), (768, 6144)]
FP32_SHAPES += [(512, 8192), (1024, 8192)]
WEIGHTS += [(*shape, torch.float32) for shape in FP32_SHAPES]
NUM_TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 128)

CSRC = Path(__file__).parent / "csrc"


@pytest.fixture
def cluster_backend(monkeypatch: pytest.MonkeyPatch, publish_server_args: object) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "cluster")


def _poisoned(num_tokens: int, num_experts: int = 256) -> torch.Tensor:
    return torch.full((num_tokens, num_experts), torch.nan, device="cuda")


def _run(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    pdl: bool = False,
) -> torch.Tensor:
    logits = _poisoned(len(hidden_states), len(weight)).to(logits_dtype)
    num_experts, hidden_size = weight.shape
    options = weight.dtype, logits_dtype, bias is not None
    run = run_of("cluster", num_experts, hidden_size, *options)
    return run(hidden_states, weight, logits, pdl, bias)


@pytest.mark.parametrize(("num_experts", "hidden_size", "dtype"), WEIGHTS)
def test_numbers_and_bits_of_a_row(num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Every M is right, and a row has the bits that it has in a batch of 128, PDL or not."""
    for scale in (1.0, 2.0**-20):
        hidden_states, weight = random_inputs(128, "cuda", num_experts, hidden_size, dtype)
        hidden_states *= scale
        all_rows = _run(hidden_states, weight)
        for num_tokens in NUM_TOKENS:
            for pdl in (True, False):
                logits = _run(hidden_states[:num_tokens], weight, pdl=pdl)
                error = relative_error(logits, hidden_states[:num_tokens], weight)
                assert error < MAX_RELATIVE_ERROR, (num_tokens, pdl)
                assert torch.equal(logits, all_rows[:num_tokens]), (num_tokens, pdl)


# gpt-oss, Qwen3-235B, Qwen3-Next, Kimi-Linear, and Ling's fp32 weights.
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "hidden_size", "dtype"),
    [
        (128, 2880, torch.bfloat16),
        (128, 4096, torch.bfloat16),
        (512, 2048, torch.bfloat16),
        (256, 2304, torch.bfloat16),
        (256, 2048, torch.float32),
    ],
)
def test_bf16_logits_are_the_sum_rounded_once(
    num_experts: int, hidden_size: int, dtype: torch.dtype, has_bias: bool
) -> None:
    hidden_states, weight = random_inputs(128, "cuda", num_experts, hidden_size, dtype)
    bias = torch.randn(num_experts, device="cuda", dtype=torch.bfloat16) if has_bias else None
    expected = _run(hidden_states, weight)
    if bias is not None:
        expected = expected + bias.float()
    expected = expected.bfloat16()
    for num_tokens in NUM_TOKENS:
        for pdl in (True, False):
            logits = _run(hidden_states[:num_tokens], weight, bias, torch.bfloat16, pdl)
            assert torch.equal(logits, expected[:num_tokens]), (num_tokens, pdl)


def test_a_bias_of_the_wrong_kind_is_named() -> None:
    hidden_states, weight = random_inputs(4, "cuda", 128, 2880)
    logits = _poisoned(4, 128).bfloat16()
    with_bias = jit.load(cluster.spec(128, 2880, SM, logits_dtype=torch.bfloat16, bias=True))
    bias = torch.randn(128, device="cuda", dtype=torch.bfloat16)
    for wrong in (None, bias.float(), bias[:64], bias.cpu(), bias[None]):
        with pytest.raises(ValueError, match=r"^bias must be "):
            with_bias.run(hidden_states, weight, logits, False, wrong)
    without = jit.load(cluster.spec(128, 2880, SM, logits_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"^bias must be None"):
        without.run(hidden_states, weight, logits, False, bias)
    with pytest.raises(ValueError, match=r"^logits must be bfloat16"):
        without.run(hidden_states, weight, logits.float(), False, None)
    torch.cuda.synchronize()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_fp32_weights_of_any_scale(scale: float) -> None:
    """Down to 2^-110 all three terms are there."""
    hidden_states, weight = random_inputs(64, "cuda", 160, 5120, torch.float32)
    weight *= scale
    for num_tokens in (1, 8, 16, 64):
        logits = _run(hidden_states[:num_tokens], weight)
        assert relative_error(logits, hidden_states[:num_tokens], weight) < MAX_RELATIVE_ERROR


def test_bits_do_not_depend_on_the_other_rows_nor_on_the_place() -> None:
    run_of("cluster")
    hidden_states, weight = random_inputs(128, "cuda")
    row = hidden_states[:1].clone()
    alone = _run(row, weight)
    for place in (0, 1, 7, 8, 15, 16, 31, 32, 77, 127):
        others = torch.randn_like(hidden_states) * 100
        others[place] = row[0]
        assert torch.equal(_run(others, weight)[place], alone[0]), place


def test_run_after_run_the_same_bits() -> None:
    run_of("cluster")
    for num_tokens in (1, 8, 16, 64):
        hidden_states, weight = random_inputs(num_tokens, "cuda")
        first = _run(hidden_states, weight)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            different += (_run(hidden_states, weight, pdl=True) != first).sum()
        assert int(different) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("num_tokens", [1, 8, 13, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_inf_come_out_where_the_reference_has_them(
    value: float, num_tokens: int, dtype: torch.dtype
) -> None:
    hidden_states, weight = random_inputs(num_tokens, "cuda", 160, 5120, dtype)
    hidden_states[num_tokens // 2, 4321] = value
    weight[77, 1234] = value
    logits, expected = _run(hidden_states, weight), hidden_states.float() @ weight.float().t()
    assert torch.equal(logits.isnan(), expected.isnan())
    assert torch.equal(logits.isposinf(), expected.isposinf())
    assert torch.equal(logits.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    torch.testing.assert_close(logits[finite], expected[finite], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("row_step", [1, 2])
def test_no_tokens(row_step: int) -> None:
    """None of a matrix with gaps between its rows is contiguous too."""
    run_of("cluster")
    hidden_states, weight = random_inputs(4, "cuda")
    logits = cluster_router_gemm(hidden_states[::row_step][:0], weight)
    assert logits.shape == (0, 256)
    assert logits.dtype == torch.float32


def test_auto_takes_it_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "auto")
    served = {256: range(1, 129), 384: range(1, 129), 128: range(4, 129), 64: range(0)}
    for num_experts, num_tokens_served in served.items():
        weight = torch.randn(num_experts, 7168, dtype=torch.bfloat16, device="cuda")
        gate = gate_with(weight)
        for num_tokens in (1, 3, 4, 16, 128, 129):
            hidden_states = random_inputs(num_tokens, "cuda")[0]
            with torch.no_grad():
                logits = router_logits(gate, hidden_states)
            taken = SM == 90 and num_tokens in num_tokens_served
            assert not taken or torch.equal(logits, _run(hidden_states, weight))
            assert SM != 90 or taken or logits is None


def test_what_the_kernel_does_not_take_goes_elsewhere() -> None:
    run_of("cluster")
    _, weight = random_inputs(1, "cuda")
    gate = gate_with(weight)
    padded = torch.randn(8, 7168 + 64, dtype=torch.bfloat16, device="cuda")[:, :7168]
    offset = torch.randn(8 * 7168 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(8, 7168)
    many = torch.randn(129, 7168, dtype=torch.bfloat16, device="cuda")
    for hidden_states in (padded, offset, many):
        with torch.no_grad():
            assert router_logits(gate, hidden_states) is None
        logits = cluster_router_gemm(hidden_states, weight)
        assert relative_error(logits, hidden_states, weight) < MAX_RELATIVE_ERROR_CUBLAS


def _bad_arguments() -> dict[str, tuple[str, Callable[[], tuple[torch.Tensor, ...]]]]:
    def call(
        hidden_states: Callable[[torch.Tensor], torch.Tensor] = lambda each: each,
        weight: Callable[[torch.Tensor], torch.Tensor] = lambda each: each,
        logits: Callable[[torch.Tensor], torch.Tensor] = lambda each: each,
    ) -> Callable[[], tuple[torch.Tensor, ...]]:
        def make() -> tuple[torch.Tensor, ...]:
            tokens, weights = random_inputs(4, "cuda")
            return hidden_states(tokens), weight(weights), logits(_poisoned(4))

        return make

    return {
        "half": ("hidden_states", call(hidden_states=lambda each: each.half())),
        "fp32 weight": ("weight", call(weight=lambda each: each.float())),
        "bf16 logits": ("logits", call(logits=lambda each: each.bfloat16())),
        "on the CPU": ("hidden_states", call(hidden_states=lambda each: each.cpu())),
        "weight on the CPU": ("weight", call(weight=lambda each: each.cpu())),
        "a vector": ("hidden_states", call(hidden_states=lambda each: each[0])),
        "strided": ("hidden_states", call(hidden_states=lambda each: each[::2])),
        "transposed": ("weight", call(weight=lambda each: each.t().contiguous().t())),
        "unaligned": (
            "hidden_states",
            call(
                hidden_states=lambda each: torch.cat([each.view(-1), each[0]])[
                    1 : 4 * 7168 + 1
                ].view(4, 7168)
            ),
        ),
        "another K": ("hidden_states", call(hidden_states=lambda each: each[:, :512].contiguous())),
        "another N": ("weight", call(weight=lambda each: each[:128].contiguous())),
        "logits of another M": ("logits", call(logits=lambda each: each[:3].contiguous())),
        "too many tokens": (
            "num_tokens",
            call(
                hidden_states=lambda each: each.repeat(33, 1),
                logits=lambda each: each.repeat(33, 1),
            ),
        ),
    }


@pytest.mark.parametrize("what", _bad_arguments())
def test_a_bad_argument_is_an_exception_that_names_it(what: str) -> None:
    argument, make = _bad_arguments()[what]
    hidden_states, weight, logits = make()
    module = jit.load(cluster.spec(256, 7168, SM))
    with pytest.raises(ValueError, match=f"^{argument} "):
        module.run(hidden_states, weight, logits, False, None)
    torch.cuda.synchronize()


@each_target
def test_opcheck(target: Target) -> None:
    run_of("cluster", *target.gate)
    options = random_bias(target), target.logits_dtype
    for num_tokens in (1, 16, 17, 128, 129):
        torch.library.opcheck(
            torch.ops.sglang.cluster_router_gemm.default,
            (*random_inputs(num_tokens, "cuda", *target.gate[:3]), *options),
        )


@pytest.mark.parametrize("build", [sglang_gate, deepseek_v2_gate])
def test_torch_compile_serves_every_m_in_one_graph(
    build: Callable[[torch.device], torch.nn.Module],
) -> None:
    gate = build(torch.device("cuda"))
    run_of("cluster")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(gate, fullgraph=True, backend=counter)
    with torch.no_grad():
        for num_tokens in (1, 2, 5, 16, 17, 128, 129, 300):
            hidden_states, _ = random_inputs(num_tokens, "cuda")
            logits = compiled(hidden_states)
            if num_tokens <= 128:
                assert torch.equal(logits, _run(hidden_states, gate.weight))
            assert relative_error(logits, hidden_states, gate.weight) < MAX_RELATIVE_ERROR_CUBLAS
    assert counter.frame_count <= 2


@pytest.mark.parametrize("pdl", ["0", "1"])
def test_graph_and_eager_give_the_same_bits(pdl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", pdl)
    run_of("cluster")
    for num_tokens in (1, 8, 16, 48, 128):
        hidden_states, weight = random_inputs(num_tokens, "cuda")
        cluster_router_gemm(hidden_states, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = cluster_router_gemm(hidden_states, weight)
        for _ in range(200):
            hidden_states.normal_()
            logits.fill_(torch.nan)
            graph.replay()
            assert torch.equal(logits, _run(hidden_states, weight))


@each_target
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_a_weight_written_just_before_is_seen(
    target: Target, num_tokens: int, captured: bool
) -> None:
    """An online weight update right ahead of the gate, with PDL, eager and in one graph."""
    run_of("cluster", *target.gate)
    hidden_states, weight = random_inputs(num_tokens, "cuda", *target.gate[:3])
    # A bias is in the row behind its weight: one kernel, the last before the gate, writes both.
    written = torch.cat([weight, weight[:1]])
    sources = [torch.randn_like(written) for _ in range(2)]

    def parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = rows[-1, : target.num_experts] if target.bias else None
        return rows[:-1], bias

    expected = [_run(hidden_states, *parts(source), target.logits_dtype) for source in sources]
    chosen = torch.empty_like(written)

    def update_and_call() -> torch.Tensor:
        torch.add(chosen, 0, out=written)  # a kernel, not a memcpy
        return cluster_router_gemm(hidden_states, *parts(written), target.logits_dtype)

    graph = torch.cuda.CUDAGraph()
    update_and_call()
    with torch.cuda.graph(graph):
        replayed = update_and_call()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for step in range(2000):
        chosen.copy_(sources[step % 2])
        if captured:
            graph.replay()
        logits = replayed if captured else update_and_call()
        wrong += (logits != expected[step % 2]).sum()
    assert int(wrong) == 0


# ---- compute-sanitizer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("sanitizer") / "sanitize_cluster"
    return build_program(CSRC / "sanitize_cluster.cu", cluster.SOURCE.parent, program)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool: str, sanitized_program: Path) -> None:
    assert_sanitized(tool, sanitized_program)
