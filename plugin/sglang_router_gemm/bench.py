"""`sglang-router-gemm bench`: what the backends gain on this GPU, and which setting to use.

The measurement is the benchmark's own, `benchmark/kernels/deepseek/router_gemm_benchmark`, which
a wheel carries inside of this package.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from sglang.srt.layers.moe_router.backends import BACKENDS
from sglang.srt.layers.moe_router.environ import AUTO, OFF
from sglang.srt.layers.moe_router.kernel import Target, device_sm
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3, routing_phrase
from sglang.srt.layers.moe_router.packages import installed_versions
from sglang.srt.layers.moe_router.plan import decide
from sglang_router_gemm.model_config import ConfigError, GateConfig, read_gate

if TYPE_CHECKING:
    from router_gemm_benchmark.timing import Candidate

NUM_TOKENS = (1, 8, 16, 32, 64)
ROUNDS = 20

# Two settings closer than that are the same: two runs differ by as much (H200, 2026-11-27).
_SAME = 1.02

_HERE = Path(__file__).resolve().parent
for folder in (_HERE, _HERE.parents[1] / "benchmark" / "kernels" / "deepseek"):
    if (folder / "router_gemm_benchmark").is_dir():
        sys.path.append(str(folder))


def run(model: Path | None, shape: Sequence[int] | None, as_json: bool) -> int:
    """Times SGLang's own gate and every backend in turn, prints a table and the setting to use.

    Args:
        model: a config.json or its folder; by default DeepSeek-V3.
        shape: N and K, of a gate that is else as DeepSeek-V3's.
        as_json: print JSON instead.

    Returns:
        1 where there is no GPU, the plugin hooks no gate of the model, the benchmark has nothing
        that does what SGLang's own does, or that cannot be timed; else 0.
    """
    from router_gemm_benchmark.timing import LINKS

    assert DEEPSEEK_V3.route is not None
    gate = GateConfig(
        DEEPSEEK_V3.num_experts, DEEPSEEK_V3.hidden_size, LINKS, routing=DEEPSEEK_V3.route[:3]
    )
    try:
        if model is not None:
            gate = read_gate(model)
        elif shape is not None:
            gate = GateConfig(shape[0], shape[1], None)
        if gate.own is None:
            raise ConfigError(f"the benchmark has nothing that does what this gate does: {model}")
        if not torch.cuda.is_available():
            raise ConfigError("this machine has no CUDA device")
    except ConfigError as error:
        print(f"sglang-router-gemm bench: {error}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    target = Target(device, device_sm(device), *gate.shape, *gate.form)
    with torch.no_grad():
        us, skipped = measure(gate, device)
    settings = by_setting(us, target, gate.own)
    findings = {
        "gpu": torch.cuda.get_device_name(device),
        "sm": target.sm,
        "versions": installed_versions() | {"cuda": torch.version.cuda},
        "num_experts": gate.num_experts,
        "hidden_size": gate.hidden_size,
        "gate": str(target),
        "own": gate.own,
        "routing": gate.routing,
        "layers": gate.layers,
        "us": us,
        "us_by_setting": settings,
        "skipped": skipped,
        "setting": recommend(settings),
    }
    print(json.dumps(findings, indent=1) if as_json else as_text(findings))
    return int(gate.own not in us)


def measure(
    gate: GateConfig, device: torch.device
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Microseconds of one call in the benchmark's `chain`, and why somebody has none.

    Returns:
        By name, `gate.own` or a backend's, the median by M; and the reasons by name.
    """
    from router_gemm_benchmark import accuracy
    from router_gemm_benchmark.providers import Skip, all_providers
    from router_gemm_benchmark.timing import CHAIN, MODES, Bench, Candidate

    bench = Bench(*gate.shape, ROUNDS, device, gate.form.dtype)
    mode = CHAIN if bench.producer is not None else MODES[1]
    skipped: dict[str, str] = {}
    ready: list[Candidate] = []
    for provider in all_providers(*gate.shape, device, gate.form):
        if not provider.ours and provider.name != gate.own:
            continue
        print(f"{provider.name}: built or loaded, and compared with fp64 …", file=sys.stderr)
        try:
            candidate = Candidate(provider, provider.build())
        except Skip as reason:
            skipped[_name(provider.name)] = str(reason)
            continue
        wrong = [
            found.failure
            for m in NUM_TOKENS
            if provider.supports(m) is None
            and (found := accuracy.check(*candidate, m, *gate.shape, device)).failure is not None
        ]
        if wrong:
            skipped[_name(provider.name)] = str(wrong[0])
        else:
            ready.append(candidate)
    us: dict[str, dict[int, float]] = {_name(each.provider.name): {} for each in ready}
    for m in NUM_TOKENS:
        here = [each for each in ready if each.provider.supports(m) is None]
        timings, failures = bench.measure(here, m, mode)
        for timing in timings:
            us[_name(timing.provider)][m] = timing.median_us
        skipped |= {_name(failure.provider): failure.reason for failure in failures}
    return {name: row for name, row in us.items() if row}, skipped


def by_setting(
    us: Mapping[str, Mapping[int, float]], target: Target, own_name: str
) -> dict[str, dict[int, float]]:
    """By each value of `SGLANG_ROUTER_GEMM_BACKEND`, the time of one call by M.

    An M that a backend does not serve is SGLang's own, at its time. Empty where that has none.
    """
    own = dict(us.get(own_name, {}))
    if not own:
        return {}
    settings = {OFF: own} | {name: {**own, **us[name]} for name in us if name != own_name}
    taken = decide(AUTO, target, lambda backend: None)
    served = us.get(taken.backend.name, {}) if taken.backend is not None else {}
    return settings | {AUTO: own | {m: served[m] for m in served if m in taken.num_tokens}}


def recommend(settings: Mapping[str, Mapping[int, float]]) -> str:
    """The setting that is fastest over all M, `auto` where it is as fast, or nothing is known."""
    means = {name: _geometric_mean(list(row.values())) for name, row in settings.items()}
    if not means:
        return AUTO
    best = min(means, key=means.__getitem__)
    return AUTO if means[AUTO] <= _SAME * means[best] else best


def as_text(findings: Mapping[str, Any]) -> str:
    """The findings as tables of at most 80 columns."""
    us, setting = findings["us"], findings["setting"]
    own = us.get(findings["own"], {})
    names = [name for name in us if name != findings["own"]]
    calls = [[us_of.get(m) for us_of in (own, *(us[name] for name in names))] for m in NUM_TOKENS]
    lines = [
        f"{findings['gpu']} (SM {findings['sm']}), gate {findings['gate']}",
        *_routing(findings),
        f"µs of one call. SGLang's own is {findings['own']}.",
        "",
        _table(("SGLang's", *names), calls, "{:.2f}"),
        "",
        *_steps(findings),
        *(f"{name} is not there: {reason}" for name, reason in findings["skipped"].items()),
        f"Use SGLANG_ROUTER_GEMM_BACKEND={setting}",
    ]
    known = BACKENDS["cluster"].measured_sms or ()
    if findings["sm"] not in known:
        lines.append(
            f"Nobody of this project has an SM {findings['sm']}: please send what --json prints."
        )
    return "\n".join(lines)


def _routing(findings: Mapping[str, Any]) -> list[str]:
    if findings["routing"] is None:
        return []
    what = routing_phrase(findings["num_experts"], *findings["routing"])
    return [f"Behind it, not timed here: {what}."]


def _steps(findings: Mapping[str, Any]) -> list[str]:
    """What all layers' gates take of a decode step, with the setting to use and without."""
    layers, setting, settings = findings["layers"], findings["setting"], findings["us_by_setting"]
    if layers is None or not settings:
        return []
    off, on = settings[OFF], settings[setting]
    rows = [
        [layers * off[m], layers * on[m], layers * (off[m] - on[m])] if m in off else [None] * 3
        for m in NUM_TOKENS
    ]
    headers = ("SGLang's", f"with {setting}", "saved")
    return [f"µs of a decode step, {layers} layers:", "", _table(headers, rows, "{:.0f}"), ""]


def _table(headers: Sequence[str], rows: Sequence[Sequence[float | None]], form: str) -> str:
    """A row an M."""
    cells = [
        (str(m), *("" if us is None else form.format(us) for us in row))
        for m, row in zip(NUM_TOKENS, rows, strict=True)
    ]
    return tabulate(cells, ("M", *headers), disable_numparse=True)


def _name(provider: str) -> str:
    return provider.removeprefix("ours: ")


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
