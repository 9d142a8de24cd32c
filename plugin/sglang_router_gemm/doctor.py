"""`sglang-router-gemm doctor`: which path a gate takes on this machine, and why."""

from __future__ import annotations

import importlib.util
import json
import os
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from sglang.srt.layers.moe_router import cluster_route, jit
from sglang.srt.layers.moe_router.backends import BACKENDS, Backend
from sglang.srt.layers.moe_router.environ import (
    SGLANG_ROUTER_GEMM_BACKEND,
    SGLANG_ROUTER_GEMM_PDL,
    asked_logits_dtype,
    pdl_enabled,
    requested_backend,
    requested_setting,
)
from sglang.srt.layers.moe_router.jit import BuildError, find_nvcc
from sglang.srt.layers.moe_router.kernel import Target, device_sm
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3, MODELS, Model
from sglang.srt.layers.moe_router.packages import first_line, installed_versions
from sglang.srt.layers.moe_router.plan import Decision, decide
from sglang.srt.layers.moe_router.route import Asked
from sglang.srt.layers.moe_router.route import decide as decide_route
from sglang_router_gemm.contract import examine as examine_contract
from sglang_router_gemm.contract import examine_routing as examine_routing_contract

_WIDTH = 80
_GROUP, _PLUGIN = "sglang.srt.plugins", "dsv3_router_gemm"
_NOT_ACTIVE = (
    "SGLang loads no plugins in its Ray actors and in `python -m sglang.bench_one_batch`: "
    "there its own path serves every M."
)


# H100 and H200.
_MEASURED_SMS = BACKENDS["cluster"].measured_sms or ()


class Located(NamedTuple):
    """Whether one backend's kernel can be had for one gate."""

    problem: str | None
    """Why not, and what to install; None if it can."""
    origin: str = ""
    """Where it comes from: the cache, a build, or the package."""


def examine() -> dict[str, Any]:
    """Everything that doctor shows, as plain values for JSON."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sm = device_sm(device)
    return {
        "gpu": torch.cuda.get_device_name(0) if device.type == "cuda" else None,
        "sm": sm,
        "versions": installed_versions() | {"cuda": torch.version.cuda},
        "nvcc": _nvcc(sm),
        "settings": {
            SGLANG_ROUTER_GEMM_BACKEND.name: requested_setting(),
            SGLANG_ROUTER_GEMM_PDL.name: pdl_enabled(),
        },
        "plugin": why_not_loaded(),
        "models": [examine_gate(model, device, sm) for model in MODELS],
    }


def examine_gate(model: Model, device: torch.device, sm: int | None) -> dict[str, Any]:
    """The path that one model's gate takes for each M, and where its kernel comes from.

    Args:
        model: the row of the table.
        device: where the gate would be.
        sm: 10 * major + minor of its compute capability, None for a CPU.
    """
    logits_dtype = asked_logits_dtype(model.logits_dtype, model.bias)
    target = Target(device, sm, *model.gate)._replace(logits_dtype=logits_dtype)
    asked: dict[str, Located] = {}

    def unavailable(backend: Backend) -> str | None:
        asked[backend.name] = locate_kernel(backend, target)
        return asked[backend.name].problem

    not_loaded, requested = why_not_loaded(), requested_backend()
    if not_loaded is None:
        decision = decide(requested, target, unavailable, own_logits_dtype=model.logits_dtype)
    else:
        decision = Decision(None, range(0), not_loaded, unavailable=True)
    wide = decision.backend is not None and logits_dtype != model.logits_dtype
    others = "torch" if wide else "sglang"
    auto = model.auto.get(sm) if sm is not None else None
    return {
        "model": model.name,
        "num_experts": model.num_experts,
        "hidden_size": model.hidden_size,
        "gate": str(target),
        "as_asked": not decision.disappoints(requested),
        "paths": [
            {
                "num_tokens": num_tokens,
                "path": name or others,
                "reason": (
                    decision.reason
                    if name is None or decision.stands_in
                    else not_measured(name, sm)
                ),
                "kernel": asked[name].origin if name in asked else None,
                "measured": auto.measured if auto is not None and auto.backend == name else None,
            }
            for num_tokens, name in decision.ranges()
        ],
        "routing": examine_routing(model, sm),
    }


def examine_routing(model: Model, sm: int | None) -> dict[str, Any] | None:
    """Who chooses the model's experts and plans their GEMM; None where that is SGLang anyway."""
    if model.route is None:
        return None
    asked = Asked.of_model(model.route)
    reason = why_not_loaded() or _why_no_routing()
    reason = reason or decide_route(requested_backend(), sm, asked, (), model.num_experts)
    kernel = None
    if reason is None:
        assert sm is not None
        spec = cluster_route.spec(asked.routing(model.num_experts), sm)
        try:
            nvcc = jit.find_builder(spec)
            kernel = "cached" if nvcc is None else f"builds with {nvcc}"
        except BuildError as error:
            reason = f"cluster_route cannot be had: {error}"
    return {
        "top_k": model.route.top_k,
        "num_groups": model.route.num_groups,
        "num_tokens": f"1-{cluster_route.MAX_NUM_TOKENS}",
        "path": "cluster_route" if reason is None else "sglang",
        "reason": reason,
        "kernel": kernel,
        "measured": model.route.auto.get(sm) if sm is not None else None,
    }


def locate_kernel(backend: Backend, target: Target) -> Located:
    """Whether a backend's kernel can be had, and where it comes from. Builds nothing."""
    problem = backend.missing(target.sm)
    if problem is not None:
        return Located(problem)
    if backend.find_builder is None:
        return Located(None, "installed")
    try:
        nvcc = backend.find_builder(target)
    except BuildError as error:
        return Located(f"{backend.kernel} cannot be had: {error}")
    except Exception as error:  # whatever the library raises
        return Located(f"{backend.kernel} cannot be had: {first_line(error)}; {backend.hint}")
    return Located(None, "cached" if nvcc is None else f"builds with {nvcc}")


def why_not_loaded() -> str | None:
    """Why SGLang does not hook its gate with the plugin; None if it does."""
    if not entry_points(group=_GROUP, name=_PLUGIN):
        return "sglang-dsv3-router-gemm is not installed here; pip install it"
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and _PLUGIN not in [name.strip() for name in allowed.split(",")]:
        return f"SGLANG_PLUGINS is {allowed!r}, must have {_PLUGIN} in it, or be unset"
    problem = examine_contract(_sglang()).problem
    return None if problem is None else f"this SGLang does not fit: {problem}"


def _why_no_routing() -> str | None:
    problem = examine_routing_contract(_sglang())
    return None if problem is None else f"this SGLang does not fit: {problem}"


def _sglang() -> Path:
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None
    assert sglang.origin is not None
    return Path(sglang.origin).parent


def not_measured(backend: str, sm: int | None) -> str | None:
    """A remark where this project did not time the kernel on that GPU."""
    if sm in _MEASURED_SMS or BACKENDS[backend].op is None:
        return None
    return f"{backend} was not measured on SM {sm}: `sglang-router-gemm bench` does that"


def run(as_json: bool) -> int:
    """Prints the findings; 1 where DeepSeek-V3's gate does not get what is asked, else 0.

    That is a forced backend, or what `auto` takes on this GPU.
    """
    findings = examine()
    print(json.dumps(findings, indent=2) if as_json else as_text(findings))
    return int(not findings["models"][MODELS.index(DEEPSEEK_V3)]["as_asked"])


def as_text(findings: dict[str, Any]) -> str:
    """The findings as tables of at most 80 columns."""
    machine = [("GPU", findings["gpu"] or "none"), ("SM", findings["sm"] or "-")]
    machine += [(name, found or "not installed") for name, found in findings["versions"].items()]
    machine += [("nvcc", findings["nvcc"])]
    machine += list(findings["settings"].items())
    machine += [("plugin", findings["plugin"] or "loads with SGLang")]
    tables = _gates(findings["models"]), _routings(findings["models"])
    return "\n\n".join((_labelled(machine), *tables, _fold(_NOT_ACTIVE)))


def _labelled(rows: list[tuple[str, Any]]) -> str:
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(_fold(str(value), f"{label:{width}}", " " * width) for label, value in rows)


def _gates(models: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = []
    remarks: list[str] = []
    for model in models:
        for path in model["paths"]:
            rows.append(
                (
                    model["model"],
                    model["gate"],
                    path["num_tokens"],
                    path["path"],
                )
            )
            remarks.append(_remark(path))
    return _remarked(("model", "gate", "M", "path"), rows, remarks)


def _routings(models: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = []
    remarks: list[str] = []
    for model in models:
        found = model["routing"]
        if found is not None:
            groups = f" in {found['num_groups']} groups" if found["num_groups"] > 1 else ""
            what = f"{found['top_k']} of {model['num_experts']}{groups}"
            num_tokens = "1+" if found["path"] == "sglang" else found["num_tokens"]
            rows.append((model["model"], what, num_tokens, found["path"]))
            remarks.append(_remark(found))
    return _remarked(("model", "experts of a token", "M", "path"), rows, remarks)


def _remark(found: dict[str, Any]) -> str:
    """Where a kernel comes from, since when it is known to be faster, or why there is none."""
    measured = f"measured {found['measured']}" if found["measured"] and found["kernel"] else None
    return "; ".join(filter(None, (found["kernel"], measured, found["reason"])))


def _remarked(headers: tuple[str, ...], rows: list[tuple[str, ...]], remarks: list[str]) -> str:
    """A table with a remark under each row that has one."""
    # disable_numparse: "1-16" is text.
    lines = tabulate(rows, headers, "simple", disable_numparse=True).splitlines()
    for index, remark in reversed(list(enumerate(remarks))):
        lines[index + 3 : index + 3] = [_fold(remark, "    ", "    ")] if remark else []
    return "\n".join(lines)


def _fold(text: str, first: str = "", others: str = "") -> str:
    # A path is not broken: whoever reads it copies it.
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _nvcc(sm: int | None) -> str:
    try:
        # Without a GPU it serves `prebuild`; every nvcc that SGLang's CUDA has knows SM 90.
        return str(find_nvcc(sm or min(DEEPSEEK_V3.auto)))
    except BuildError as error:
        return str(error)
