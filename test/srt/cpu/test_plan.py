"""The decision: a table and a pure function, every condition broken in turn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from operands import same_as_fp64

from sglang.srt.layers.moe_router.backends import BACKENDS, Backend
from sglang.srt.layers.moe_router.environ import CHOICES
from sglang.srt.layers.moe_router.kernel import Target
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3, MODELS, find_model
from sglang.srt.layers.moe_router.plan import Decision, Plan, decide, make_plan
from sglang.srt.models.deepseek_v2_gate import router_logits

GPU = torch.device("cuda", 0)
BLACKWELL = Target(GPU, 100, 256, 7168)
HOPPER = BLACKWELL._replace(sm=90)
CPU = Target(torch.device("cpu"), None, 256, 7168)


def decided(
    requested: str,
    target: Target,
    missing: str | None = None,
    deterministic: bool = False,
) -> Decision:
    """The decision where every backend but `missing` is there."""

    def unavailable(backend: Backend) -> str | None:
        return "not installed" if backend.name == missing else None

    return decide(requested, target, unavailable, deterministic)


def served(decision: Decision) -> tuple[str | None, range]:
    name = decision.backend.name if decision.backend is not None else None
    return name, decision.num_tokens


NOBODY = (None, range(0))


@pytest.mark.parametrize("sm", [100, 103])
def test_auto_takes_flashinfer_on_blackwell(sm: int) -> None:
    assert served(decided("auto", BLACKWELL._replace(sm=sm))) == ("flashinfer", range(1, 17))


@pytest.mark.parametrize(
    ("num_experts", "hidden_size", "first", "last"),
    [
        (256, 7168, 1, 128),
        (384, 7168, 1, 128),
        (256, 6144, 1, 128),
        (160, 5120, 2, 128),
        (128, 7168, 4, 128),
    ],
)
def test_auto_takes_cluster_on_hopper(
    num_experts: int, hidden_size: int, first: int, last: int
) -> None:
    target = Target(GPU, 90, num_experts, hidden_size)
    decision = decided("auto", target)
    assert served(decision) == ("cluster", range(first, last + 1))
    assert decision.reason == f"auto takes cluster for M = {first} to {last}"
    gone = decided("auto", target, missing="cluster")
    assert served(gone) == NOBODY
    assert gone.unavailable
    assert gone.reason == "not installed"


@pytest.mark.parametrize("sm", [None, 80, 89, 101, 110, 120])
def test_auto_leaves_other_gpus_to_sglang(sm: int | None) -> None:
    decision = decided("auto", BLACKWELL._replace(sm=sm))
    assert served(decision) == NOBODY
    assert decision.reason == "auto takes cluster on SM 90, flashinfer on SM 100 or 103 only"


def test_auto_leaves_other_shapes_to_sglang() -> None:
    decision = decided("auto", HOPPER._replace(num_experts=64))
    assert served(decision) == NOBODY
    assert decision.reason == (
        "the gate is [64, 7168], auto takes [256, 7168] or [384, 7168] or [128, 7168] or "
        "[256, 6144] or [160, 5120] or [256, 4096] or [288, 4096] or [384, 5120] on SM 90"
    )
    other = HOPPER._replace(logits_dtype=torch.bfloat16, bias=True)
    assert decided("auto", other).reason == (
        "the gate is [256, 7168] with a bias, bfloat16 logits, auto takes [128, 2880] with a bias, "
        "bfloat16 logits on SM 90"
    )
    other = HOPPER._replace(dtype=torch.float32, logits_dtype=torch.bfloat16)
    assert decided("auto", other).reason.endswith(", auto takes none like it on SM 90")
    assert decided("auto", BLACKWELL._replace(num_experts=384)).reason == (
        "the gate is [384, 7168], auto takes [256, 7168] on SM 100"
    )


@pytest.mark.parametrize("requested", ["auto", "cluster", "flashinfer", "sgl_kernel"])
def test_a_cpu_is_left_to_sglang(requested: str) -> None:
    decision = decided(requested, CPU)
    assert served(decision) == NOBODY
    assert decision.reason == "device is cpu, must be cuda"
    assert not decision.unavailable


@pytest.mark.parametrize(
    ("requested", "change", "reason"),
    [
        ("flashinfer", {"num_experts": 384}, "N is 384, must be 256"),
        ("flashinfer", {"hidden_size": 6144}, "K is 6144, must be 7168"),
        ("flashinfer", {"sm": None}, "SM is None, must be 90 or newer"),  # ROCm
        ("sgl_kernel", {"num_experts": 128}, "N is 128, must be 256 or 384"),
        ("sgl_kernel", {"sm": 89}, "SM is 89, must be 90 or newer"),
        ("cluster", {"sm": 89}, "SM is 89, must be 90 or newer"),
        ("cluster", {"num_experts": 8}, "N is 8, must be a multiple of 16 up to 1024"),
        ("cluster", {"num_experts": 250}, "N is 250, must be a multiple of 16 up to 1024"),
        ("cluster", {"num_experts": 1040}, "N is 1040, must be a multiple of 16 up to 1024"),
        ("cluster", {"hidden_size": 7000}, "K is 7000, must be a multiple of 64 up to 8192"),
        ("cluster", {"hidden_size": 8704}, "K is 8704, must be a multiple of 64 up to 8192"),
    ],
)
def test_a_forced_backend_refuses_a_weight(
    requested: str, change: dict[str, Any], reason: str
) -> None:
    decision = decided(requested, HOPPER._replace(**change))
    assert served(decision) == NOBODY
    assert decision.reason == reason
    assert served(decided(requested, HOPPER)) == (requested, BACKENDS[requested].rule.num_tokens)


@pytest.mark.parametrize("requested", ["auto", "flashinfer", "sgl_kernel"])
def test_fp32_weights_are_left_to_sglang(requested: str) -> None:
    decision = decided(requested, HOPPER._replace(dtype=torch.float32))
    assert served(decision) == NOBODY
    assert "float32, " in decision.reason


def test_cluster_takes_fp32_weights_and_no_other_dtype() -> None:
    wide = HOPPER._replace(num_experts=160, hidden_size=5120, dtype=torch.float32)
    assert served(decided("cluster", wide)) == ("cluster", range(129))
    half = decided("cluster", HOPPER._replace(dtype=torch.float16))
    assert half.reason == "weight is torch.float16, must be torch.bfloat16 or torch.float32"


@pytest.mark.parametrize("requested", CHOICES)
@pytest.mark.parametrize("target", [HOPPER, BLACKWELL, CPU])
def test_deterministic_inference_is_left_to_sglang(requested: str, target: Target) -> None:
    assert served(decided(requested, target, deterministic=True)) == NOBODY


@pytest.mark.parametrize("target", [HOPPER, BLACKWELL, CPU])
def test_off_is_off(target: Target) -> None:
    assert served(decided("off", target)) == NOBODY


@pytest.mark.parametrize("sm", [90, 100, 103, 120])
def test_a_forced_flashinfer_goes_wherever_it_is_available(sm: int) -> None:
    assert served(decided("flashinfer", BLACKWELL._replace(sm=sm)))[0] == "flashinfer"


@pytest.mark.parametrize("sm", [90, 100, 103, 120])
@pytest.mark.parametrize(
    ("num_experts", "hidden_size"),
    [(256, 7168), (384, 7168), (128, 7168), (256, 6144), (160, 5120), (16, 64), (1024, 8192)],
)
def test_a_forced_cluster_serves_multiples_of_16_and_64(
    num_experts: int, hidden_size: int, sm: int
) -> None:
    target = Target(GPU, sm, num_experts, hidden_size)
    assert served(decided("cluster", target)) == ("cluster", range(129))


@pytest.mark.parametrize("target", [CPU, HOPPER, HOPPER._replace(num_experts=100, hidden_size=9)])
def test_torch_serves_every_matrix_of_16_or_32_bits(target: Target) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        decision = decided("torch", target._replace(dtype=dtype))
        assert served(decision)[0] == "torch"
        assert 4096 in decision.num_tokens
        assert decision.ranges() == [("1+", "torch")]
    assert served(decided("torch", target._replace(dtype=torch.float64))) == NOBODY


@pytest.mark.parametrize(
    ("requested", "change", "reason"),
    [
        ("flashinfer", {"logits_dtype": torch.bfloat16}, "logits are torch.bfloat16, must be"),
        ("sgl_kernel", {"bias": True}, "the gate has a bias, must have none"),
        ("cluster", {"logits_dtype": torch.float16}, "logits are torch.float16, must be"),
        ("cluster", {"logits_dtype": torch.bfloat16, "bias": True}, None),
        ("cluster", {"dtype": torch.float32, "logits_dtype": torch.bfloat16}, None),
        ("torch", {"logits_dtype": torch.bfloat16, "bias": True}, None),
    ],
)
def test_what_a_backend_gives(requested: str, change: dict[str, Any], reason: str | None) -> None:
    decision = decided(requested, HOPPER._replace(**change))
    assert (served(decision) == NOBODY) == (reason is not None)
    assert reason is None or decision.reason.startswith(reason)


@pytest.mark.parametrize("requested", CHOICES)
def test_one_backend_at_most_is_asked_whether_it_is_there(requested: str) -> None:
    """Asking loads it: a kernel that will not be called must not be built."""
    for target in (HOPPER, BLACKWELL, BLACKWELL._replace(sm=120), CPU):
        asked: list[str] = []

        def unavailable(backend: Backend, asked: list[str] = asked) -> None:
            asked.append(backend.name)

        decision = decide(requested, target, unavailable)
        assert asked == ([decision.backend.name] if decision.backend is not None else [])


def test_the_ranges_as_text() -> None:
    assert decided("auto", BLACKWELL).ranges() == [("1-16", "flashinfer"), ("17+", None)]
    assert decided("auto", HOPPER).ranges() == [("1-128", "cluster"), ("129+", None)]
    assert decided("cluster", HOPPER).ranges() == [("1-128", "cluster"), ("129+", None)]
    assert decided("off", HOPPER).ranges() == [("1+", None)]
    mistral = decided("auto", HOPPER._replace(num_experts=128))
    assert mistral.ranges() == [("1-3", None), ("4-128", "cluster"), ("129+", None)]


def test_the_table_of_models_is_one() -> None:
    """A gate stands once, and `auto` takes no more than the backend's rule allows."""
    gates = [model.gate for model in MODELS]
    assert len(set(gates)) == len(gates)
    for model in MODELS:
        assert find_model(*model.gate) is model
        for sm, auto in model.auto.items():
            rule = BACKENDS[auto.backend].rule
            target = Target(GPU, sm, *model.gate)
            assert rule.refuse_weight(target) is None
            assert set(auto.num_tokens) <= set(rule.num_tokens)
            assert 0 not in auto.num_tokens
    assert find_model(1, 1) is None
    assert MODELS[0] is DEEPSEEK_V3


# The plan of a gate ----------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, publish_server_args: Callable[..., None]) -> Plan:
    """A real plan that serves, on a CPU: backend `torch`."""
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    return make_plan(torch.empty(32, 64, dtype=torch.bfloat16))


def test_a_plan_is_made_once_and_shared(plan: Plan) -> None:
    assert make_plan(torch.ones(32, 64, dtype=torch.bfloat16)) is plan
    assert make_plan(torch.empty(16, 64, dtype=torch.bfloat16)) is not plan


def test_a_copied_gate_keeps_its_plan_and_a_pickled_one_makes_a_new_one(plan: Plan) -> None:
    assert copy.deepcopy(plan) is plan
    assert pickle.loads(pickle.dumps(plan)) is None


@pytest.mark.parametrize(
    "other",
    [
        torch.empty(32, 64, dtype=torch.float16),
        torch.empty(64, 32, dtype=torch.bfloat16),
        torch.empty(32, 64, dtype=torch.bfloat16, device="meta"),
    ],
)
def test_another_weight_is_not_the_plans(plan: Plan, other: torch.Tensor) -> None:
    assert plan.is_for(torch.empty(32, 64, dtype=torch.bfloat16))
    assert not plan.is_for(other)


def test_why_not_names_what_a_call_lacks(plan: Plan) -> None:
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    wide = torch.zeros(4, 72, dtype=torch.bfloat16)
    sliced = torch.zeros(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64)

    class Prefill:
        attn_cp_metadata = object()

    decision = Decision(None, range(1, 17), "")
    few = Plan("cluster", plan.target, decision, None, True, torch.float32)
    assert few.why_not(rows, weight, Prefill())[0] == "context_parallel"
    assert few.why_not(rows.repeat(5, 1), weight) == ("num_tokens", "M is 20, must be 1 to 16")
    assert few.why_not(rows.to("meta"), weight)[0] == "device"
    assert few.why_not(rows.half(), weight) == (
        "dtype",
        "hidden_states is torch.float16, must be torch.bfloat16",
    )
    assert few.why_not(wide, weight)[0] == "shape"
    assert few.why_not(rows.view(2, 2, 64), weight)[0] == "shape"
    assert few.why_not(wide[:, :64], weight)[0] == "layout"
    assert few.why_not(sliced, weight) == (
        "alignment",
        "tensors must start at a multiple of 16 bytes",
    )
    assert few.why_not(sliced, weight, None, rows[0, :32])[0] == "alignment"
    condition, phrase = few.why_not(rows, weight, None, torch.zeros(64)[::2])
    assert condition == "bias"
    assert phrase.startswith("the bias is torch.float32 with stride 2 at 0x")
    assert phrase.endswith(", must be torch.bfloat16 with stride 1 at a multiple of 16")


def _plan_of(
    forward: Callable[..., torch.Tensor], has_bias: bool, logits_dtype: torch.dtype
) -> tuple[torch.nn.Linear, Plan]:
    gate = torch.nn.Linear(64, 32, bias=has_bias, dtype=torch.bfloat16).requires_grad_(False)
    torch.nn.init.normal_(gate.weight)
    bias = gate.bias if has_bias else None
    return gate, make_plan(
        gate.weight, gate=gate, own_forward=forward, own_logits_dtype=logits_dtype, bias=bias
    )


@pytest.mark.parametrize(
    ("forward", "has_bias", "logits_dtype", "difference"),
    [
        (lambda gate, x: gate(x), False, torch.bfloat16, None),
        (lambda gate, x: gate(x), True, torch.bfloat16, None),
        (lambda gate, x: gate(x), True, torch.float32, None),  # a better result than asked for
        (lambda gate, x: gate(x).float(), False, torch.bfloat16, "gives torch.float32, must give"),
        (lambda gate, x: gate(x) - gate.bias, True, torch.bfloat16, "the logits differ by"),
        (lambda gate, x: gate(x)[:, :16], False, torch.bfloat16, "gives [32, 16], must give"),
    ],
)
def test_bf16_logits_and_a_bias_are_held_against_sglangs_own(
    forward: Callable[..., torch.Tensor],
    has_bias: bool,
    logits_dtype: torch.dtype,
    difference: str | None,
    monkeypatch: pytest.MonkeyPatch,
    publish_server_args: Callable[..., None],
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate, plan = _plan_of(forward, has_bias, logits_dtype)
    if difference is not None:
        assert served(plan.decision) == NOBODY
        assert difference in plan.decision.reason
        return
    rows = torch.randn(5, 64, dtype=torch.bfloat16)
    bias = gate.bias if has_bias else None
    with torch.no_grad():
        logits, expected = plan.logits(rows, gate.weight, None, bias), gate(rows)
    assert logits is not None
    assert logits.dtype == logits_dtype
    torch.testing.assert_close(logits.bfloat16(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("setting", ["auto", "auto,fp32", "torch,fp32"])
def test_fp32_logits_where_sglangs_own_are_bf16(
    setting: str,
    has_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
    publish_server_args: Callable[..., None],
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", setting)
    gate, plan = _plan_of(lambda gate, x: gate(x), has_bias, torch.bfloat16)
    if setting == "auto":
        assert served(plan.decision) == NOBODY
        return
    assert plan.requested == setting.removesuffix(",fp32")
    assert plan.target.logits_dtype == (torch.bfloat16 if has_bias else torch.float32)
    assert plan.serves_every_m is not has_bias
    if has_bias:  # gpt-oss's: as it was
        return
    assert served(plan.decision) == ("torch", BACKENDS["torch"].rule.num_tokens)
    few = plan.decision._replace(num_tokens=range(5))
    for decision in (plan.decision, few):  # what the backend does not take is as wide
        gate.router_plan = replace(plan, decision=decision)
        for num_tokens in (4, 5):
            rows = torch.randn(num_tokens, 64, dtype=torch.bfloat16)
            with torch.no_grad():
                logits = router_logits(gate, rows)
            assert logits is not None
            assert logits.dtype == torch.float32
            assert same_as_fp64(logits, rows, gate.weight)


def test_the_warning_says_that_a_matmul_serves(
    monkeypatch: pytest.MonkeyPatch,
    publish_server_args: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch,fp32")
    monkeypatch.setattr("sglang.srt.layers.moe_router.plan._warned", set())
    gate, plan = _plan_of(lambda gate, x: gate(x), False, torch.bfloat16)
    few = plan.decision._replace(backend=BACKENDS["cluster"], num_tokens=range(1, 5))
    gate.router_plan = replace(plan, requested="cluster", decision=few)
    with torch.no_grad():
        logits = router_logits(gate, torch.randn(5, 64, dtype=torch.bfloat16))
    assert logits is not None
    assert logits.dtype == torch.float32
    (said,) = [each.getMessage() for each in caplog.records if "instead" in each.getMessage()]
    assert said.endswith("(backend cluster): torch serves instead: M is 5, must be 1 to 4.")


def test_auto_with_fp32_logits_takes_the_row_of_sglangs_own() -> None:
    own = find_model(128, 4096, logits_dtype=torch.bfloat16)
    assert own is not None
    target = Target(GPU, 90, 128, 4096)
    assert served(decided("auto", target)) == NOBODY
    for each, expected in (
        (target, ("cluster", own.auto[90].num_tokens)),
        (target._replace(sm=80), ("torch", BACKENDS["torch"].rule.num_tokens)),
        (target._replace(hidden_size=4160), ("torch", BACKENDS["torch"].rule.num_tokens)),
    ):
        found = decide("auto", each, lambda backend: None, own_logits_dtype=torch.bfloat16)
        assert served(found) == expected
    found = decide("auto", target, lambda backend: None, True, torch.bfloat16)
    assert served(found) == NOBODY  # deterministic inference


@pytest.mark.parametrize(
    ("requested", "num_experts", "why"),
    [
        ("auto", 128, "no nvcc"),
        ("cluster", 128, "no nvcc"),
        ("cluster", 100, "N is 100, must be a multiple of 16 up to 1024"),
        ("flashinfer", 128, "N is 128, must be 256"),
    ],
)
def test_fp32_logits_are_given_also_where_the_backend_cannot(
    requested: str, num_experts: int, why: str
) -> None:
    target = Target(GPU, 90, num_experts, 4096)
    found = decide(requested, target, lambda backend: "no nvcc", own_logits_dtype=torch.bfloat16)
    assert served(found) == ("torch", BACKENDS["torch"].rule.num_tokens)
    assert found.reason == why
    assert found.unavailable == (why == "no nvcc")
    assert found.disappoints(requested)
    found = decide(requested, target, lambda backend: "no nvcc")  # SGLang's own are fp32
    assert served(found) == NOBODY


def test_no_matmul_stands_in_for_a_weight_that_it_cannot_take() -> None:
    target = Target(GPU, 90, 128, 4096, torch.float8_e4m3fn)
    for requested in ("auto", "cluster"):
        found = decide(requested, target, lambda backend: None, own_logits_dtype=torch.bfloat16)
        assert served(found) == NOBODY
        assert "torch.float8_e4m3fn" in found.reason


def test_a_bias_that_no_kernel_can_read_is_left_to_sglang() -> None:
    rule = BACKENDS["cluster"].rule
    rows, weight = (torch.zeros(n, 64, dtype=torch.bfloat16) for n in (4, 32))
    room = torch.zeros(72, dtype=torch.bfloat16)
    assert rule.takes_layout(rows, weight, room[:32])
    assert not rule.takes_layout(rows, weight, room[1:33])
    assert rule.takes_layout(rows, weight, room[1:33], addresses=False)
    assert not rule.takes_layout(rows, weight, room[:64:2])
    assert not rule.takes_layout(rows, weight, room[:32].float())
    assert BACKENDS["torch"].rule.takes_layout(rows, weight, room[:32].float())
