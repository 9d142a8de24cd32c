"""The routing behind the gate on a CPU: who decides, who is given a plan of the experts, and what
SGLang's own top-k gives beneath the hooks.
The kernel needs a GPU: where a call must be served, SGLang's own top-k computes in its place.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import tvm_ffi
from torch.utils.flop_counter import FlopCounterMode

from cpu.test_contract import changed
from sglang.srt.layers.moe_router import cluster_route, jit, route
from sglang.srt.layers.moe_router.cluster_route import MAX_NUM_TOKENS, Routing, SumOrder, Variant
from sglang.srt.layers.moe_router.environ import CHOICES
from sglang.srt.layers.moe_router.route import Asked, RoutePlan, ask, decide
from sglang_router_gemm.contract import examine_routing

TOPK = "sglang.srt.layers.moe.topk"
ALIGN = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"
topk, align = importlib.import_module(TOPK), importlib.import_module(ALIGN)
SharedExperts = importlib.import_module("sglang.srt.configs.shared_experts").SharedExpertsConfig
# Another test of this process may have hooked them.
OWN_SELECT = getattr(topk.select_experts, "__wrapped__", topk.select_experts)
OWN_ALIGN = getattr(align.moe_align_block_size, "__wrapped__", align.moe_align_block_size)

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _as_served(publish_server_args: object) -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # Inductor takes seconds
        yield


def _reasons(requested: str, sm: int, asked: Asked, n: int, deterministic: bool) -> dict[str, bool]:
    """Every reason, and whether it holds: the rules, written once more."""
    groups, top, k = asked.num_groups, asked.top_groups, asked.columns - asked.num_shared
    routings = (256, 8, 4, 8), (384, 1, 1, 8), (256, 1, 1, 8), (160, 1, 1, 8), (128, 1, 1, 8)
    taken = sm == 90 and (n, groups, top, k) in routings  # by `auto`
    split, most = groups in {2**i for i in range(6)}, min(8, n // groups * top)
    raw, shared = groups > 1 and not asked.renormalize, asked.num_shared not in (0, 1)
    return {
        "it is switched off": requested == "off",
        f"the backend is {requested}": requested in ("torch", "flashinfer", "sgl_kernel"),
        "deterministic inference is on": deterministic,
        f"SM is {sm}, must be 90 or newer": sm is None or sm < 90,
        "it is not a top-k by sigmoid and a correction bias": not asked.is_biased,
        f"its config has {asked.unknown}, must have (None,)": asked.unknown != (None,),
        "the shared expert's weight has a factor of its own": asked.scales_shared,
        f"N is {n}, must be a multiple of 32 up to 512": n not in range(32, 513, 32),
        f"there are {groups} groups, must be a power of two up to 32": not split,
        f"N is {n}, must be 64 or more where there are groups": groups > 1 and n < 64,
        f"{top} groups are kept, must be 1 to {groups}": not 0 < top <= groups,
        f"top_k is {k}, must be 1 to {most}": not 0 < k <= most,
        f"{asked.num_shared} shared experts are fused, must be 0 or 1": shared,
        "the weights are not renormalised, which FlashInfer always does": raw,
        f"auto does not take this routing on SM {sm}": requested == "auto" and not taken,
    }


def test_the_decision_of_20000_configurations() -> None:
    draw = random.Random(23)

    def mostly(usual: Any, *others: Any) -> Any:
        return usual if draw.random() < 0.85 else draw.choice(others)

    seen = [0] * 16  # of each reason, and of none
    for _ in range(20_000):
        requested = mostly(draw.choice(("auto", "cluster")), *CHOICES)
        sm, n = (
            mostly(90, None, 75, 89, 100, 103, 120),
            mostly(256, 0, 32, 64, 160, 384, 512, 544, 48),
        )
        groups, shared = mostly(8, 1, 1, 2, 3, 16, 32, 64), mostly(draw.choice((0, 1)), 2, -1)
        top = draw.randint(0, groups) if draw.random() < 0.5 else min(4, groups)
        columns, renormalize = mostly(8, 1, 4, 0, 9, -1) + shared, mostly(True, False)
        tail = mostly(True, False), (mostly(None, 0),), mostly(False, True)
        asked = Asked(columns, shared, groups, top, renormalize, 2.5, False, "sigmoid", *tail)
        deterministic = mostly(False, True)
        found = decide(requested, sm, asked, (None,), n, deterministic)
        reasons = _reasons(requested, sm, asked, n, deterministic)
        assert reasons[found] if found else not any(reasons.values()), (found, asked)
        seen[list(reasons).index(found) if found else -1] += 1
    assert min(seen) > 20, seen


def test_no_more_groups_are_kept_than_there_are() -> None:
    assert Routing(256, 8, 9, 8, 0, True).refusal() is not None  # the .cuh refuses it


@pytest.mark.parametrize("block_size", [16, 128])
def test_a_plan_is_told_from_another(block_size: int) -> None:
    ids, numel = torch.randint(0, 9, (40, 3), dtype=torch.int32), 120
    tokens, experts = [], []
    for expert in range(9):
        places = [i for i, each in enumerate(ids.flatten().tolist()) if each == expert]
        for at in range(0, len(places), block_size):
            block = places[at : at + block_size]
            tokens += block + [numel] * (block_size - len(block))
            experts.append(expert)
    right = [torch.tensor(each, dtype=torch.int32) for each in (tokens, experts, [len(tokens)])]
    assert cluster_route.is_plan_of(cluster_route.ExpertPlan(*right), ids, block_size, 9)
    for part in range(3):
        for place in (0, -1):
            wrong = [each.clone() for each in right]
            wrong[part][place] += 1
            plan = cluster_route.ExpertPlan(*wrong)
            assert not cluster_route.is_plan_of(plan, ids, block_size, 9)


@pytest.mark.parametrize(("groups", "orders"), [(8, ["FAR"]), (1, ["NEAR", "FOURS"])])
@pytest.mark.parametrize("shared", [[None], [None, SumOrder.FAR, SumOrder.NEAR]])
def test_the_variants(groups: int, orders: list[str], shared: list[SumOrder | None]) -> None:
    routing = Routing(256, groups, groups, 8, min(1, len(shared) - 1), True)
    found = cluster_route.variants(routing)
    assert found == [Variant(SumOrder[order], each) for order in orders for each in shared]


CONFIG = topk.TopKConfig(
    *(9, True, 4, 8, True, SharedExperts(num_fused_shared_experts=1)),
    **{"correction_bias": torch.linspace(-0.2, 0.2, 256), "routed_scaling_factor": 2.5},
)
# The fields of `TopKConfig` with a say: another value, and what that changes of what is asked.
FIELDS: dict[str, tuple[Any, str]] = {
    "top_k": (8, "columns"),
    "shared_experts": (SharedExperts(), "num_shared"),
    "num_expert_group": (16, "num_groups"),
    "topk_group": (2, "top_groups"),
    "renormalize": (False, "renormalize"),
    "routed_scaling_factor": (1.0, "scale"),
    "apply_routed_scaling_factor_on_output": (True, "scales_here"),
    "scoring_func": ("sigmoid", "scoring_func"),
    "use_grouped_topk": (False, "num_groups top_groups is_biased"),
    "correction_bias": (None, "is_biased"),
    "custom_routing_function": (print, "unknown"),
    "fused_shared_experts_scaling_factor": (0.5, "scales_shared"),
    "sqrtsoftplus_log1p": (True, "unknown"),
    "fused_gate_packed_ids": (True, "unknown"),
}
WITHOUT_A_SAY = {"torch_native", "output_format", "runner_backend", "routing_method_type"}
WITHOUT_A_SAY |= {"allow_routed_experts_capture", "layer_id"}


def _inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(num_tokens))
    return torch.zeros(num_tokens, 64, dtype=torch.bfloat16), logits


@pytest.mark.parametrize("name", [each.name for each in fields(topk.TopKConfig) if each.init])
def test_a_field_changes_what_is_asked_for_or_has_no_say_in_sglang(name: str) -> None:
    silent = name in WITHOUT_A_SAY
    value, changes = ("another", None) if silent else FIELDS[name]
    other = replace(CONFIG, **{name: value})
    before, after = ask(CONFIG), ask(other)
    different = [each for each in Asked._fields if getattr(before, each) != getattr(after, each)]
    assert different == (changes or "").split()
    if silent:
        own, others = (OWN_SELECT(*_inputs(32), each, layer_id=1)[:2] for each in (CONFIG, other))
        assert all(map(torch.equal, own, others))
    defaults = tuple(route._unknown_fields(topk.TopKConfig).values())
    refusal = decide("cluster", 90, after._replace(is_biased=True), defaults, 256)
    assert (changes == "unknown") == ("its config has" in str(refusal))


def test_a_top_k_by_sigmoid_need_not_be_of_groups() -> None:
    """MiniMax-M2's and Step-3.5's: SGLang takes its Triton router for it, as for one group."""
    fields = {"use_grouped_topk": False, "top_k": 8, "shared_experts": SharedExperts()}
    asked = ask(replace(CONFIG, scoring_func="sigmoid", num_expert_group=None, **fields))
    assert asked.is_biased
    assert asked.routing(256) == Routing(256, 1, 1, 8, 0, True)
    assert not ask(replace(CONFIG, scoring_func="softmax", **fields)).is_biased
    native = replace(CONFIG, scoring_func="sigmoid", torch_native=True, **fields)
    assert not ask(native).is_biased  # a sum of another order
    assert ask(replace(native, use_grouped_topk=True)).is_biased


def test_a_factor_of_1_on_the_shared_experts_weight_is_none() -> None:
    """As GLM-4.5 has it: SGLang multiplies by it, and asks for nothing else."""
    shared = replace(CONFIG, top_k=9, shared_experts=SharedExperts())
    once = replace(shared, fused_shared_experts_scaling_factor=1)
    assert ask(once) == ask(shared)
    own, others = (OWN_SELECT(*_inputs(32), each, layer_id=1)[:2] for each in (shared, once))
    assert all(map(torch.equal, own, others))
    twice = replace(shared, fused_shared_experts_scaling_factor=2.0)
    assert ask(twice).scales_shared


# A call, and the plan of its experts -------------------------------------------------------


def _served() -> tuple[RoutePlan, list[int]]:
    """A plan with SGLang's own in the kernel's place, and the block size of each call of that."""
    calls: list[int] = []

    def launch(logits: torch.Tensor, bias: torch.Tensor, *others: Any) -> None:
        own = topk.biased_grouped_topk_impl(logits, logits, bias, 9, True, 8, 4, 1, 2.5)
        for written, each in zip(others[:2], own, strict=True):
            written.copy_(each)
        calls.append(others[5])

    kernel = cluster_route.Kernel(launch, ask(CONFIG).routing(256))
    of_kernel = None, kernel, Variant(SumOrder.FAR)
    return RoutePlan(ask(CONFIG), 256, torch.device("cpu"), *of_kernel), calls


def test_a_call_that_is_not_as_planned_is_left_to_sglang() -> None:
    (plan, calls), logits, bias = _served(), _inputs(4)[1], CONFIG.correction_bias
    flat, wide, many = torch.zeros(4 * 256 + 1), torch.zeros(4, 264), torch.zeros(129, 256)
    wrong = [logits.bfloat16(), logits[:, :128].contiguous(), logits[0], logits.to("meta"), many]
    for each in (*wrong, wide[:, :256], flat[1:].view(4, 256), torch.nn.Parameter(logits)):
        assert plan.select(each, CONFIG) is None, each
    for each in (bias.bfloat16(), bias.to("meta"), bias[:128], torch.zeros(512)[::2], None):
        assert plan.select(logits, replace(CONFIG, correction_bias=each)) is None, each
    for change in ({"routed_scaling_factor": 1.0}, {"fused_shared_experts_scaling_factor": 0.5}):
        assert plan.select(logits, replace(CONFIG, **change)) is None, change
    for mode in (torch.enable_grad(), FlopCounterMode(display=False)):
        with mode:
            assert plan.select(logits, CONFIG) is None, mode
    assert replace(plan, kernel=None).select(logits, CONFIG) is None
    assert calls == []
    assert plan.select(many[:MAX_NUM_TOKENS], CONFIG) is not None


def _select(own: Any, plan: RoutePlan | None, **named: Any) -> Any:
    config = replace(CONFIG)
    config.route_plan = plan
    return route.select_experts(own, topk, *_inputs(5), config, **named)


@pytest.mark.parametrize("padded", [None, torch.tensor(3)])
def test_a_served_call_is_sglangs(padded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan, calls), seen = _served(), []
    of = {"layer_id": 1, "num_token_non_padded": padded}
    own, found = OWN_SELECT(*_inputs(5), CONFIG, **of), _select(None, plan, **of)
    base = type(topk.get_global_expert_distribution_recorder())
    recorder = type("R", (base,), {"on_select_experts": lambda _, topk_ids: seen.append(topk_ids)})
    monkeypatch.setattr(topk, "get_global_expert_distribution_recorder", recorder)
    for each in (found, _select(None, plan, **of), OWN_SELECT(*_inputs(5), CONFIG, **of)):
        assert type(each) is topk.StandardTopKOutput
        assert all(map(torch.equal, each, own))
    assert len(calls) == len(seen) == 2
    assert torch.equal(*seen)


@pytest.mark.parametrize("given", ["expert_location_dispatch_info", "dynamic_expert_bias", "new"])
def test_what_the_kernel_does_not_know_goes_to_sglang_as_it_came(given: str) -> None:
    plan, calls = _served()
    passed = _select(lambda *_, **named: named, plan, layer_id=7, **{given: 1})
    assert {"layer_id": 7, given: 1}.items() <= passed.items()
    assert calls == []


def _align(ids: torch.Tensor, size: int = 16, experts: int = 257, *more: Any, **named: Any) -> Any:
    """A plan; "own" where SGLang's function was called, with all that was given."""

    def own(*given: Any, **others: Any) -> str:
        assert (given[0] is ids, *given[1:], others) == (True, size, experts, *more, named)
        return "own"

    return route.moe_align_block_size(own, ids, size, experts, *more, **named)


def _ids(plan: RoutePlan, num_tokens: int = 4) -> torch.Tensor:
    return plan.select(_inputs(num_tokens)[1], CONFIG)[1]


def test_a_plan_is_taken_for_its_block_size_which_is_remembered_for_each_m() -> None:
    plan, calls = _served()
    assert _align(_ids(plan)) == "own"
    assert [each.numel() for each in _align(_ids(plan))] == [36 * 16, 36, 1]
    assert _align(_ids(plan, 5)) == "own"  # of another M nothing was known
    for size, experts in ((64, 257), (48, 257), (64, 256), (128, 256)):  # it has no 48
        assert _align(_ids(plan), size, experts) == "own"
    assert type(_align(_ids(plan), 64)) is tuple
    assert calls == [0, 16, 0, 16, 64, 64, 64, 64]
    assert plan.block_sizes == {4: 64, 5: 16}


def test_ids_that_were_changed_or_copied_are_aligned_anew() -> None:
    plan, _ = _served()
    plan.block_sizes[4] = 16
    ids = _ids(plan)
    for each in (ids.clone(), ids[:2], ids.long(), ids.view(36)):
        assert _align(each) == "own"
    for name in ("ignore_invalid_expert", "return_inactive_prefix_count", "pad_expert_ids"):
        assert _align(ids, **{name: True}) == "own"
        assert type(_align(ids, **{name: False})) is tuple
    assert _align(ids, 16, 257, True) == "own"
    ids[1].fill_(-1)
    assert _align(ids) == "own"
    with torch.inference_mode():  # such ids do not count their changes
        assert _align(_ids(plan)) == "own"


def test_a_plan_has_the_sizes_that_sglang_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's real function: on a CPU it lacks only the op that fills what it has allocated."""
    monkeypatch.setattr(align, "_is_cuda", False)
    monkeypatch.setattr(align, "sgl_moe_align_block_size", lambda *_: None, raising=False)
    for size in cluster_route.BLOCK_SIZES:
        for experts, columns in ((257, 9), (256, 8), (384, 8), (385, 9), (32, 1), (33, 3)):
            for num_tokens in range(MAX_NUM_TOKENS + 1):
                ids = torch.empty(num_tokens, columns, dtype=torch.int32)
                ours = cluster_route.empty_plan(ids, size, experts)
                for each, own in zip(ours, OWN_ALIGN(ids, size, experts), strict=True):
                    assert (each.shape, each.dtype) == (own.shape, own.dtype)


# The hooks in SGLang -----------------------------------------------------------------------

HOOKS = f"""
import importlib, json, logging, os, sys, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from sglang.srt import plugins, runtime_context, server_args
from sglang.srt.configs.shared_experts import SharedExpertsConfig
from sglang.srt.layers.moe import topk
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe  # it imports a name
server_args.set_global_server_args_for_scheduler(server_args.ServerArgs(
    model_path="dummy", device="cpu", enable_deterministic_inference="FIXED" in os.environ))
groups = dict(use_grouped_topk=True, num_expert_group=8, topk_group=4)
def depth(function):
    return 1 + depth(function.__wrapped__) if hasattr(function, "__wrapped__") else 0
def count():
    topk, align = map(importlib.import_module, {TOPK, ALIGN})
    functions = topk.TopK.__init__, topk.select_experts, align.moe_align_block_size
    print([depth(each) for each in (*functions, fused_moe.moe_align_block_size)])
"""
CALLS = """
torch.compiler.set_stance("force_eager")
bias, hidden_states, logits = torch.randn(256) / 10, torch.randn(5, 64), torch.randn(5, 256)
def outputs(layers):
    for shared in (SharedExpertsConfig(), SharedExpertsConfig(num_fused_shared_experts=1)):
        with runtime_context.get_model().override(shared_experts=shared):
            layers += [topk.TopK(8, layer_id=1, correction_bias=each, routed_scaling_factor=2.5,
                                 **grouped) for each in (bias, None) for grouped in (groups, {})]
    with torch.no_grad():
        found = [layer(hidden_states, logits) for layer in layers]
        lazy = topk.BypassedTopKOutput(hidden_states, logits, layers[0].topk_config)
        return [tensor for output in (*found, lazy.to_standard()) for tensor in output]
own, layers = outputs([]), []
plugins.load_plugins()
same = [bool(torch.equal(*each)) for each in zip(own, outputs(layers), strict=True)]
plans = [getattr(layer.topk_config, "route_plan", "absent") for layer in layers]
print(json.dumps([same, [getattr(plan, "reason", plan) for plan in plans]]))
count()
"""


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({}, "SM is None, must be 90 or newer"),
        ({"SGLANG_ROUTER_GEMM_BACKEND": "torch"}, "the backend is torch"),
        ({"FIXED": "1"}, "deterministic inference is on"),
        ({"SGLANG_ROUTER_GEMM_BACKEND": "off"}, "absent"),
    ],
)
def test_hooks_change_nothing_here(env: dict[str, str], reason: str, fork_python: Run) -> None:
    said, off = fork_python(HOOKS + CALLS, **env).splitlines(), reason == "absent"
    reasons = [reason, reason, *[reason if off else None] * 2] * 2  # None: without a bias
    assert json.loads(said[-2]) == [[True] * 27, reasons]
    assert said[-1] == str([0 if off else 1] * 4)
    assert not [line for line in said if "Routing" in line or line.startswith("WARN")]  # a CPU


TWICE = "from sglang_router_gemm.plugin import activate; activate()"


@pytest.mark.parametrize(
    ("before", "hooked", "does_not_fit"),
    [
        (f"del sys.modules[{TOPK!r}], sys.modules[{ALIGN!r}]", [1, 1, 1, 0], 0),  # imported later
        ("import sglang_router_gemm.hooks as h; h.examine_routing = lambda _: 'x'", [0] * 4, 1),
        ("sys.modules['blocked'] = None", [1] * 4, 0),
        (TWICE, [1] * 4, 0),
    ],
)
def test_all_is_hooked_once(
    before: str, hooked: list[int], does_not_fit: int, fork_python: Run
) -> None:
    said = fork_python(f"{HOOKS}{before}\nplugins.load_plugins()\ncount()").splitlines()
    assert said[-1] == str(hooked)
    assert not [line for line in said if line.startswith("WARNING")]
    assert len([line for line in said if "top-k does not fit" in line]) == does_not_fit


ANNOUNCE = """
from torch._subclasses.fake_tensor import FakeTensorMode
from sglang.srt.layers.moe_router import route
route.device_sm = lambda device: int(os.environ["SM"])
plugins.load_plugins()
with FakeTensorMode():
    bias = torch.empty(256, device="cuda")
layers = [topk.TopK(8, layer_id=each, correction_bias=bias, **groups) for each in range(3)]
"""
WHAT = "Routing, top 8 of 256 experts in 4 of 8 groups"


@pytest.mark.parametrize(
    ("setting", "sm", "level", "why"),
    [
        ("auto", "80", "INFO", "SM is 80, must be 90 or newer."),
        ("flashinfer", "90", "INFO", "the backend is flashinfer."),
        ("cluster", "80", "WARNING", "SM is 80, must be 90 or newer."),
        ("auto", "100", "INFO", "auto does not take this routing on SM 100."),
        ("auto", "90", "WARNING", "cluster_route did not load ("),  # there is no GPU
        ("cluster", "90", "WARNING", "cluster_route did not load ("),
    ],
)
def test_it_is_said_once(setting: str, sm: str, level: str, why: str, fork_python: Run) -> None:
    said = fork_python(HOOKS + ANNOUNCE, SGLANG_ROUTER_GEMM_BACKEND=setting, SM=sm)
    (line,) = [line for line in said.splitlines() if "Routing, " in line]
    assert line.startswith(f"{level} {WHAT}: SGLang's own serves: {why}")


OTHER_BITS = """
from dataclasses import replace
route._loaded = lambda plan, *others: replace(plan, reason=route._OTHER_BITS)
plugins.load_plugins()
"""


@pytest.mark.parametrize(("setting", "level"), [("auto", "INFO"), ("cluster", "WARNING")])
def test_a_release_with_other_bits_is_a_warning_where_ours_was_asked_for(
    setting: str, level: str, fork_python: Run
) -> None:
    code = HOOKS + ANNOUNCE.replace("plugins.load_plugins()\n", OTHER_BITS)
    said = fork_python(code, SGLANG_ROUTER_GEMM_BACKEND=setting, SM="90")
    (line,) = [line for line in said.splitlines() if "Routing, " in line]
    assert line.startswith(f"{level} {WHAT}: SGLang's own serves: SGLang's own gives other ids")


def test_what_is_served_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    route._announce(replace(_served()[0], device=torch.device("cuda", 0)), wanted=True)
    (said,) = caplog.messages
    assert said.startswith(f"{WHAT}, 1 shared: M 1-128 cluster_route, with the plan")
    assert said.endswith("; M 129+ SGLang")


FILES = "layers/moe/topk", ALIGN[11:].replace(".", "/"), "eplb/expert_distribution"
READ = [name for name, (_, what) in FIELDS.items() if what not in ("unknown", "num_shared")]
READ += ["allow_routed_experts_capture"]


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (0, "class TopKConfig:", "class TopKConfig:", "None"),  # as it is installed, it fits
        (0, "def select_experts(", "def select(", "topk.py has no function select_experts"),
        (0, "\n    topk_config: TopKConfig,", "", "select_experts takes hidden_states, router_log"),
        (0, "Tensor] = None,\n) -> Standard", "Tensor],\n) -> Standard", "must be given router_"),
        (0, "def _post_process_topk_ids(", "def _p(", "has no function _post_process_topk_ids"),
        (0, "layer_id: Optional[int],\n    topk_ids", "topk_ids", "capture_routed_experts_if_all"),
        (0, "class TopKConfig:", "class Config:", "topk.py has no class TopKConfig"),
        *((0, f"\n    {f}: ", "\n    x: ", f"TopKConfig has no {f}") for f in READ),
        (0, "def num_shared_topk_slots(", "def slots(", "does not say how many shared experts"),
        (0, "class StandardTopKOutput(", "class Output(", "has no class StandardTopKOutput"),
        (0, "\n    topk_ids: torch.Tensor\n", "\n", "StandardTopKOutput has no topk_ids"),
        (0, "get_global_expert_distribution_recorder", "get", "does not ask for a recorder"),
        (1, "block_size: int,", "size: int,", "moe_align_block_size takes topk_ids, size, num_"),
        (1, "pad_expert_ids: bool = False", "pad: bool", "must be given pad"),
        (2, "def on_select_experts(", "def on(", "Recorder has no on_select_experts"),
    ],
)
def test_a_broken_promise(file: int, old: str, new: str, problem: str, tmp_path: Path) -> None:
    assert problem in str(examine_routing(changed(tmp_path, f"srt/{FILES[file]}.py", (old, new))))


ROUTINGS = Routing(256, 8, 4, 8, 1, True), Routing(384, 1, 1, 8, 0, True)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TOUCHES = re.compile(r"(LDG|STG|LD|ST|ATOM|ATOMG|RED|LDGSTS|UBLKCP|UTMA\w+)\b")  # global memory


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("TVM_FFI_CACHE_DIR", str(tmp_path_factory.mktemp("built") / "cache"))
        yield list(pool.map(lambda each: jit.build(cluster_route.spec(each, 90)), ROUTINGS))


@pytest.mark.parametrize("which", range(len(ROUTINGS)))
def test_a_kernel_touches_global_memory_after_its_wait(which: int, built: list[Path]) -> None:
    sass = subprocess.check_output([CUOBJDUMP, "-sass", built[which]], text=True)
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 5
    for kernel in kernels:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?\w+ )?([\w.]+)([^;]*);", kernel)
        ((wait, at),) = [(i, at) for i, (at, name, _) in enumerate(code) if name == "ACQBULK"]
        touches = [i for i, (_, name, _) in enumerate(code) if TOUCHES.match(name)]
        assert wait < min(touches)
        for _, name, operands in code[:wait]:  # nor does anybody jump over it
            assert not re.match("EXIT|BRX|JMP|CALL", name)
            assert not name.startswith("BRA") or int(operands.split("0x")[1], 16) <= int(at, 16)
        assert not [name for _, name, _ in code if name.startswith(("LDL", "STL"))]  # no spills
    assert tvm_ffi.load_module(str(built[which])).largest_num_tokens() == MAX_NUM_TOKENS


def test_the_sources_have_the_limits_that_python_has() -> None:
    source = cluster_route.SOURCE.read_text() + cluster_route.SOURCE.with_suffix(".cuh").read_text()
    assert re.findall(r"kMaxTokens = (\d+)", source) == [str(MAX_NUM_TOKENS)]
    ((first, last),) = re.findall(r"block_size >= (\d+) && block_size <= (\d+) &&", source)
    assert re.findall(r"kMinBlock = (\d+)", source) == [first]
    assert "(block_size & (block_size - 1)) == 0" in source
    sizes = [2**i for i in range(20) if int(first) <= 2**i <= int(last)]
    assert sizes == list(cluster_route.BLOCK_SIZES)
