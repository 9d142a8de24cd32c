"""The plan of a gate: which backend serves its calls, for which M. Decided once, at load.

`decide` is the one place where that is decided, over plain values. A call then asks its
plan only what changes from call to call: M, layout and alignment, context parallelism.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

from sglang.srt.layers.moe_router.backends import (
    BACKENDS,
    LOAD_LIMIT_S,
    Backend,
    either,
    find_kernel,
    is_readable,
    load_kernel,
    refuse_kernel,
)
from sglang.srt.layers.moe_router.environ import (
    AUTO,
    OFF,
    asked_logits_dtype,
    pdl_enabled,
    requested_backend,
)
from sglang.srt.layers.moe_router.isolation import run_isolated
from sglang.srt.layers.moe_router.kernel import (
    ALIGNMENT_BYTES,
    Run,
    Target,
    device_sm,
    empty_logits,
    fits,
)
from sglang.srt.layers.moe_router.models import MODELS, find_model
from sglang.srt.layers.moe_router.ops import router_gemm
from sglang.srt.layers.moe_router.packages import first_line
from sglang.srt.layers.moe_router.ranks import Round
from sglang.srt.layers.moe_router.twin import find_difference

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

try:
    from sglang.srt.runtime_context import get_exec
except ImportError:  # SGLang < 0.5.17
    from sglang.srt.server_args import get_global_server_args

    def _deterministic_inference() -> bool:
        return get_global_server_args().enable_deterministic_inference
else:

    def _deterministic_inference() -> bool:
        return get_exec().deterministic.enable_deterministic_inference


logger = logging.getLogger(__name__)

_NO_TOKENS, _EVERY_M = range(0), range(2**63)
_OWN_PATH = "SGLang's own path"


# ---- The decision ------------------------------------------------------------------------------


class Decision(NamedTuple):
    """Who serves the calls with one weight."""

    backend: Backend | None
    """None: SGLang's own path serves them all."""
    num_tokens: range
    """The M that `backend` serves."""
    reason: str
    """Why SGLang's own path serves the rest, as a phrase for a person."""
    unavailable: bool = False
    """The backend would be taken if it were installed, built and loaded."""
    stands_in: bool = False
    """`backend` is a matmul in place of one that cannot serve, which `reason` explains: whoever
    asks for other logits than SGLang's own gets them all the same."""

    def disappoints(self, requested: str) -> bool:
        """Whether a backend that was asked for, or that `auto` would take, does not serve."""
        if self.backend is not None:
            return self.stands_in
        return self.unavailable or requested in BACKENDS

    def ranges(self) -> list[tuple[str, str | None]]:
        """Every M ≥ 1 as a person writes it ("1-16", "17+"), with the backend's name or None."""
        name = self.backend.name if self.backend is not None else None
        first, last = max(self.num_tokens.start, 1), self.num_tokens.stop - 1
        if name is None:
            return [("1+", None)]
        found: list[tuple[str, str | None]] = [(f"1-{first - 1}", None)] if first > 1 else []
        if last >= _UNLIMITED:
            return [*found, (f"{first}+", name)]
        return [*found, (f"{first}-{last}", name), (f"{last + 1}+", None)]


_UNLIMITED = BACKENDS["torch"].rule.num_tokens.stop - 1


def decide(
    requested: str,
    target: Target,
    unavailable: Callable[[Backend], str | None],
    deterministic: bool = False,
    own_logits_dtype: torch.dtype | None = None,
) -> Decision:
    """Decides who serves the calls with a weight.

    Args:
        requested: what the user asked for: a backend's name, `auto` or `off`.
        target: the weight's device, SM, shape and dtype.
        unavailable: why a backend's kernel cannot be called there, None if it can. Asked of
            the one backend that everything else speaks for.
        deterministic: the server runs with `--enable-deterministic-inference`.
        own_logits_dtype: of what SGLang's own gate gives, where that may be another.
    """
    own_gate = target._replace(logits_dtype=own_logits_dtype or target.logits_dtype).gate
    matmul = BACKENDS["torch"] if own_gate != target.gate else None
    if requested == OFF:
        return Decision(None, _NO_TOKENS, "it is switched off")
    if deterministic:
        return Decision(None, _NO_TOKENS, "deterministic inference is on")
    if requested == AUTO:
        model = find_model(*own_gate)
        auto = model.auto.get(target.sm) if model is not None and target.sm is not None else None
        if auto is not None:
            backend, num_tokens = BACKENDS[auto.backend], auto.num_tokens
        elif matmul is not None:
            backend, num_tokens = matmul, matmul.rule.num_tokens
        else:
            return Decision(None, _NO_TOKENS, _why_not_auto(target))
        limit = f"auto takes {backend.name} for M = {either(num_tokens)}"
    else:
        backend, num_tokens = BACKENDS[requested], BACKENDS[requested].rule.num_tokens
        limit = f"M must be {either(num_tokens)}"
    refusal = backend.rule.refuse_weight(target)
    reason = refusal or unavailable(backend)
    if reason is None:
        return Decision(backend, num_tokens, limit)
    if matmul is not None and matmul.rule.refuse_weight(target) is None:
        num_tokens = matmul.rule.num_tokens
        return Decision(matmul, num_tokens, reason, unavailable=refusal is None, stands_in=True)
    return Decision(None, _NO_TOKENS, reason, unavailable=refusal is None)


def _why_not_auto(target: Target) -> str:
    if target.device.type != "cuda":
        return f"device is {target.device.type}, must be cuda"
    taken: dict[str, dict[int, None]] = {}
    for model in MODELS:
        for sm, auto in model.auto.items():
            taken.setdefault(auto.backend, {})[sm] = None
    if not any(target.sm in sms for sms in taken.values()):
        rows = ", ".join(f"{name} on SM {either(list(sms))}" for name, sms in taken.items())
        return f"auto takes {rows} only"
    alike = [
        Target(target.device, target.sm, *model.gate)
        for model in MODELS
        if target.sm in model.auto and model.form == target.form
    ]
    shapes = either(alike) if alike else "none like it"
    return f"the gate is {target}, auto takes {shapes} on SM {target.sm}"


def deterministic_inference() -> bool:
    """Whether the server runs with `--enable-deterministic-inference`."""
    try:
        return bool(_deterministic_inference())
    except ValueError:  # no ServerArgs published: the gate is used outside of a server
        return False


# ---- The plan ----------------------------------------------------------------------------------


class OfThisProcess:
    """What lies on a module and has a loaded kernel: a copy shares it, a pickle has None."""

    def __deepcopy__(self, memo: object) -> OfThisProcess:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # in another process nothing is loaded yet


@dataclass(frozen=True, eq=False)
class Plan(OfThisProcess):
    """A decision, and what to call. It never changes; gates of one shape share it."""

    requested: str
    target: Target
    decision: Decision
    run: Run | None
    """The kernel itself, for a plain eager call. None where no backend serves."""
    pdl: bool
    own_logits_dtype: torch.dtype
    """Of what SGLang's own gate gives."""
    looked_at: range = field(init=False)
    """The M that a call is looked at for. `auto` leaves every other to SGLang at once."""

    def __post_init__(self) -> None:
        quick = self.requested == AUTO and self.decision.backend is not None
        quick = quick and not self.serves_every_m
        object.__setattr__(self, "looked_at", self.decision.num_tokens if quick else _EVERY_M)

    @property
    def serves_every_m(self) -> bool:
        """Whether `matmul_fp32` must take what the backend does not: SGLang's logits are others."""
        other = self.own_logits_dtype != self.target.logits_dtype
        return other and self.decision.backend is not None

    @property
    def is_final(self) -> bool:
        """Whether another weight would be left to SGLang as well: the gate itself is not ours."""
        return self.decision.backend is None and self.decision.unavailable

    def is_for(self, weight: torch.Tensor) -> bool:
        """Whether it was made for such a weight. A gate's weight may be replaced."""
        target = self.target
        return (
            weight.dtype == target.dtype
            and weight.device == target.device
            and weight.shape == (target.num_experts, target.hidden_size)
        )

    def logits(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        forward_batch: ForwardBatch | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Logits `[M, N]` of this call; None where SGLang's own path must serve it.

        Args:
            hidden_states: `[M, K]`.
            weight: `[N, K]`, one that the plan `is_for`.
            forward_batch: SGLang's batch, where the gate was given it.
            bias: `[N]`, if the plan's target has one.
        """
        backend = self.decision.backend
        if backend is None:
            return None
        compiling, num_tokens = torch.compiler.is_compiling(), hidden_states.shape[0]
        # In a trace M may be symbolic: the op looks at it when it runs.
        is_open = compiling and not has_static_value(num_tokens)
        served = is_open or num_tokens in self.decision.num_tokens
        plain = not compiling and is_plain_eager(hidden_states)
        if (
            served
            and not _is_context_parallel(forward_batch)
            and backend.rule.takes_layout(hidden_states, weight, bias, plain)
        ):
            dtype = self.target.logits_dtype
            if not plain or self.run is None:
                return router_gemm(backend, hidden_states, weight, bias, dtype)
            logits = empty_logits(hidden_states, weight, dtype)
            return self.run(hidden_states, weight, logits, self.pdl, bias)
        if not compiling and self.requested != AUTO:
            why_not = self.why_not(hidden_states, weight, forward_batch, bias)
            _warn_once(self.requested, *why_not, "torch" if self.serves_every_m else _OWN_PATH)
        return None

    def why_not(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        forward_batch: ForwardBatch | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[str, str]:
        """The condition that failed, by name, and a phrase with what it was and must be."""
        num_tokens = self.decision.num_tokens
        if _is_context_parallel(forward_batch):
            return "context_parallel", "the batch is a context-parallel prefill"
        if hidden_states.shape[0] not in num_tokens:
            return "num_tokens", f"M is {hidden_states.shape[0]}, must be {either(num_tokens)}"
        if hidden_states.device != weight.device:
            return "device", f"hidden_states is on {hidden_states.device}, weight {weight.device}"
        needed = torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype
        if hidden_states.dtype != needed:
            return "dtype", f"hidden_states is {hidden_states.dtype}, must be {needed}"
        if not fits(hidden_states, weight):
            shapes = f"{list(hidden_states.shape)} and {list(weight.shape)}"
            return "shape", f"hidden_states and weight are {shapes}, must be [M, K] and [N, K]"
        if not (hidden_states.is_contiguous() and weight.is_contiguous()):
            return "layout", "hidden_states and weight must be dense and row-major"
        if bias is not None and not is_readable(bias):
            what = f"{bias.dtype} with stride {bias.stride()[0]} at {bias.data_ptr():#x}"
            needed = f"{torch.bfloat16} with stride 1 at a multiple of {ALIGNMENT_BYTES}"
            return "bias", f"the bias is {what}, must be {needed}"
        return "alignment", f"tensors must start at a multiple of {ALIGNMENT_BYTES} bytes"


def _is_context_parallel(forward_batch: ForwardBatch | None) -> bool:
    """Whether the batch is a context-parallel prefill, which SGLang routes by itself."""
    return getattr(forward_batch, "attn_cp_metadata", None) is not None


# Bound once: these run on every eager call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_profiling = torch._C._autograd._profiler_enabled
_grad_enabled = torch.is_grad_enabled


def is_plain_eager(hidden_states: torch.Tensor, profiled: bool = False) -> bool:
    """Whether a kernel may be called without the dispatcher, which takes the host 10 µs.

    It may not where somebody wants to see the op: a mode, a transform, autograd, a subclass of
    Tensor; the profiler, unless `profiled` says that there is no op to see.
    """
    return not (
        _grad_enabled()
        or _dispatch_modes()
        or _function_modes()
        or (not profiled and _profiling())
        or _transforms() is not None
        or type(hidden_states) is not torch.Tensor
    )


# ---- Making it ---------------------------------------------------------------------------------

_plans: dict[tuple[object, ...], Plan] = {}
_warned: set[tuple[str, str]] = set()


OwnForward = Callable[..., torch.Tensor]


def make_plan(
    weight: torch.Tensor,
    requested: str | None = None,
    gate: torch.nn.Module | None = None,
    own_forward: OwnForward | None = None,
    own_logits_dtype: torch.dtype = torch.float32,
    bias: torch.Tensor | None = None,
) -> Plan:
    """The plan of a gate with this weight; loads the kernel. For model load only.

    Args:
        weight: the gate's `[N, K]`, on the device where it will be used, or not there yet.
        requested: a backend, instead of what the user asked for; nothing is logged then, and
            the other ranks are not asked.
        gate: whose forward is replaced; with `own_forward` a kernel is held against it.
        own_forward: that forward, `own_forward(gate, hidden_states)`.
        own_logits_dtype: what it gives. The user may ask for another.
        bias: the gate's `[N]`, if it adds one.

    Raises:
        ValueError: an environment variable holds a value that it does not have.
    """
    device = weight.device
    if device.type != "cuda" and torch.cuda.is_available():
        # Made on the CPU or the meta device, and moved later.
        device = torch.device("cuda", torch.cuda.current_device())
    asked = requested or requested_backend()
    settings = deterministic_inference(), pdl_enabled()
    logits_dtype = own_logits_dtype
    if requested is None:
        logits_dtype = asked_logits_dtype(own_logits_dtype, bias is not None)
    target = _target(weight, device, logits_dtype, bias is not None)
    key = (asked, target, type(gate), own_forward, own_logits_dtype, *settings)
    if key not in _plans:
        ranks = Round(str(target)) if requested is None else None

        def unavailable(backend: Backend) -> str | None:
            return backend.missing(target.sm) or _reason(load_kernel(backend, target))

        plan = _plan(asked, target, unavailable, own_logits_dtype)
        if gate is not None and own_forward is not None:
            plan = _without(plan, _difference(plan, gate, own_forward))
        if ranks is not None:
            plan = _agreed(plan, ranks)
        _plans[key] = plan
        if requested is None:
            _announce(plan)
    return _plans[key]


def _difference(plan: Plan, gate: torch.nn.Module, own_forward: OwnForward) -> str | None:
    run, target, num_tokens = plan.run, plan.target, plan.decision.num_tokens
    if run is None:
        return None
    kernel = run  # not None, for the closure
    try:
        return run_isolated(
            lambda: find_difference(gate, own_forward, kernel, target, num_tokens),
            target.device,
            LOAD_LIMIT_S,
        )
    except Exception as error:  # whatever a gate that is not as expected raises
        return f"SGLang's own gate cannot be compared ({first_line(error)})"


def _agreed(plan: Plan, ranks: Round) -> Plan:
    """The plan, or one without a backend where a rank has another."""
    backend = plan.decision.backend
    reason = ranks.disagreement(backend.name if backend is not None else None, plan.decision.reason)
    if backend is not None and reason is not None:
        refuse_kernel(backend, plan.target, reason)
    return _without(plan, reason)


def _without(plan: Plan, reason: str | None) -> Plan:
    """The plan without its backend, where there is a reason."""
    if reason is None or plan.decision.backend is None:
        return plan
    return replace(plan, decision=Decision(None, _NO_TOKENS, reason, unavailable=True), run=None)


def find_plan(weight: torch.Tensor, before: Plan) -> Plan:
    """The plan for a weight that came after the load, of a gate that had one. It loads nothing."""
    target = _target(weight, weight.device, before.target.logits_dtype, before.target.bias)

    def unavailable(backend: Backend) -> str | None:
        return _reason(find_kernel(backend, target))

    plan = _plan(requested_backend(), target, unavailable, before.own_logits_dtype)
    _warn_at_load(plan)
    return plan


def _plan(
    requested: str,
    target: Target,
    unavailable: Callable[[Backend], str | None],
    own_logits_dtype: torch.dtype,
) -> Plan:
    settings = deterministic_inference(), own_logits_dtype
    decision = decide(requested, target, unavailable, *settings)
    kernel: Run | str = "none"
    if decision.backend is not None:
        kernel = find_kernel(decision.backend, target)
    run = None if isinstance(kernel, str) else kernel
    return Plan(requested, target, decision, run, pdl_enabled(), own_logits_dtype)


def _target(
    weight: torch.Tensor, device: torch.device, logits_dtype: torch.dtype, bias: bool
) -> Target:
    num_experts, hidden_size = weight.shape
    sm = device_sm(device)
    return Target(device, sm, num_experts, hidden_size, weight.dtype, logits_dtype, bias)


def _reason(kernel: Run | str) -> str | None:
    return kernel if isinstance(kernel, str) else None


def _announce(plan: Plan) -> None:
    """Says once a shape, for each rank, who serves which M; warns where ours cannot."""
    warned, decision = _warn_at_load(plan), plan.decision
    if plan.target.device.type != "cuda":
        return
    others = "torch" if plan.serves_every_m else "SGLang"
    served = ", ".join(f"M {tokens} {name or others}" for tokens, name in decision.ranges())
    logger.info(
        "Router GEMM %s on SM %s: %s (backend %s, PDL %s)",
        plan.target,
        plan.target.sm,
        served if warned or decision.backend is not None else f"{served}: {decision.reason}",
        plan.requested,
        "on" if plan.pdl else "off",
    )


def _warn_at_load(plan: Plan) -> bool:
    """Warns where what was asked for, or what `auto` would take, cannot serve; says if so."""
    decision = plan.decision
    if not decision.disappoints(plan.requested):
        return False
    server = _OWN_PATH if decision.backend is None else decision.backend.name
    _warn_once(plan.requested, decision.reason, decision.reason, server)
    return True


def _warn_once(requested: str, condition: str, reason: str, server: str) -> None:
    """One warning a process for each condition, whatever the values that failed it."""
    if (requested, condition) in _warned:
        return
    _warned.add((requested, condition))
    logger.warning("Router GEMM (backend %s): %s serves instead: %s.", requested, server, reason)
