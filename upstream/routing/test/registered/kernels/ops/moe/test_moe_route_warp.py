"""The top-k by a warp a token against what select_experts runs without it, bit for bit."""

import sys
from types import SimpleNamespace
from typing import Any, Callable
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from sglang.kernels.ops.moe.moe_route_warp import (
    MAX_NUM_TOKENS,
    ROUTINGS,
    moe_route_warp,
)
from sglang.srt.configs.shared_experts import SharedExpertsConfig
from sglang.srt.layers.moe import topk
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=180, stage="base-b-kernel-unit", runner_config="1-gpu-large")

Routing = tuple[int, int, int, int]
DEEPSEEK: Routing = (256, 8, 4, 8)
# Triton's sum of the scores has the kernel's order from 3.8 on.
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="SM90 required",
)


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cuda"))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator)


def config(routing: Routing = DEEPSEEK, num_shared: int = 0, **fields: Any) -> Any:
    num_experts, num_groups, top_groups, top_k = routing
    usual: dict[str, Any] = dict(
        top_k=top_k + num_shared,
        use_grouped_topk=True,
        num_expert_group=num_groups,
        topk_group=top_groups,
        shared_experts=SharedExpertsConfig(num_fused_shared_experts=num_shared),
        correction_bias=draw(num_experts, seed=1) / 10,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
    )
    return topk.TopKConfig(**usual | fields)


def select(logits: torch.Tensor, asked: Any, **arguments: Any) -> Any:
    """Weights and ids, and whether this kernel gave them."""
    tokens = torch.zeros(len(logits), 8, dtype=torch.bfloat16, device="cuda")
    with patch.object(topk, "moe_route_warp", wraps=moe_route_warp) as called:
        output = topk.select_experts(tokens, logits, asked, **arguments)
    return output.topk_weights, output.topk_ids, called.call_count == 1


def select_without(logits: torch.Tensor, asked: Any, **arguments: Any) -> Any:
    with patch.object(topk, "_takes_warp_routing", return_value=False):
        return select(logits, asked, **arguments)


def assert_same(found: Any, expected: Any, exact: bool) -> None:
    assert found[2] and not expected[2]
    assert found[1].dtype == torch.int32 and torch.equal(found[1], expected[1])
    bits = [each[0].contiguous().view(torch.int32).long() for each in (found, expected)]
    # Not exact: eight sums in another order, by the same rounding; 4 units were seen.
    assert ((bits[0] - bits[1]).abs() <= (0 if exact else 8)).all()


def rows(num_experts: int) -> torch.Tensor:
    """Usual logits, far ones, ties, and what is not a number."""
    usual, odd = draw(4096, num_experts), draw(512, num_experts, seed=2)
    odd[::2, ::17], odd[1::2, ::13], odd[1::4, ::19] = torch.nan, torch.inf, -torch.inf
    wide, ties = usual[:1024] * 20, (usual[:1024] * 2).round() / 2
    low, equal = usual[:512] * 2 - 17, torch.zeros_like(usual[:128])
    return torch.cat([usual, wide, ties, low, equal, odd])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_bits_of_what_runs_without_it(
    routing: Routing, num_shared: int, scaled: bool
) -> None:
    fields = {"apply_routed_scaling_factor_on_output": scaled}
    asked = config(routing, num_shared, **fields)
    for logits in rows(routing[0]).split(MAX_NUM_TOKENS):
        expected = select_without(logits, asked)
        exact = routing[1] > 1 or TRITON >= (3, 8)
        assert_same(select(logits, asked), expected, exact)


def test_a_top_k_that_is_not_of_groups() -> None:
    asked = config((256, 1, 1, 8), use_grouped_topk=False)
    logits = rows(256)[:MAX_NUM_TOKENS]
    assert_same(select(logits, asked), select_without(logits, asked), TRITON >= (3, 8))


@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_a_token_does_not_depend_on_its_batch(routing: Routing) -> None:
    asked = config(routing, num_shared=1)
    logits = rows(routing[0])[:MAX_NUM_TOKENS]
    whole = select(logits, asked)
    for num_tokens in range(1, MAX_NUM_TOKENS):
        part = select(logits[:num_tokens], asked)
        assert torch.equal(part[0], whole[0][:num_tokens]), num_tokens
        assert torch.equal(part[1], whole[1][:num_tokens]), num_tokens


@pytest.mark.parametrize("num_shared", [0, 1])
def test_padded_rows(num_shared: int) -> None:
    asked, logits = config(num_shared=num_shared), draw(16, 256)
    num_tokens = torch.tensor(11, dtype=torch.int32, device="cuda")
    padded = {"num_token_non_padded": num_tokens}
    expected = select_without(logits, asked, **padded)
    assert_same(select(logits, asked, **padded), expected, exact=True)


def test_it_leaves_the_rest_alone() -> None:
    def takes_it(logits: torch.Tensor = draw(8, 256), **fields: Any) -> bool:
        return topk._takes_warp_routing(logits, config(**fields))

    assert takes_it()
    assert not takes_it(draw(MAX_NUM_TOKENS + 1, 256))
    assert not takes_it(draw(0, 256))
    assert not takes_it(draw(8, 256).bfloat16())
    assert not takes_it(draw(8, 512)[:, :256])
    assert not takes_it(correction_bias=draw(256).bfloat16())
    assert not takes_it(correction_bias=None)
    assert not takes_it(num_shared=2)
    assert not takes_it(top_k=6)
    assert not takes_it(topk_group=2)
    assert not takes_it(renormalize=False)
    assert not takes_it(use_grouped_topk=False, scoring_func="softmax")
    assert not takes_it(custom_routing_function=lambda **_: None)
    execution = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=True)
    )
    with patch.object(topk, "get_exec", lambda: execution):
        assert not takes_it()
    bias_a_token = draw(8, 256, seed=3) / 10
    assert not select(draw(8, 256), config(), dynamic_expert_bias=bias_a_token)[2]


OF_DEEPSEEK = {"num_groups": 8, "top_groups": 4, "top_k": 8}


@pytest.mark.parametrize(
    "spoil,said",
    [
        (lambda logits, bias: (logits.bfloat16(), bias), "Dtype value"),
        (lambda logits, bias: (logits, bias.bfloat16()), "Dtype value"),
        (lambda logits, bias: (logits, bias[:-32]), "Size mismatch"),
        (lambda logits, bias: (logits.t().contiguous().t(), bias), "not contiguous"),
        (lambda logits, bias: (logits.cpu(), bias), "Device mismatch"),
    ],
)
def test_what_it_does_not_take(spoil: Callable[..., Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        moe_route_warp(*spoil(draw(8, 256), draw(256)), **OF_DEEPSEEK)
    weights = moe_route_warp(draw(8, 256), draw(256), **OF_DEEPSEEK)[0]
    assert torch.allclose(weights.sum(dim=1), torch.ones(8, device="cuda"))


@triton.jit
def copy_after_trigger(source: tl.tensor, to: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Lets the next kernel start, and writes 5 us later."""
    tl.extra.cuda.gdc_launch_dependents()
    start = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - start < 5000:
        pass
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at))


def test_in_a_cuda_graph_behind_the_kernel_that_writes_its_logits() -> None:
    """Each link waits for the one before it, which PDL lets it overtake."""
    bias, sources = draw(256) / 10, [draw(16, 256, seed=i) for i in range(8)]
    expected = [moe_route_warp(each, bias, **OF_DEEPSEEK) for each in sources]
    logits = torch.empty_like(sources[0])
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def links() -> None:
        found.clear()
        for each in sources:
            copy_after_trigger[(each.numel() // 256,)](each, logits, BLOCK=256)
            found.append(moe_route_warp(logits, bias, **OF_DEEPSEEK))

    links()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        links()
    for _ in range(100):
        for weights, ids in found:
            weights.fill_(float("nan")), ids.fill_(-7)
        graph.replay()
        for one, other in zip(found, expected):
            assert all(map(torch.equal, one, other))


def test_under_torch_compile() -> None:
    bias = draw(256) / 10

    def doubled(logits: torch.Tensor) -> torch.Tensor:
        return moe_route_warp(logits, bias, **OF_DEEPSEEK)[0] * 2

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    for num_tokens in (4, 16, 100):
        logits = draw(num_tokens, 256)
        assert torch.equal(compiled(logits), doubled(logits))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
