"""The ranks of one model take the same backend, or none of them takes any.

Under tensor parallelism each rank picks the experts of a token from its own logits, so the
logits must have the same bits on all ranks. What one cannot have (no nvcc on its node, say),
none takes.

The ranks meet in the store of SGLang's process group, not in a collective: a rank that lacks
the plugin would never come to that, and all would hang.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import torch
from torch.distributed import Store, distributed_c10d

# From one rank's plan to another's: they build the same model, just after they have met in
# SGLang's own start-up.
PRESENCE_LIMIT_S = 60.0
# A rank that has come may still have to compile: see `backends.LOAD_LIMIT_S`.
ANSWER_LIMIT_S = 280.0
_POLL_S = 0.05

_rounds: Counter[tuple[object, ...]] = Counter()
_absent: set[tuple[tuple[int, ...], int]] = set()


class Round:
    """One decision that the ranks of SGLang's tensor-parallel group make together.

    Made before the load, which may take a rank minutes, so that the others know that it will
    answer. With one rank, or outside of a server, it does nothing.

    Args:
        what: what is decided, the same text on every rank.
    """

    def __init__(self, what: str) -> None:
        group = _tp_group()
        self._ranks: tuple[int, ...] = () if group is None else tuple(group.ranks)
        if len(self._ranks) < 2:
            return
        self._rank: int = self._ranks[group.rank_in_group]
        _rounds[self._ranks, what] += 1
        self._prefix = f"router_gemm/{self._ranks}/{what}/{_rounds[self._ranks, what]}"
        self._store: Store = distributed_c10d._get_default_store()
        self._say("present", True)

    def disagreement(self, backend: str | None, reason: str) -> str | None:
        """Tells the others what this rank would take, and waits for what they would.

        Args:
            backend: the backend's name, or None.
            reason: why none, as a phrase.

        Returns:
            Why no rank may take a backend, as a phrase that names the rank; None if all agree, or
            this one has none anyway.
        """
        if len(self._ranks) < 2:
            return None
        self._say("answer", [backend, reason])
        if backend is None:  # whatever the others have: nobody is waited for
            self._say("verdict", f"rank {self._rank} takes none: {reason}")
            return None
        verdict = self._compare(backend)
        self._say("verdict", verdict)
        if verdict is not None:
            return verdict
        # A rank that gave up on another must not be alone with that.
        for rank in self._others():
            if not self._wait(self._key("verdict", rank), ANSWER_LIMIT_S):
                return f"rank {rank} does not answer within {ANSWER_LIMIT_S:.0f} s"
            verdict = verdict or self._heard("verdict", rank)
        return verdict

    def _compare(self, backend: str) -> str | None:
        for rank in self._others():
            if not self._came(rank):
                return (
                    f"rank {rank} has no part in it: is the plugin installed there, and "
                    "SGLANG_ROUTER_GEMM_BACKEND not off?"
                )
            if not self._wait(self._key("answer", rank), ANSWER_LIMIT_S):
                return f"rank {rank} does not answer within {ANSWER_LIMIT_S:.0f} s"
            theirs, why = self._heard("answer", rank)
            if theirs != backend:
                return f"rank {rank} takes {theirs or f'none: {why}'}, rank {self._rank} {backend}"
        return None

    def _others(self) -> list[int]:
        return [rank for rank in self._ranks if rank != self._rank]

    def _say(self, kind: str, value: Any) -> None:
        self._store.set(self._key(kind, self._rank), json.dumps(value))

    def _heard(self, kind: str, rank: int) -> Any:
        return json.loads(self._store.get(self._key(kind, rank)))

    def _came(self, rank: int) -> bool:
        """Nobody is waited for twice: each shape of the model has a round of its own."""
        limit_s = 0.0 if (self._ranks, rank) in _absent else PRESENCE_LIMIT_S
        came = self._wait(self._key("present", rank), limit_s)
        if not came:
            _absent.add((self._ranks, rank))
        return came

    def _wait(self, key: str, limit_s: float) -> bool:
        # Not the store's own wait: other threads of this process need the store meanwhile.
        deadline = time.monotonic() + limit_s
        while not self._store.check([key]):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _key(self, kind: str, rank: int) -> str:
        return f"{self._prefix}/{kind}/{rank}"


def _tp_group() -> Any:
    """SGLang's tensor-parallel group; None where there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from sglang.srt.distributed import parallel_state

    try:
        return parallel_state.get_tp_group()
    except (AssertionError, RuntimeError, ValueError):  # releases differ in how they say no
        return None
