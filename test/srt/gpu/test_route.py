"""The routing on a real GPU: SGLang's bits and plan, the hooked seams, graphs, PDL, sanitizer."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import operands  # noqa: F401  loads the profile of the fuzz tests
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import SM, assert_sanitized, build_program

from gpu.test_pdl import PRODUCER_CYCLES, _chain_module
from sglang.srt.layers.moe_router import cluster_route, jit
from sglang.srt.layers.moe_router.cluster_route import (
    BLOCK_SIZES,
    ExpertPlan,
    Kernel,
    Routing,
    Variant,
)
from sglang.srt.layers.moe_router.route import Asked, OwnSelect, make_route_plan
from sglang_router_gemm import hooks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cluster_backend")]

DEEPSEEK = Routing(256, 8, 4, 8, 0, renormalize=True)
DEEPSEEK_SHARED = DEEPSEEK._replace(num_shared=1)
KIMI = Routing(384, 1, 1, 8, 0, renormalize=True)
GLM = Routing(256, 1, 1, 8, 0, renormalize=True)
GLM_SHARED = GLM._replace(num_shared=1)
SMALL = Routing(128, 4, 2, 6, 0, renormalize=True)
LARGE = Routing(512, 1, 1, 8, 0, renormalize=True)
GLM45_SHARED = Routing(160, 1, 1, 8, 1, renormalize=True)
GLM45_AIR = Routing(128, 1, 1, 8, 0, renormalize=True)
V2 = Routing(160, 1, 1, 6, 0, renormalize=True)
# SGLang serves it with another arithmetic: N is not a power of two.
ODD = Routing(96, 4, 2, 6, 1, renormalize=True)

CHUNK = 1 << 17  # rows that are drawn together
USUAL_CHUNKS = {
    DEEPSEEK: 8,
    DEEPSEEK_SHARED: 8,
    KIMI: 2,
    GLM: 2,
    GLM_SHARED: 2,
    GLM45_SHARED: 2,
    GLM45_AIR: 2,
}
NUM_TOKENS = range(1, 129)
SCALE = 2.5
REPLAYS, CALLS = 10_000, 2000
CASES = 5000
LAYERS = 16
POISON = -7

Answer = tuple[torch.Tensor, torch.Tensor, ExpertPlan | None]
"""Weights, ids and the plan, of one call."""


@pytest.fixture
def cluster_backend(monkeypatch: pytest.MonkeyPatch, publish_server_args: object) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "cluster")


# ---- Ours and SGLang's -------------------------------------------------------------------------


def _topk() -> Any:
    """SGLang's module; some of what it has differs between releases."""
    return importlib.import_module(hooks.TOPK)


def _own(module: str, name: str) -> Any:
    """SGLang's function, without our hook, which another test of this process may have set."""
    return inspect.unwrap(getattr(importlib.import_module(module), name))


def _own_select() -> OwnSelect:
    select: OwnSelect = _own(hooks.TOPK, "select_experts")
    return select


def _own_align(ids: torch.Tensor, block_size: int, num_experts: int) -> tuple[torch.Tensor, ...]:
    align: Callable[..., tuple[torch.Tensor, ...]] = _own(hooks.ALIGN, "moe_align_block_size")
    return align(ids, block_size, num_experts)


def _config(routing: Routing, bias: torch.Tensor, scale: float, applied: bool) -> Any:
    """SGLang's `TopKConfig`."""
    topk = _topk()
    shared: dict[str, Any] = {"num_fused_shared_experts": routing.num_shared}
    if "shared_experts" in {each.name for each in dataclasses.fields(topk.TopKConfig)}:
        shared = {"shared_experts": topk.SharedExpertsConfig(**shared)}
    return topk.TopKConfig(
        top_k=routing.num_columns,
        use_grouped_topk=True,
        num_expert_group=routing.num_groups,
        topk_group=routing.top_groups,
        renormalize=routing.renormalize,
        correction_bias=bias,
        routed_scaling_factor=scale,
        apply_routed_scaling_factor_on_output=applied,
        scoring_func="sigmoid",
        **shared,
    )


class Pair(NamedTuple):
    """Our kernel and SGLang's function, for one routing and scale."""

    kernel: Kernel
    variant: Variant
    asked: Asked

    @property
    def routing(self) -> Routing:
        return self.kernel.routing

    @property
    def num_experts(self) -> int:
        """The shared one counts."""
        return self.routing.num_experts + self.routing.num_shared

    def ours(
        self, logits: torch.Tensor, bias: torch.Tensor, block_size: int = 0, pdl: bool = True
    ) -> Answer:
        return self.kernel(
            logits,
            bias,
            self.variant,
            self.asked.scale_here,
            self.asked.shared_weight(self.variant),
            pdl,
            block_size,
        )

    def theirs(self, logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing, asked = self.routing, self.asked
        topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _own(
            hooks.TOPK, "biased_grouped_topk_gpu"
        )
        return topk(
            logits,  # in the hidden states' place, which only say M
            logits,
            bias,
            routing.num_columns,
            routing.renormalize,
            routing.num_groups,
            routing.top_groups,
            routing.num_shared,
            asked.scale,
            asked.scales_here,
        )


def _pair(routing: Routing, scale: float = SCALE, applied: bool = False) -> Pair:
    """As a layer's load leaves it, which finds the variant."""
    if routing.uses_triton and routing.num_shared and not hasattr(_topk(), "SharedExpertsConfig"):
        pytest.skip("before 0.5.23 SGLang's Triton router divides twice for the shared weight")
    bias = torch.zeros(routing.num_experts, device="cuda")
    plan = make_route_plan(_config(routing, bias, scale, applied), _own_select())
    assert plan is not None
    assert plan.reason is None, plan.reason
    assert plan.kernel is not None
    assert plan.variant is not None
    return Pair(plan.kernel, plan.variant, plan.asked)


def _name(value: object) -> str | None:
    return "_".join(str(int(each)) for each in value) if isinstance(value, Routing) else None


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def _wrong_rows(found: Answer, expected: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """The first few rows whose ids or weights are not those, to the bit."""
    assert found[0].shape == expected[0].shape
    assert found[1].dtype == expected[1].dtype == torch.int32
    differs = (_bits(found[0]) != _bits(expected[0])) | (found[1] != expected[1])
    return differs.any(dim=1).nonzero().flatten()[:5].tolist()


def _canonical(plan: tuple[torch.Tensor, ...], block_size: int, length: int) -> torch.Tensor:
    """Expert and place together, of each place that is used; the others are equal."""
    sorted_ids, expert_ids, num_padded = plan
    index = torch.arange(length, device=sorted_ids.device)
    # Of masked tokens SGLang says -1.
    keys = ((expert_ids[index // block_size].long() + 1) << 32) + sorted_ids[:length]
    return keys.masked_fill(index >= num_padded, torch.iinfo(torch.int64).max)


def _plan_mistakes(
    found: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    block_size: int,
    ours: bool = True,
) -> torch.Tensor:
    """How many places of a plan are not as in SGLang's, int64 `[]`.

    SGLang's has the tokens of an expert in whatever order its atomics give, ours ascending.
    """
    # SGLang < 0.5.23 does not round its length up to four.
    length = min(found[0].numel(), expected[0].numel())
    keys = _canonical(found, block_size, length)
    if not ours:
        keys = keys.sort().values
    wrong = (keys != _canonical(expected, block_size, length).sort().values).sum()
    return wrong + (found[2] != expected[2]).sum()


def _mistakes(found: Answer, expected: Answer, block_size: int) -> torch.Tensor:
    """How many numbers of one call of ours are not those of another, int64 `[]`."""
    wrong = (_bits(found[0]) != _bits(expected[0])).sum() + (found[1] != expected[1]).sum()
    if found[2] is None or expected[2] is None:
        assert found[2] is expected[2]
        return wrong
    sorted_ids, expert_ids, num_padded = expected[2]
    used = torch.arange(sorted_ids.numel(), device=sorted_ids.device) < num_padded
    wrong += (found[2].num_tokens_post_padded != num_padded).sum()
    wrong += ((found[2].sorted_token_ids != sorted_ids) & used).sum()
    return wrong + ((found[2].expert_ids != expert_ids) & used[::block_size]).sum()


def _poison(answer: Answer) -> None:
    for tensor in (answer[0], answer[1], *(answer[2] or ())):
        tensor.fill_(POISON)


# ---- Bits --------------------------------------------------------------------------------------


def _cases(num_experts: int, num_chunks: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Named fp32 logits `[rows, N]` and biases `[N]`: `num_chunks` usual ones, and all odd ones."""

    def draw(rows: int = 4096) -> torch.Tensor:
        return torch.randn(rows, num_experts, device="cuda")

    def some(share: float) -> torch.Tensor:
        return torch.rand(4096, num_experts, device="cuda") < share

    bias = draw(1)[0] / 10
    none = torch.zeros_like(bias)
    for _ in range(num_chunks):
        yield "usual", draw(CHUNK), bias
    rough = (draw() * 2).round() / 2
    yield "a bias as models have it", draw() / 2, bias / 5 + 5
    yield "wide", draw() * 20, bias
    yield "ties", rough, none
    yield "ties with a bias", rough, (bias * 20).round() / 4
    yield "ties within groups", draw()[:, ::2].repeat_interleave(2, dim=1), none
    yield "ties between groups", draw()[:, ::8].repeat(1, 8), none
    yield "all equal", torch.zeros(256, num_experts, device="cuda"), none
    yield "denormals", draw() * 1e-39, bias * 1e-39
    yield "scores that are denormals", draw() / 2 - 88, none
    yield "negative", draw() * 2 - 17, bias
    yield "very negative", draw() - 100, none
    yield "NaN", draw().masked_fill(some(0.01), torch.nan), bias
    yield (
        "infinite",
        draw().masked_fill(some(0.02), torch.inf).masked_fill(some(0.02), -torch.inf),
        bias,
    )
    forbidden, unknown = bias.clone(), bias.clone()
    forbidden[::3], unknown[5] = -torch.inf, torch.nan
    yield "experts that are forbidden", draw(), forbidden
    yield "a bias that is NaN", draw(), unknown
    yield "all NaN", torch.full((64, num_experts), torch.nan, device="cuda"), bias


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("routing", USUAL_CHUNKS, ids=_name)
def test_ids_and_weights_have_the_bits_of_sglangs_own(routing: Routing, applied: bool) -> None:
    """A million rows, by calls of every M, with a plan of every block size and without."""
    torch.manual_seed(1)
    pair = _pair(routing, applied=applied)
    # 128 and 5 have no common factor: they meet in every combination.
    calls = zip(itertools.cycle(NUM_TOKENS), itertools.cycle((0, *BLOCK_SIZES)), strict=False)
    num_rows = 0
    for name, logits, bias in _cases(routing.num_experts, USUAL_CHUNKS[routing]):
        weights, ids, rest = [], [], logits
        while len(rest):
            num_tokens, block_size = next(calls)
            found = pair.ours(rest[:num_tokens], bias, block_size)
            weights.append(found[0])
            ids.append(found[1])
            rest = rest[num_tokens:]
        whole = torch.cat(weights), torch.cat(ids), None
        assert _wrong_rows(whole, pair.theirs(logits, bias)) == [], name
        num_rows += len(logits)
    assert num_rows > (1_000_000 if routing.num_groups > 1 else 200_000)


@pytest.mark.parametrize("num_experts", [256, 288])
def test_a_top_k_that_is_not_of_groups_has_the_bits_of_sglangs_own(num_experts: int) -> None:
    """MiniMax-M2's and Step-3.5's, which SGLang 0.5.23 gives to the router of one group."""
    if not hasattr(_topk(), "SharedExpertsConfig"):
        pytest.skip("before 0.5.23 SGLang has another top-k for it")
    torch.manual_seed(3)
    bias = torch.zeros(num_experts, device="cuda")
    config = _config(GLM._replace(num_experts=num_experts), bias, 1.0, applied=False)
    ungrouped: dict[str, Any] = dict.fromkeys(("num_expert_group", "topk_group"))
    config = dataclasses.replace(config, use_grouped_topk=False, **ungrouped)
    plan = make_route_plan(config, _own_select())
    assert plan is not None
    assert plan.reason is None, plan.reason
    for name, logits, bias in _cases(num_experts, 1):
        each = dataclasses.replace(config, correction_bias=bias)
        tokens = torch.zeros(len(logits), 8, dtype=torch.bfloat16, device="cuda")
        own = _own_select()(tokens, logits, each)
        with torch.no_grad():
            found = [plan.select(rows, each, with_plan=False) for rows in logits.split(100)]
        assert None not in found
        weights, ids = (torch.cat(parts) for parts in zip(*filter(None, found), strict=True))
        assert _wrong_rows((weights, ids, None), (own.topk_weights, own.topk_ids)) == [], name


# ---- Too few candidates ------------------------------------------------------------------------


@pytest.mark.parametrize("routing", [DEEPSEEK_SHARED, KIMI, GLM], ids=_name)
def test_with_too_few_candidates_the_ids_differ_all_the_same(routing: Routing) -> None:
    """Finite ones first, then others, none of them twice, in groups that may be chosen."""
    torch.manual_seed(2)
    pair, top_k = _pair(routing), routing.top_k
    size = routing.num_experts // routing.num_groups
    for count, num_tokens in itertools.product(range(top_k), (1, 3, 40, 128)):
        bias = torch.full((routing.num_experts,), -torch.inf, device="cuda")
        candidates = torch.randperm(routing.num_experts, device="cuda")[:count]
        bias[candidates] = torch.randn(count, device="cuda")
        logits = torch.randn(num_tokens, routing.num_experts, device="cuda")
        for block_size in (0, 16):
            weights, ids, plan = pair.ours(logits, bias, block_size)
            routed, where = ids[:, :top_k].long(), (count, num_tokens, block_size)
            assert bool((routed.sort().values.diff() > 0).all()), where
            assert bool(((routed >= 0) & (routed < routing.num_experts)).all()), where
            groups = torch.zeros(num_tokens, routing.num_groups, device="cuda")
            groups.scatter_(1, routed // size, 1.0)
            assert bool((groups.sum(dim=1) <= routing.top_groups).all()), where
            finite = bias[routed].isfinite()
            assert bool((finite[:, :-1] | ~finite[:, 1:]).all()), where
            assert routing.num_groups > 1 or bool((finite.sum(dim=1) == count).all()), where
            assert bool(weights.isfinite().all()), where
            if plan is not None:
                own = _own_align(ids, block_size, pair.num_experts)
                assert int(_plan_mistakes(plan, own, block_size)) == 0, where


def test_an_expert_that_sglangs_own_chooses_twice() -> None:
    """Six candidates, in the first two lanes of groups 1 to 3; group 0 is kept beside them.

    FlashInfer's kernel gives expert 0 twice: a lane of it whose best is taken goes on with minus
    infinity and its expert of the group that was kept last, and in lane 0 that one comes next.
    """
    bias = torch.full((256,), -torch.inf, device="cuda")
    bias[[32, 33, 64, 65, 96, 97]] = 0.0
    logits = torch.randn(16, 256, device="cuda")
    for block_size in (0, 16):
        ids = _pair(DEEPSEEK).ours(logits, bias, block_size)[1]
        assert ids[:, 6:].tolist() == [[0, 1]] * 16
        assert ids[:, :6].sort().values.tolist() == [[32, 33, 64, 65, 96, 97]] * 16


# ---- The plan ----------------------------------------------------------------------------------


def _skewed(num_experts: int) -> torch.Tensor:
    """A bias with which all tokens go to the same few experts, or nearly."""
    return (torch.rand(num_experts, device="cuda") < 12 / num_experts) * 3.0


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("routing", [DEEPSEEK, DEEPSEEK_SHARED, KIMI, GLM_SHARED], ids=_name)
def test_the_plan_is_sglangs_own_in_ascending_order(routing: Routing, block_size: int) -> None:
    torch.manual_seed(3)
    pair, num_experts = _pair(routing), routing.num_experts
    for num_tokens in NUM_TOKENS:
        logits = torch.randn(num_tokens, num_experts, device="cuda")
        bias = torch.randn(num_experts, device="cuda") / 10
        calls = {
            "usual": (logits, bias),
            "wide": (logits * 4, bias),
            "few experts": (logits, _skewed(num_experts)),
            "the same experts": (logits[:1].expand(num_tokens, -1).contiguous(), bias),
        }
        for name, tensors in calls.items():
            weights, ids, plan = pair.ours(*tensors, block_size)
            assert plan is not None
            without = pair.ours(*tensors)
            assert _wrong_rows((weights, ids, plan), without[:2]) == [], (name, num_tokens)
            own = _own_align(ids, block_size, pair.num_experts)
            assert int(_plan_mistakes(plan, own, block_size)) == 0, (name, num_tokens)
            # What the expert GEMM's grid is made of.
            assert 0 <= plan.sorted_token_ids.numel() - own[0].numel() < 4, (name, num_tokens)
            blocks = plan.expert_ids.numel() * block_size - plan.sorted_token_ids.numel()
            assert 0 <= blocks < block_size, (name, num_tokens)


# ---- The hooked seams, each in a process of its own --------------------------------------------

IN_A_FRESH_PROCESS = """
import sys
import sglang_router_gemm
from sglang_router_gemm import hooks
hooks.register()
sys.path.insert(0, {folder!r})
from gpu import test_route
test_route.{function}()
print("RIGHT")
"""


def _run(function: Callable[[], None], run_python: Callable[..., str]) -> None:
    """Runs a function of this module where SGLang's modules are hooked as they are imported."""
    folder = str(Path(__file__).parents[1])
    code = IN_A_FRESH_PROCESS.format(folder=folder, function=function.__name__)
    said = run_python(code, SGLANG_ROUTER_GEMM_BACKEND="cluster")
    assert "RIGHT" in said.splitlines(), said


def _start_a_server_of_one() -> None:
    """What SGLang's top-k and expert GEMM ask for: the published ServerArgs, and their group."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    torch.set_grad_enabled(False)
    torch.manual_seed(4)
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cuda"))
    folder = tempfile.mkdtemp()
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        backend="nccl",
        distributed_init_method=f"file://{folder}/store",
    )
    group = parallel_state.init_model_parallel_group(
        [[0]], 0, "nccl", use_pynccl=False, use_custom_allreduce=False, group_name="tp"
    )
    try:
        from sglang.srt.runtime_context import get_parallel

        get_parallel().override_permanently(tp_group=group)
    except (ImportError, AttributeError):  # an older release keeps it in a name of its own
        parallel_state._TP = group


def _layer(routing: Routing, applied: bool) -> Any:
    """SGLang's `TopK` as its model builds it, with a random bias."""
    topk = _topk()
    named = {
        "layer_id": 0,
        "use_grouped_topk": True,
        "num_expert_group": routing.num_groups,
        "topk_group": routing.top_groups,
        "renormalize": routing.renormalize,
        "correction_bias": torch.randn(routing.num_experts, device="cuda") / 10,
        "routed_scaling_factor": SCALE,
        "apply_routed_scaling_factor_on_output": applied,
        "scoring_func": "sigmoid",
        "output_format": topk.TopKOutputFormat.STANDARD,
    }
    shared = {"num_fused_shared_experts": routing.num_shared}
    if not hasattr(topk, "SharedExpertsConfig"):  # SGLang < 0.5.23
        return topk.TopK(routing.num_columns, **named, **shared)
    from sglang.srt.runtime_context import get_model

    with get_model().override(shared_experts=topk.SharedExpertsConfig(**shared)):
        return topk.TopK(routing.top_k, **named)


def _layers() -> Iterator[tuple[Any, int]]:
    """Layers that a plan serves, and how many experts each has."""
    for routing, applied in itertools.product((DEEPSEEK, DEEPSEEK_SHARED), (False, True)):
        layer = _layer(routing, applied)
        plan = layer.topk_config.route_plan
        assert plan is not None
        assert plan.reason is None, plan.reason
        yield layer, routing.num_experts + routing.num_shared


def _tokens(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 `[M, 1024]` hidden states, and the fp32 logits of 256 experts."""
    hidden_states = torch.randn(num_tokens, 1024, dtype=torch.bfloat16, device="cuda") / 10
    return hidden_states, torch.randn(num_tokens, 256, device="cuda")


def _assert_same(found: Any, expected: Any) -> None:
    """Both are SGLang's `StandardTopKOutput`."""
    assert type(found) is type(expected)
    answer = found.topk_weights, found.topk_ids, None
    assert _wrong_rows(answer, (expected.topk_weights, expected.topk_ids)) == []
    assert found.router_logits is expected.router_logits


def seams() -> None:
    """What the hooked `TopK` and `moe_align_block_size` give, call after call."""
    _start_a_server_of_one()
    own_select, align = _own_select(), importlib.import_module(hooks.ALIGN).moe_align_block_size
    assert importlib.import_module(hooks.TOPK).select_experts is not own_select
    assert align is not _own(hooks.ALIGN, "moe_align_block_size")
    for layer, num_experts in _layers():
        config = layer.topk_config
        for num_tokens in (1, 7, 16, 100, 128):
            tokens = _tokens(num_tokens)
            expected = own_select(*tokens, config, layer_id=0)
            first = layer(*tokens)
            _assert_same(first, expected)
            assert first.topk_ids.expert_plan.plan is None  # nobody has asked for one yet
            own = align(first.topk_ids, 16, num_experts)
            second = layer(*tokens)
            _assert_same(second, expected)
            plan = second.topk_ids.expert_plan.plan
            found = align(second.topk_ids, 16, num_experts)
            assert [id(each) for each in found] == [id(each) for each in plan]
            assert int(_plan_mistakes(found, own, 16)) == 0
            _assert_sglang_aligns_what_is_not_planned(align, second.topk_ids, num_experts)
            third = layer(*tokens)  # SGLang has asked for 32 meanwhile
            _assert_same(third, expected)
            assert third.topk_ids.expert_plan.block_size == 32
            third.topk_ids[0, 0] = (third.topk_ids[0, 0] + 1) % 256
            found = align(third.topk_ids, 32, num_experts)
            assert found[0] is not third.topk_ids.expert_plan.plan.sorted_token_ids
            own = _own_align(third.topk_ids, 32, num_experts)
            assert int(_plan_mistakes(found, own, 32, ours=False)) == 0
        # More tokens than the kernel takes, and logits of another dtype.
        hidden_states, logits = _tokens(16)
        for tokens in (_tokens(129), (hidden_states, logits.bfloat16())):
            found = layer(*tokens)
            _assert_same(found, own_select(*tokens, config, layer_id=0))
            assert not hasattr(found.topk_ids, "expert_plan")
        # Ids that do not count their changes have no plan.
        with torch.inference_mode():
            found = layer(hidden_states, logits)
        _assert_same(found, own_select(hidden_states, logits, config, layer_id=0))
        assert not hasattr(found.topk_ids, "expert_plan")


def _assert_sglang_aligns_what_is_not_planned(
    align: Callable[..., Any], ids: torch.Tensor, num_experts: int
) -> None:
    """Copies, other numbers of experts, other modes, and last another block size: 32."""
    plan: ExpertPlan = ids.expert_plan.plan
    for found in (
        align(ids.clone(), 16, num_experts),
        align(ids, 16, num_experts + 1),
        align(ids, 16, num_experts, True),
        align(ids, 32, num_experts),
    ):
        assert found[0] is not plan.sorted_token_ids
    own = _own_align(ids, 32, num_experts)
    assert int(_plan_mistakes(found, own, 32, ours=False)) == 0


def padded_rows() -> None:
    """Rows behind `num_token_non_padded`, which SGLang masks behind its top-k."""
    _start_a_server_of_one()
    align = importlib.import_module(hooks.ALIGN).moe_align_block_size
    for layer, num_experts in _layers():
        for num_tokens, live in ((1, 0), (7, 3), (16, 16), (128, 100)):
            tokens = _tokens(num_tokens)
            align(layer(*tokens).topk_ids, 16, num_experts)  # the next ones have a plan
            non_padded = torch.tensor([live], dtype=torch.int32, device="cuda")
            found = layer(*tokens, num_token_non_padded=non_padded)
            expected = _own_select()(
                *tokens, layer.topk_config, layer_id=0, num_token_non_padded=non_padded
            )
            _assert_same(found, expected)
            assert bool((found.topk_ids[live:, :8] == -1).all())
            assert bool((found.topk_ids[:live] >= 0).all())
            own = _own_align(expected.topk_ids, 16, num_experts)
            plan = align(found.topk_ids, 16, num_experts)
            mistakes = _plan_mistakes(plan, own, 16, ours=False)
            assert int(mistakes) == 0, (num_experts, num_tokens, live)


def experts() -> None:
    """SGLang's Triton expert GEMM with our plan and with its own: the output's bits."""
    _start_a_server_of_one()
    package = "sglang.srt.layers.moe.moe_runner"
    fused_moe: Any = importlib.import_module(f"{package}.triton_utils.fused_moe")
    runner: Any = importlib.import_module(package)
    for layer, num_experts in _layers():
        shapes = (num_experts, 512, 1024), (num_experts, 1024, 256)
        w1, w2 = (torch.randn(each, dtype=torch.bfloat16, device="cuda") / 16 for each in shapes)
        config = runner.MoeRunnerConfig(
            num_experts=num_experts,
            num_local_experts=num_experts,
            inplace=False,
            routed_scaling_factor=SCALE,
        )
        for num_tokens in (1, 2, 8, 16, 17, 64, 128):
            hidden_states, logits = _tokens(num_tokens)
            first = layer(hidden_states, logits)
            expected = fused_moe.fused_experts(hidden_states, w1, w2, first, config)
            assert bool(expected.isfinite().all())
            assert bool((expected != 0).any())
            second = layer(hidden_states, logits)  # by now the GEMM has said its block size
            plan = second.topk_ids.expert_plan.plan
            assert plan is not None
            found = fused_moe.fused_experts(hidden_states, w1, w2, second, config)
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), num_tokens
            plan.expert_ids.zero_()  # to see that it was this plan that the GEMM read
            broken = fused_moe.fused_experts(hidden_states, w1, w2, second, config)
            assert not torch.equal(broken, expected), num_tokens


def test_the_hooked_seams(run_python: Callable[..., str]) -> None:
    _run(seams, run_python)


def test_padded_rows_are_as_sglang_has_them(run_python: Callable[..., str]) -> None:
    _run(padded_rows, run_python)


def test_the_expert_gemm_gives_the_same_bits(run_python: Callable[..., str]) -> None:
    _run(experts, run_python)


# ---- CUDA graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 33, 64, 128])
def test_graph_and_eager_give_the_same_bits(num_tokens: int) -> None:
    """Captured as a layer's call is, plan and all, and replayed with fresh logits in place."""
    block_size = BLOCK_SIZES[num_tokens % 4]
    pair, bias = _pair(DEEPSEEK_SHARED), torch.randn(256, device="cuda") / 10
    config = _config(DEEPSEEK_SHARED, bias, SCALE, applied=False)
    plan = make_route_plan(config, _own_select())
    assert plan is not None
    plan.block_sizes[num_tokens] = block_size
    logits = torch.randn(num_tokens, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    with torch.no_grad():
        plan.select(logits, config)
        with torch.cuda.graph(graph):
            selected = plan.select(logits, config)
    assert selected is not None
    weights, ids = selected
    found: Answer = weights, ids, ids.expert_plan.plan
    assert found[2] is not None
    for _ in range(REPLAYS):
        logits.normal_()
        _poison(found)
        graph.replay()
        wrong += _mistakes(found, pair.ours(logits, bias, block_size), block_size)
    assert int(wrong) == 0
    assert _wrong_rows(found, pair.theirs(logits, bias)) == []
    own = _own_align(ids, block_size, pair.num_experts)
    assert int(_plan_mistakes(found[2], own, block_size)) == 0


# ---- Programmatic dependent launch -------------------------------------------------------------


class Chain:
    """`LAYERS` times producer, routing and consumer, on one stream and under PDL.

    The producer writes the logits late. The consumer reads one of the answer's tensors as early
    as it may, in each layer another one, and destroys the logits.
    """

    def __init__(self, pair: Pair, num_tokens: int, block_size: int) -> None:
        self.module, self.block_size = _chain_module(), block_size
        self.bias = torch.randn(256, device="cuda") / 10
        self.sources = torch.randn(LAYERS, num_tokens, 256, device="cuda")
        self.logits = torch.full((num_tokens, 256), torch.nan, device="cuda")
        self.expected = [
            pair.ours(source, self.bias, block_size, pdl=False) for source in self.sources
        ]
        self.num_read = [self._num_read(each, layer) for layer, each in enumerate(self.expected)]
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def __call__(self, pair: Pair) -> None:
        """Once through all layers, to be captured; counts in `wrong`, and spoils the answers."""
        self.answers, self.read = [], []
        for layer, source in enumerate(self.sources):
            self.module.produce(source, self.logits, PRODUCER_CYCLES, True)
            self.answers.append(pair.ours(self.logits, self.bias, self.block_size, pdl=True))
            early = self._some(self.answers[layer], layer)
            self.read.append(torch.empty_like(early))
            self.module.consume(early, self.read[layer], self.logits, True)
        for layer, expected in enumerate(self.expected):
            self.wrong += _mistakes(self.answers[layer], expected, self.block_size)
            differs = _bits(self.read[layer]) != _bits(self._some(expected, layer))
            self.wrong += differs.flatten()[: self.num_read[layer]].sum()
        for layer in range(LAYERS):
            _poison(self.answers[layer])
            self.read[layer].fill_(POISON)

    def _some(self, answer: Answer, layer: int) -> torch.Tensor:
        weights, ids, plan = answer
        tensors = (weights, ids, *(plan[:2] if plan is not None else ()))
        return tensors[layer % len(tensors)]

    def _num_read(self, expected: Answer, layer: int) -> int:
        """So many numbers of it are written and copied: that goes by 16 bytes."""
        tensor, plan = self._some(expected, layer), expected[2]
        num_written = tensor.numel()
        if plan is not None and tensor is plan.sorted_token_ids:
            num_written = int(plan.num_tokens_post_padded)
        elif plan is not None and tensor is plan.expert_ids:
            num_written = int(plan.num_tokens_post_padded) // self.block_size
        return num_written // 4 * 4


def _mismatches(
    pair: Pair, num_tokens: int, block_size: int, replays: int = REPLAYS, graphs: int = 1
) -> int:
    """Numbers that `pair` gives behind a late producer, other than it gives without PDL.

    Args:
        graphs: so many are replayed at once, each with a chain and a stream of its own.
    """
    chains = [Chain(pair, num_tokens, block_size) for _ in range(graphs)]
    captured = [torch.cuda.CUDAGraph() for _ in chains]
    for chain, graph in zip(chains, captured, strict=True):
        with torch.cuda.graph(graph):
            chain(pair)
    streams = [torch.cuda.Stream() for _ in chains]
    torch.cuda.synchronize()
    for _ in range(replays):
        for graph, stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    return sum(int(chain.wrong) for chain in chains)


@pytest.mark.parametrize(
    ("num_tokens", "block_size"), [(1, 16), (16, 0), (16, 16), (37, 64), (128, 16)]
)
def test_a_late_producer_and_an_early_consumer(num_tokens: int, block_size: int) -> None:
    assert _mismatches(_pair(DEEPSEEK_SHARED), num_tokens, block_size) == 0


def test_two_graphs_at_once_on_two_streams() -> None:
    assert _mismatches(_pair(DEEPSEEK_SHARED), 64, 16, graphs=2) == 0


@pytest.mark.parametrize("block_size", [0, 16])
def test_the_tests_of_pdl_can_fail(block_size: int, tmp_path: Path) -> None:
    """The same kernel without its wait reads logits before they are written."""
    for file in cluster_route.SOURCE.parent.iterdir():
        shutil.copy(file, tmp_path)
    broken = tmp_path / "cluster_route.cuh"
    wait = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
    assert broken.read_text().count(wait) == 2
    broken.write_text(broken.read_text().replace(wait, ""))
    spec = cluster_route.spec(DEEPSEEK_SHARED, SM)
    module = jit.load(spec._replace(source=tmp_path / cluster_route.SOURCE.name))
    module.prepare(0)
    pair = _pair(DEEPSEEK_SHARED)._replace(kernel=Kernel(module.route, DEEPSEEK_SHARED))
    assert _mismatches(pair, 16, block_size, replays=20) > 0


# ---- Threads -----------------------------------------------------------------------------------


def test_threads_with_different_m_do_not_disturb_each_other() -> None:
    """Four threads, four streams: a call must change no state that another call needs."""
    pair, bias = _pair(DEEPSEEK_SHARED), torch.randn(256, device="cuda") / 10
    sizes = {1: 16, 24: 32, 100: 0, 128: 64}
    rows = {m: torch.randn(8, m, 256, device="cuda") for m in sizes}
    expected = {m: [pair.ours(each, bias, sizes[m], pdl=False) for each in rows[m]] for m in sizes}
    for m, answers in expected.items():
        for logits, answer in zip(rows[m], answers, strict=True):
            assert _wrong_rows(answer, pair.theirs(logits, bias)) == [], m
    torch.cuda.synchronize()
    failed: list[str] = []
    wrong: dict[int, int] = {}

    def work(num_tokens: int) -> None:
        block_size = sizes[num_tokens]
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            count = torch.zeros((), dtype=torch.int64, device="cuda")
            try:
                for call in range(CALLS):
                    found = pair.ours(rows[num_tokens][call % 8], bias, block_size)
                    count += _mistakes(found, expected[num_tokens][call % 8], block_size)
            except Exception as error:
                failed.append(f"M = {num_tokens}: {error}")
            torch.cuda.current_stream().synchronize()
            wrong[num_tokens] = int(count)

    threads = [threading.Thread(target=work, args=(m,)) for m in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert wrong == dict.fromkeys(sizes, 0)


# ---- Random calls ------------------------------------------------------------------------------

LOGITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda drawn: drawn,
    "wide": lambda drawn: drawn * 20,
    "even": lambda drawn: drawn / 100,
    "rough": lambda drawn: (drawn * 2).round() / 2,
    "negative": lambda drawn: drawn * 2 - 17,
}
BIASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "small": lambda drawn: drawn / 10,
    "none": torch.zeros_like,
    "wide": lambda drawn: drawn * 8,
    "rough": lambda drawn: drawn.round() / 4,
    "few experts": lambda drawn: _skewed(drawn.numel()),
}
# In fp64 scores that are so near to each other may change places in fp32: FlashInfer's tanh is
# off by 2^-11, its score by 2^-12, and the worth of a group is the sum of two.
NEAR = 2e-3


class Call(NamedTuple):
    """What a call of `test_random_calls` is made of."""

    routing: Routing
    num_tokens: int
    block_size: int
    scale: float
    applied: bool
    logits: str
    bias: str
    seed: int


@st.composite
def calls(draw: st.DrawFn) -> Call:
    return Call(
        draw(st.sampled_from([*KNOWN, ODD])),
        draw(st.one_of(st.integers(1, 17), st.integers(1, 128))),
        draw(st.sampled_from([0, *BLOCK_SIZES])),
        # As SGLang's kernels take it: PyTorch's may divide by an fp32 scale.
        draw(st.one_of(st.sampled_from([1.0, SCALE]), st.floats(0.0625, 32.0, width=32))),
        draw(st.booleans()),
        draw(st.sampled_from(list(LOGITS))),
        draw(st.sampled_from(list(BIASES))),
        draw(st.integers(0, 2**31)),
    )


KNOWN = (
    DEEPSEEK,
    DEEPSEEK_SHARED,
    SMALL,
    SMALL._replace(num_shared=1),
    LARGE,
    KIMI,
    V2,
)


def _restated(
    logits: torch.Tensor, bias: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids by fp64, int64 `[M, top_k]`, and the rows where nothing is near, bool `[M]`."""
    ranked = logits.double().sigmoid() + bias.double()
    clear = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if routing.num_groups > 1:
        groups = ranked.unflatten(1, (routing.num_groups, -1))
        worth = groups.topk(2).values.sum(dim=2)
        best = worth.sort(dim=1, descending=True).values
        last = best[:, routing.top_groups - 1]
        clear &= last - best[:, routing.top_groups] > NEAR
        dropped = (worth < last[:, None]).unsqueeze(2)
        ranked = groups.masked_fill(dropped, -torch.inf).flatten(1)
    values, ids = ranked.topk(routing.top_k + 1)
    clear &= (-values.diff(dim=1) > NEAR).all(dim=1)
    return ids[:, :-1], clear


def test_random_calls() -> None:
    """Against SGLang's own where that takes the routing, and against fp64 where that is clear."""
    with ThreadPoolExecutor() as pool:  # each takes seconds
        list(pool.map(lambda routing: cluster_route.build(routing, SM), [*KNOWN, ODD]))
    pairs = {routing: _pair(routing) for routing in KNOWN}
    kernel = cluster_route.load(ODD, torch.device("cuda", 0), SM)
    pairs[ODD] = pairs[DEEPSEEK_SHARED]._replace(kernel=kernel)
    seen: Counter[Routing] = Counter()
    num_clear = torch.zeros((), dtype=torch.int64, device="cuda")
    num_rows = 0

    @settings(max_examples=CASES)
    @given(call=calls())
    def each_is_right(call: Call) -> None:
        nonlocal num_rows
        routing, block_size = call.routing, call.block_size
        asked = pairs[routing].asked._replace(scale=call.scale, scales_here=call.applied)
        pair = pairs[routing]._replace(asked=asked)
        torch.manual_seed(call.seed)
        logits = LOGITS[call.logits](
            torch.randn(call.num_tokens, routing.num_experts, device="cuda")
        )
        bias = BIASES[call.bias](torch.randn(routing.num_experts, device="cuda"))
        found = pair.ours(logits, bias, block_size)
        weights, ids, plan = found
        restated, clear = _restated(logits, bias, routing)
        wrong = {"fp64": ((ids[:, : routing.top_k] != restated) & clear[:, None]).sum()}
        if routing != ODD:
            own = pair.theirs(logits, bias)
            wrong["weights"] = (_bits(weights) != _bits(own[0])).sum()
            wrong["ids"] = (ids != own[1]).sum()
        wrong["shared"] = (ids[:, routing.top_k :] != routing.num_experts).sum()
        if plan is not None:
            aligned = _own_align(ids, block_size, pair.num_experts)
            wrong["plan"] = _plan_mistakes(plan, aligned, block_size)
        counts = dict(zip(wrong, torch.stack(list(wrong.values())).tolist(), strict=True))
        assert counts == dict.fromkeys(wrong, 0)
        seen[routing] += 1
        num_rows += call.num_tokens
        num_clear.add_(clear.sum())

    each_is_right()
    assert min(seen[routing] for routing in pairs) > CASES // 20
    assert int(num_clear) > num_rows // 10


# ---- compute-sanitizer -------------------------------------------------------------------------

# The kernels in a program of its own, small enough for compute-sanitizer.
SANITIZED = r"""
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "cluster_route.cuh"

namespace {

using router_gemm::Arithmetic;

void require(bool condition, const char* what, int num_tokens) {
  if (!condition) {
    std::fprintf(stderr, "M %d: %s\n", num_tokens, what);
    std::exit(1);
  }
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* copy;
  require(cudaMalloc(&copy, values.size() * sizeof(T)) == cudaSuccess, "no memory", 0);
  const auto error = cudaMemcpy(copy, values.data(), values.size() * sizeof(T), cudaMemcpyDefault);
  require(error == cudaSuccess, "no copy", 0);
  return copy;
}

template <typename T>
void fetch(std::vector<T>& values, T* from, int num_tokens) {
  const auto error = cudaMemcpy(values.data(), from, values.size() * sizeof(T), cudaMemcpyDefault);
  require(error == cudaSuccess, cudaGetErrorString(error), num_tokens);
  cudaFree(from);
}

template <typename R>
void run(int num_tokens, int block_shift, bool pdl) {
  const int numel = num_tokens * R::kColumns, block = 1 << block_shift;
  const int num_experts = R::kNumExperts + R::kShared;
  std::vector<float> logits(num_tokens * R::kNumExperts), bias(R::kNumExperts), weights(numel);
  for (auto& logit : logits) {
    logit = static_cast<float>(std::rand() % 33 - 16) / 4;  // with ties
  }
  for (auto& each : bias) {
    each = static_cast<float>(std::rand() % 5 - 2) / 8;
  }
  std::vector<int32_t> ids(numel, -7), sorted_ids(numel * block, -7), expert_ids(numel, -7);
  std::vector<int32_t> padded(1, -7);
  router_gemm::Arguments args = {};
  auto *device_logits = on_device(logits), *device_bias = on_device(bias);
  args.logits = device_logits, args.bias = device_bias;
  args.weights = on_device(weights), args.ids = on_device(ids);
  args.num_tokens = num_tokens, args.scale = 2.5, args.shared_weight = 0.4f, args.pdl = pdl;
  args.sorted_ids = on_device(sorted_ids), args.expert_ids = on_device(expert_ids);
  args.num_tokens_post_padded = on_device(padded);
  args.block_shift = block_shift;
  const bool align = block_shift != 0;
  for (int i = 0; i < 2; ++i) {
    const auto error = router_gemm::launch_route<R>(args, align, nullptr);
    require(error == cudaSuccess, cudaGetErrorString(error), num_tokens);
  }
  fetch(logits, device_logits, num_tokens), fetch(bias, device_bias, num_tokens);
  fetch(weights, args.weights, num_tokens), fetch(ids, args.ids, num_tokens);
  fetch(sorted_ids, args.sorted_ids, num_tokens), fetch(expert_ids, args.expert_ids, num_tokens);
  fetch(padded, args.num_tokens_post_padded, num_tokens);

  std::vector<std::vector<int>> places(num_experts);
  for (int m = 0; m < num_tokens; ++m) {
    std::set<int> different;
    for (int k = 0; k < R::kColumns; ++k) {
      const int id = ids[m * R::kColumns + k];
      require(0 <= id && id < num_experts, "an id is out of range", num_tokens);
      require((id == R::kNumExperts) == (k == R::kTopK), "the shared one is wrong", num_tokens);
      require(weights[m * R::kColumns + k] > 0.0f, "a weight is wrong", num_tokens);
      different.insert(id);
      places[id].push_back(m * R::kColumns + k);
    }
    require(different.size() == R::kColumns, "an expert comes twice", num_tokens);
  }
  if (!align) {
    return;
  }
  int at = 0;
  for (int expert = 0; expert < num_experts; ++expert) {
    auto& mine = places[expert];
    while (mine.size() % block != 0) {
      mine.push_back(numel);
    }
    for (size_t i = 0; i < mine.size(); ++i, ++at) {
      require(sorted_ids[at] == mine[i], "sorted_ids is wrong", num_tokens);
      require(expert_ids[at / block] == expert, "expert_ids is wrong", num_tokens);
    }
  }
  require(padded[0] == at, "num_tokens_post_padded is wrong", num_tokens);
}

template <typename R>
void run_all(bool pdl) {
  require(router_gemm::prepare_route<R>() == cudaSuccess, "it does not load", 0);
  for (const int num_tokens : {1, 3, 4, 5, 7, 8, 17, 40, 128}) {
    run<R>(num_tokens, 0, pdl);
    run<R>(num_tokens, num_tokens % 2 ? 4 : 6, pdl);
  }
}

}  // namespace

int main() {
  for (const bool pdl : {false, true}) {
    run_all<router_gemm::Routing<128, 4, 2, 6, 1, true, Arithmetic::kFlashInfer>>(pdl);
    run_all<router_gemm::Routing<96, 1, 1, 8, 0, true, Arithmetic::kTriton>>(pdl);
  }
  std::puts("right");
}
"""


@pytest.fixture(scope="module")
def sanitized_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitizer")
    source = folder / "sanitize_route.cu"
    source.write_text(SANITIZED)
    return build_program(source, cluster_route.SOURCE.parent, folder / "sanitize_route")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, sanitized_program: Path) -> None:
    assert_sanitized(tool, sanitized_program)
