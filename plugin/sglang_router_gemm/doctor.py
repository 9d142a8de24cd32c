"""`sglang-router-gemm doctor`: which path a gate takes on this machine, and why."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tabulate import tabulate

from sglang.srt.layers.moe_router import kernels
from sglang.srt.layers.moe_router.call import RouterGemmCall, device_sm
from sglang.srt.layers.moe_router.environ import (
    SGLANG_ROUTER_GEMM_BACKEND,
    SGLANG_ROUTER_GEMM_PDL,
    pdl_enabled,
    requested_backend,
)
from sglang.srt.layers.moe_router.policy import (
    MEASURED_SMS,
    RULES,
    Decision,
    decisions_by_num_tokens,
)

# `n_routed_experts` and `hidden_size` in the config.json of each model.
MODELS = (
    ("DeepSeek-V3", 256, 7168),
    ("Kimi-K2", 384, 7168),
    ("Mistral Large 3", 128, 7168),
    ("GLM-5", 256, 6144),
    ("DeepSeek-V2", 160, 5120),
)

PACKAGES = (
    "sglang-dsv3-router-gemm",
    "torch",
    "sglang",
    "flashinfer-python",
    "sglang-kernel",
    "triton",
    "apache-tvm-ffi",
)


def examine() -> dict[str, Any]:
    """Everything that doctor shows, as plain values for JSON."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    sm = device_sm(device_type, 0)
    requested = requested_backend()
    missing = {name: kernels.missing(name, sm) for name in RULES}
    return {
        "gpu": torch.cuda.get_device_name(0) if device_type == "cuda" else None,
        "sm": sm,
        "versions": installed_versions(),
        "nvcc": _nvcc(),
        "settings": {
            SGLANG_ROUTER_GEMM_BACKEND.name: requested,
            SGLANG_ROUTER_GEMM_PDL.name: pdl_enabled(),
        },
        "models": [
            {
                "model": model,
                "num_experts": num_experts,
                "hidden_size": hidden_size,
                "paths": [
                    {
                        "num_tokens": served.tokens,
                        "path": served.decision.backend or "sglang",
                        "reason": _reason(served.decision, sm),
                    }
                    for served in decisions_by_num_tokens(
                        RouterGemmCall(device_type, sm, None, num_experts, hidden_size),
                        requested,
                        missing,
                    )
                ],
            }
            for model, num_experts, hidden_size in MODELS
        ],
    }


def _reason(decision: Decision, sm: int | None) -> str | None:
    if decision.refusal is not None:
        return decision.refusal.reason
    if sm not in MEASURED_SMS.get(decision.backend or "", (sm,)):
        return f"{decision.backend} was not measured on SM {sm}"
    return None


def installed_versions() -> dict[str, str | None]:
    """The packages that a decision or a number may depend on, None where one is missing."""
    return {name: _version(name) for name in PACKAGES} | {"cuda": torch.version.cuda}


def run(as_json: bool) -> int:
    """Prints the findings; 1 where a forced backend cannot serve DeepSeek-V3, else 0."""
    findings = examine()
    print(json.dumps(findings, indent=2) if as_json else _as_text(findings))
    requested = requested_backend()
    deepseek_v3 = findings["models"][0]["paths"]
    forced = requested in RULES
    return int(forced and all(path["path"] != requested for path in deepseek_v3))


def _as_text(findings: dict[str, Any]) -> str:
    machine = [("GPU", findings["gpu"] or "none"), ("SM", findings["sm"] or "-")]
    machine += [(name, found or "not installed") for name, found in findings["versions"].items()]
    machine += [("nvcc", findings["nvcc"] or "not found; FlashInfer builds its kernel with it")]
    machine += list(findings["settings"].items())
    paths = [
        (
            model["model"],
            f"{model['num_experts']} x {model['hidden_size']}",
            path["num_tokens"],
            path["path"],
            path["reason"] or "",
        )
        for model in findings["models"]
        for path in model["paths"]
    ]
    headers = ("model", "N x K", "M", "path", "why not the fast one, or a remark")
    # disable_numparse: "1-16" and "0.5.23" are text.
    return "\n\n".join(
        (
            tabulate(machine, tablefmt="plain", disable_numparse=True),
            tabulate(paths, headers, tablefmt="simple", disable_numparse=True),
        )
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")
