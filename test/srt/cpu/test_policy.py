"""The policy: a table and a pure function, every condition broken in turn."""

from __future__ import annotations

import pytest
import torch

from sglang.srt.layers.moe_router.call import RouterGemmCall
from sglang.srt.layers.moe_router.policy import (
    BACKENDS,
    RULES,
    considered,
    decisions_by_num_tokens,
    refuse,
    select_backend,
)

READY = dict.fromkeys(RULES)
BLACKWELL = RouterGemmCall("cuda", sm=100, num_tokens=8, num_experts=256, hidden_size=7168)
HOPPER = BLACKWELL._replace(sm=90)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, None])
@pytest.mark.parametrize("sm", [100, 103])
def test_auto_takes_flashinfer_on_blackwell(sm: int, num_tokens: int | None) -> None:
    call = BLACKWELL._replace(sm=sm, num_tokens=num_tokens)
    assert select_backend(call, "auto", READY) == ("flashinfer", None)


@pytest.mark.parametrize("sm", [80, 89, 101, 110, 120])
def test_auto_leaves_other_gpus_to_sglang(sm: int) -> None:
    backend, refusal = select_backend(BLACKWELL._replace(sm=sm), "auto", READY)
    assert backend is None
    assert refusal is not None
    assert refusal.reason == "auto takes cluster on SM 90, flashinfer on SM 100 or 103 only"


@pytest.mark.parametrize("sm", [90, 100, 103, 120])
def test_a_forced_flashinfer_goes_wherever_it_is_available(sm: int) -> None:
    assert select_backend(BLACKWELL._replace(sm=sm), "flashinfer", READY) == ("flashinfer", None)


# Each condition of the gate, broken alone: the field, its value, the condition's name
# and what a person is told.
BROKEN = [
    ({"num_tokens": 0}, "num_tokens", "M is 0, must be 1 to 16"),
    ({"num_tokens": 17}, "num_tokens", "M is 17, must be 1 to 16"),
    ({"num_experts": 384}, "num_experts", "N is 384, must be 256"),
    ({"hidden_size": 6144}, "hidden_size", "K is 6144, must be 7168"),
    (
        {"hidden_states_dtype": torch.float16},
        "dtype",
        "hidden_states is torch.float16, must be torch.bfloat16",
    ),
    (
        {"weight_dtype": torch.float32},
        "dtype",
        "weight is torch.float32, must be torch.bfloat16",
    ),
    (
        {"same_device": False},
        "same_device",
        "hidden_states and weight are on different devices",
    ),
    ({"device_type": "cpu", "sm": None}, "device", "device is cpu, must be cuda"),
    ({"matching_shapes": False}, "shapes", "hidden_states and weight must be [M, K] and [N, K]"),
    (
        {"row_major": False},
        "row_major",
        "hidden_states and weight must be dense and row-major",
    ),
    ({"aligned": False}, "aligned", "tensors must start at a multiple of 16 bytes"),
    (
        {"deterministic_inference": True},
        "deterministic_inference",
        "deterministic inference is on",
    ),
    (
        {"context_parallel": True},
        "context_parallel",
        "the batch is a context-parallel prefill",
    ),
]


@pytest.mark.parametrize("requested", ["auto", "flashinfer"])
@pytest.mark.parametrize(("change", "condition", "reason"), BROKEN)
def test_each_condition_refuses_alone(
    change: dict[str, object], condition: str, reason: str, requested: str
) -> None:
    call = BLACKWELL._replace(**change)  # type: ignore[arg-type]
    assert select_backend(call, requested, READY) == (None, (condition, reason))


def test_a_rocm_gpu_has_no_sm() -> None:
    backend, refusal = select_backend(BLACKWELL._replace(sm=None), "flashinfer", READY)
    assert backend is None
    assert refusal is not None
    assert refusal.reason == "SM is None, must be 90 or newer"


@pytest.mark.parametrize("requested", ["auto", "flashinfer"])
def test_an_unavailable_kernel_refuses(requested: str) -> None:
    unavailable = READY | {"flashinfer": "flashinfer-python is not installed"}
    decision = select_backend(BLACKWELL, requested, unavailable)
    assert decision == (None, ("unavailable", "flashinfer-python is not installed"))


@pytest.mark.parametrize("unknown", [{"num_tokens": None}, {"aligned": None}])
def test_what_only_the_kernel_will_know_is_left_open(unknown: dict[str, None]) -> None:
    assert refuse("flashinfer", BLACKWELL._replace(**unknown), None) is None


@pytest.mark.parametrize(
    ("num_experts", "hidden_size", "num_tokens", "serves"),
    [
        (256, 7168, 16, True),
        (384, 7168, 1, True),
        (128, 7168, 1, False),
        (256, 6144, 1, False),
        (256, 7168, 17, False),
    ],
)
def test_sgl_kernel(num_experts: int, hidden_size: int, num_tokens: int, serves: bool) -> None:
    call = RouterGemmCall("cuda", 90, num_tokens, num_experts, hidden_size)
    assert (select_backend(call, "sgl_kernel", READY).backend == "sgl_kernel") is serves
    assert select_backend(call._replace(sm=89), "sgl_kernel", READY).backend is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 4096])
def test_torch_serves_every_16_bit_matrix(device_type: str, num_tokens: int) -> None:
    call = RouterGemmCall(device_type, None, num_tokens, 100, 999, row_major=False, aligned=False)
    assert select_backend(call, "torch", READY) == ("torch", None)
    half = call._replace(hidden_states_dtype=torch.float16)
    assert select_backend(half, "torch", READY).refusal == (
        "dtype",
        "hidden_states and weight differ in dtype",
    )
    assert select_backend(call._replace(deterministic_inference=True), "torch", READY)[0] is None


@pytest.mark.parametrize("requested", BACKENDS)
@pytest.mark.parametrize("call", [HOPPER, BLACKWELL, BLACKWELL._replace(sm=120)])
def test_the_availability_of_no_other_backend_is_asked(
    call: RouterGemmCall, requested: str
) -> None:
    known = dict.fromkeys(considered(requested, call.sm))
    assert select_backend(call, requested, known) == select_backend(call, requested, READY)
    for name in known:
        gone = known | {name: "not installed"}
        assert select_backend(call, requested, gone).backend != name


@pytest.mark.parametrize("call", [HOPPER, BLACKWELL])
def test_off_is_off(call: RouterGemmCall) -> None:
    assert select_backend(call, "off", READY).backend is None


@pytest.mark.parametrize("requested", BACKENDS)
def test_the_ranges_say_what_the_decision_is_for_every_m(requested: str) -> None:
    """`decisions_by_num_tokens`, which doctor and the log print, against M = 1 to 200."""
    for call in (BLACKWELL, HOPPER, RouterGemmCall("cpu", None, 1, 256, 7168)):
        told = {}
        for tokens, decision in decisions_by_num_tokens(call, requested, READY):
            first, _, last = tokens.removesuffix("+").partition("-")
            end = int(last) if last else 200
            told.update(dict.fromkeys(range(int(first), end + 1), decision.backend))
        decided = {
            m: select_backend(call._replace(num_tokens=m), requested, READY).backend
            for m in range(1, 201)
        }
        assert told == decided


KIMI = HOPPER._replace(num_experts=384)


@pytest.mark.parametrize("sm", [90, 100, 103, 120])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 128, None])
@pytest.mark.parametrize(
    ("num_experts", "hidden_size"),
    [(256, 7168), (384, 7168), (128, 7168), (256, 6144), (160, 5120), (16, 512), (1024, 8192)],
)
def test_cluster_serves_multiples_of_16_and_512(
    num_experts: int, hidden_size: int, num_tokens: int | None, sm: int
) -> None:
    call = RouterGemmCall("cuda", sm, num_tokens, num_experts, hidden_size)
    assert select_backend(call, "cluster", READY) == ("cluster", None)


@pytest.mark.parametrize(
    ("change", "condition", "reason"),
    [
        ({"sm": 89}, "sm", "SM is 89, must be 90 or newer"),
        ({"num_tokens": 129}, "num_tokens", "M is 129, must be 0 to 128"),
        ({"num_experts": 8}, "num_experts", "N is 8, must be a multiple of 16 up to 1024"),
        ({"num_experts": 250}, "num_experts", "N is 250, must be a multiple of 16 up to 1024"),
        ({"num_experts": 1040}, "num_experts", "N is 1040, must be a multiple of 16 up to 1024"),
        ({"hidden_size": 7000}, "hidden_size", "K is 7000, must be a multiple of 512 up to 8192"),
        ({"hidden_size": 8704}, "hidden_size", "K is 8704, must be a multiple of 512 up to 8192"),
        ({"row_major": False}, "row_major", "hidden_states and weight must be dense and row-major"),
        ({"deterministic_inference": True}, None, None),
    ],
)
def test_cluster_refuses(change: dict[str, object], condition: str | None, reason: str) -> None:
    refusal = refuse("cluster", HOPPER._replace(**change), None)
    assert refusal is not None
    if condition is not None:
        assert refusal == (condition, reason)


@pytest.mark.parametrize(
    ("num_experts", "hidden_size", "first", "last"),
    [
        (256, 7168, 1, 128),
        (384, 7168, 1, 16),
        (256, 6144, 1, 16),
        (160, 5120, 2, 16),
        (128, 7168, 4, 16),
    ],
)
def test_auto_takes_cluster_on_hopper(
    num_experts: int, hidden_size: int, first: int, last: int
) -> None:
    call = HOPPER._replace(num_experts=num_experts, hidden_size=hidden_size)
    for num_tokens in (first, last, None):
        decision = select_backend(call._replace(num_tokens=num_tokens), "auto", READY)
        assert decision == ("cluster", None)
    for num_tokens in (first - 1, last + 1):
        decision = select_backend(call._replace(num_tokens=num_tokens), "auto", READY)
        assert decision.refusal is not None
        assert decision.refusal.reason.startswith(f"M is {num_tokens}, ")
    gone = READY | {"cluster": "apache-tvm-ffi is not installed"}
    assert select_backend(call._replace(num_tokens=last), "auto", gone) == (
        None,
        ("unavailable", "apache-tvm-ffi is not installed"),
    )


def test_auto_leaves_other_shapes_on_hopper_to_sglang() -> None:
    assert select_backend(HOPPER._replace(num_experts=64), "auto", READY) == (
        None,
        (
            "auto_shape",
            "N, K is 64, 7168, auto takes cluster for "
            "256, 7168 or 384, 7168 or 256, 6144 or 160, 5120 or 128, 7168",
        ),
    )


@pytest.mark.parametrize("sm", [100, 103, 120])
def test_auto_takes_cluster_nowhere_else(sm: int) -> None:
    assert select_backend(HOPPER._replace(sm=sm), "auto", READY).backend != "cluster"
    assert select_backend(KIMI._replace(sm=sm), "auto", READY).backend is None


@pytest.mark.parametrize(
    ("change", "condition"),
    [({"num_experts": 384}, "num_experts"), ({"num_tokens": 17}, "num_tokens")],
)
def test_auto_stays_within_what_was_measured(change: dict[str, int], condition: str) -> None:
    decision = select_backend(BLACKWELL._replace(**change), "auto", READY)
    assert decision.backend is None
    assert decision.refusal is not None
    assert decision.refusal.condition == condition


def test_the_ranges_as_text() -> None:
    for call, first in ((BLACKWELL, "1-16 flashinfer"), (HOPPER, "1-128 cluster")):
        served = decisions_by_num_tokens(call, "auto", READY)
        tokens, backend = first.split()
        assert [(each.tokens, each.decision.backend) for each in served] == [
            (tokens, backend),
            (f"{int(tokens[2:]) + 1}+", None),
        ]
