"""The custom ops: schema, opcheck, torch.compile, and whose op runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import random_inputs, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from sglang.srt.layers.moe_router import ops
from sglang.srt.layers.moe_router.backends import BACKENDS

FLASHINFER_OP = torch.ops.sglang.flashinfer_dsv3_router_gemm_out.default
SGL_KERNEL_OP = torch.ops.sglang.sgl_kernel_dsv3_router_gemm.default
CLUSTER_OP = torch.ops.sglang.cluster_router_gemm.default


def test_schema() -> None:
    assert str(FLASHINFER_OP._schema) == (
        "sglang::flashinfer_dsv3_router_gemm_out("
        "Tensor(a0!) logits, Tensor hidden_states, Tensor weight) -> ()"
    )
    # 6 is fp32.
    returning = (
        "Tensor hidden_states, Tensor weight, Tensor? bias=None, ScalarType logits_dtype=6)"
        " -> Tensor"
    )
    assert str(SGL_KERNEL_OP._schema) == (f"sglang::sgl_kernel_dsv3_router_gemm({returning}")
    assert str(CLUSTER_OP._schema) == f"sglang::cluster_router_gemm({returning}"


@pytest.mark.parametrize("num_tokens", [1, 4, 17])
def test_opcheck(num_tokens: int) -> None:
    inputs = random_inputs(num_tokens)
    torch.library.opcheck(FLASHINFER_OP, (torch.empty(num_tokens, 256), *inputs))
    torch.library.opcheck(SGL_KERNEL_OP, inputs)
    torch.library.opcheck(CLUSTER_OP, inputs)


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 100])
def test_ops_are_total_over_m(num_tokens: int) -> None:
    hidden_states, weight = random_inputs(num_tokens)
    logits = torch.full((num_tokens, 256), torch.nan)
    ops.flashinfer_dsv3_router_gemm(logits, hidden_states, weight)
    again = ops.router_gemm(BACKENDS["sgl_kernel"], hidden_states, weight)
    ours = ops.cluster_router_gemm(hidden_states, weight)
    assert logits.shape == again.shape == ours.shape == (num_tokens, 256)
    if num_tokens:
        assert relative_error(logits, hidden_states, weight) < 1e-6
        assert relative_error(again, hidden_states, weight) < 1e-6
        assert relative_error(ours, hidden_states, weight) < 1e-6


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (torch.empty(3, 256), r"logits has shape \[3, 256\], must be \[2, 256\]"),
        (torch.empty(2, 256).bfloat16(), "logits is torch.bfloat16, must be torch.float32"),
        (torch.empty(256, 2).t(), r"logits has strides \(1, 2\), must be contiguous"),
        (torch.empty(2, 256, device="meta"), "logits is on meta, must be on cpu"),
    ],
)
def test_bad_logits_are_named(logits: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops._check_logits(logits, *random_inputs(2))


@pytest.mark.parametrize(
    ("hidden_states", "weight", "said"),
    [
        (torch.empty(512), None, r"hidden_states has shape \[512\], must be a matrix"),
        (None, torch.empty(1, 16, 512).bfloat16(), r"weight has shape \[1, 16, 512\], must be a m"),
        (
            torch.empty(2, 512).double(),
            None,
            "hidden_states is torch.float64, must be torch.bfloat",
        ),
        (None, torch.empty(16, 512).int(), "weight is torch.int32, must be torch.bfloat16"),
        (None, torch.empty(16, 512).half(), "weight is torch.float16, must be torch.bfloat16"),
        (
            None,
            torch.empty(16, 511).bfloat16(),
            r"weight has shape \[16, 511\], must be \[N, 512\]",
        ),
        (
            None,
            torch.empty(16, 512, dtype=torch.bfloat16, device="meta"),
            "weight is on meta, must be on cpu",
        ),
    ],
)
def test_bad_operands_of_cluster_are_named(
    hidden_states: torch.Tensor | None, weight: torch.Tensor | None, said: str
) -> None:
    right = random_inputs(2, num_experts=16, hidden_size=512)
    hidden_states = right[0] if hidden_states is None else hidden_states
    weight = right[1] if weight is None else weight
    with pytest.raises(ValueError, match=said):
        ops._compute(BACKENDS["cluster"], hidden_states, weight)


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (torch.empty(1, 16).bfloat16(), r"bias has shape \[1, 16\], must be \[16\]"),
        (torch.empty(16).int(), "bias is torch.int32, must be torch.bfloat16"),
        (torch.empty(16, dtype=torch.bfloat16, device="meta"), "bias is on meta, must be on cpu"),
    ],
)
def test_a_bad_bias_is_named(bias: torch.Tensor, said: str) -> None:
    operands = random_inputs(2, num_experts=16, hidden_size=512)
    with pytest.raises(ValueError, match=said):
        ops._compute(BACKENDS["cluster"], *operands, bias)


def test_cluster_compiles_with_a_dynamic_m() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda hidden_states, weight: ops.cluster_router_gemm(hidden_states, weight) * 1,
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for num_tokens in (2, 16, 17, 128, 300):
        hidden_states, weight = random_inputs(num_tokens)
        logits = compiled(hidden_states, weight)
        assert relative_error(logits, hidden_states, weight) < 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_logits_are_written(backend: str) -> None:
    """With an undeclared mutation the compiler may return the NaN it was given."""

    def route(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.full((hidden_states.shape[0], 256), torch.nan)
        ops.flashinfer_dsv3_router_gemm(logits, hidden_states, weight)
        return logits * 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(route, fullgraph=True, backend=counter)
    for num_tokens in (1, 2, 16, 17, 64):
        hidden_states, weight = random_inputs(num_tokens)
        logits = compiled(hidden_states, weight)
        assert relative_error(logits, hidden_states, weight) < 1e-6
    assert counter.frame_count <= 2


# SGLang 0.5.11 to 0.5.14 register an op of this name on import of `deepseek_v2`, with SGLang's
# own `register_custom_op` and a schema that declares no mutation. This does the same.
THEIRS = """
from sglang.srt.utils.custom_op import register_custom_op

@register_custom_op(
    op_name="flashinfer_dsv3_router_gemm",
    mutates_args=[],
    fake_impl=lambda logits, hidden_states, weight: None,
)
def theirs(
    logits: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor
) -> None:
    raise SystemExit("the op of SGLang ran")
"""

OURS = "from sglang.srt.layers.moe_router.ops import flashinfer_dsv3_router_gemm as ours\n"

RUN = """
def route(hidden_states, weight):
    logits = torch.full((hidden_states.shape[0], 256), torch.nan)
    ours(logits, hidden_states, weight)
    return logits * 1

hidden_states, weight = torch.randn(4, 7168).bfloat16(), torch.randn(256, 7168).bfloat16()
expected = hidden_states.double() @ weight.double().t()
for function in (route, torch.compile(route, fullgraph=True, backend="aot_eager")):
    error = torch.dist(function(hidden_states, weight).double(), expected) / expected.norm()
    assert error < 1e-6, error
print(torch.ops.sglang.flashinfer_dsv3_router_gemm.default._schema)
"""


@pytest.mark.parametrize("first", [OURS, THEIRS])
def test_sglangs_op_of_that_name_and_ours_do_not_meet(
    first: str, fork_python: Callable[..., str]
) -> None:
    """A graph that torch has cached for theirs must not be taken for ours: two names."""
    second = THEIRS if first == OURS else OURS
    printed = fork_python("import torch\n" + first + second + RUN)
    assert "Tensor(a0!)" not in printed


def test_the_matmul_does_not_round_under_autocast() -> None:
    hidden_states, weight = random_inputs(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = ops.router_gemm(BACKENDS["torch"], hidden_states, weight)
    assert logits.dtype == torch.float32
    assert relative_error(logits, hidden_states, weight) < 1e-6
