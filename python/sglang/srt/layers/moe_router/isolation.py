"""Runs what a load needs where it meets nothing of the caller's, and the caller nothing of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

import torch

_T = TypeVar("_T")


class LimitExceededError(Exception):
    """It takes too long."""


def run_isolated(function: Callable[[], _T], device: torch.device, limit_s: float) -> _T:
    """The result of `function`, called in a thread of its own, without gradients.

    None of the caller's modes is on there: autocast, inference mode, a device or dispatch
    mode, a stream. Nor is the memory region of SGLang's `--enable-memory-saver`, which is the
    thread's: what a library allocates in it and keeps would go to sleep with the weights.

    Args:
        function: may raise, whatever it likes. It is not stopped at the limit, so what it does
            by then must do no harm.
        device: is the current one there.
        limit_s: seconds after which nobody waits any longer.

    Raises:
        LimitExceededError: the limit; and whatever `function` raises.
    """
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with torch.no_grad():
                outcome.set_result(function())
        except BaseException as error:  # the caller's to handle
            outcome.set_exception(error)

    threading.Thread(target=work, name="router-gemm-load", daemon=True).start()
    try:
        return outcome.result(limit_s)
    except FutureTimeoutError:
        if outcome.done():  # a timeout of the function's own
            raise
        raise LimitExceededError(f"it takes more than {limit_s:.0f} s") from None
