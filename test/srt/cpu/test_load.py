"""Loading a kernel: limits, what it leaves of the caller's state, and what a person is told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch

from sglang.srt.layers.moe_router import backends
from sglang.srt.layers.moe_router.backends import BACKENDS, Backend, load_kernel
from sglang.srt.layers.moe_router.isolation import run_isolated
from sglang.srt.layers.moe_router.jit import BuildError
from sglang.srt.layers.moe_router.kernel import Loaded, Target

CPU = torch.device("cpu")
TARGET = Target(CPU, None, 16, 64)


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_loaded", {})


def _loading(name: str, load: Callable[[Target], Loaded]) -> Backend:
    """The backend's own record, but for how it loads."""
    return dataclasses.replace(BACKENDS[name], load=load)


def _raises(error: Exception) -> Callable[[Target], Loaded]:
    def load(target: Target) -> Loaded:
        raise error

    return load


def test_a_load_that_hangs_is_given_up_and_runs_no_kernel_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def load(target: Target) -> Loaded:
        time.sleep(2)
        return lambda *operands: ran.append(operands), (1,)

    monkeypatch.setattr(backends, "LOAD_LIMIT_S", 0.5)
    started = time.monotonic()
    kernel = dataclasses.replace(_loading("flashinfer", load), guards_device=True)
    reason = load_kernel(kernel, TARGET)
    assert time.monotonic() - started < 1.5
    assert isinstance(reason, str)
    assert "takes more than 0 s" in reason or "takes more than 1 s" in reason
    time.sleep(2.5)
    assert ran == []


@pytest.mark.parametrize("name", ["cluster", "flashinfer", "sgl_kernel"])
@pytest.mark.parametrize(
    ("error", "hinted"), [(RuntimeError("ninja failed"), True), (BuildError("not yours"), False)]
)
def test_a_hint_fits_its_reason(name: str, error: Exception, hinted: bool) -> None:
    """What to install is said where a library fails, not where the error says what to do."""
    reason = load_kernel(_loading(name, _raises(error)), TARGET)
    assert isinstance(reason, str)
    assert str(error) in reason
    hint = BACKENDS[name].hint
    assert not hint or (hint in reason) is hinted


def test_wrong_numbers_are_said_without_a_hint() -> None:
    def load(target: Target) -> Loaded:
        return lambda hidden_states, weight, logits, pdl, bias=None: logits.zero_(), (1, 4)

    kernel = dataclasses.replace(_loading("flashinfer", load), guards_device=True)
    reason = load_kernel(kernel, TARGET)
    assert isinstance(reason, str)
    assert "off by 1.0e+00 at M = 1" in reason
    assert "install" not in reason


def test_a_load_sees_and_changes_nothing_of_the_callers() -> None:
    seen: dict[str, object] = {}

    def load(target: Target) -> Loaded:
        seen.update(
            device=torch.empty(1).device.type,
            inference=torch.is_inference_mode_enabled(),
            autocast=torch.is_autocast_enabled("cpu"),
            grad=torch.is_grad_enabled(),
        )

        def run(
            hidden_states: torch.Tensor,
            weight: torch.Tensor,
            logits: torch.Tensor,
            pdl: bool,
            bias: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return logits.copy_(hidden_states.double() @ weight.double().t())

        return run, (1, 4)

    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    kernel = dataclasses.replace(_loading("flashinfer", load), guards_device=True)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(load_kernel(kernel, TARGET), str)
        assert torch.empty(1).device.type == "meta"
        assert torch.is_inference_mode_enabled()
    assert seen == {"device": "cpu", "inference": False, "autocast": False, "grad": False}
    assert torch.equal(torch.randn(4), expected)


def test_what_runs_isolated_gives_its_result_or_its_error() -> None:
    assert run_isolated(lambda: 7, CPU, 5) == 7
    with pytest.raises(TimeoutError, match="its own"):
        run_isolated(lambda: _raises(TimeoutError("its own"))(TARGET), CPU, 5)
