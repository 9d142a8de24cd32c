"""`--pr fp32`, on top of `--pr gate`: fp32 router weights, for the gates that have them."""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst
import torch

from sglang.srt.layers.moe_router.cluster_router_gemm import SOURCE
from sglang_router_gemm.contract import GATE_CLASS
from sglang_router_gemm.pull_requests.edits import (
    code_of,
    replaced_once,
    with_beginning,
    with_function_after,
    with_import_before,
    with_name_imported,
    with_statement_replaced,
    with_value,
)
from sglang_router_gemm.pull_requests.fp32_texts import BENCHMARK, HELPER, OP, TESTS, UTILS
from sglang_router_gemm.pull_requests.gate import GATE, taken
from sglang_router_gemm.pull_requests.gate_header import fp32_header
from sglang_router_gemm.pull_requests.pull_request import PullRequest, RuleError

_HELPER = "try_cluster_router_gemm"
_ORIGIN = "sglang.srt.models.deepseek_common.utils"
_MODELS = "python/sglang/srt/models"
_HEADER = "python/sglang/kernels/jit/csrc/gemm/cluster_router_gemm.cuh"
_OP = "python/sglang/kernels/ops/gemm/cluster_router_gemm.py"
_TESTS = "test/registered/kernels/ops/gemm/test_cluster_router_gemm.py"
_BENCHMARK = "test/registered/kernels/benchmark/gemm/bench_cluster_router_gemm.py"


def edit_header(text: str) -> str:
    """The header of `gate`, with fp32 weights."""
    glue = (GATE.folder / _HEADER).read_text(encoding="utf-8")
    wide = fp32_header(glue, SOURCE.parent)
    if text not in (wide, GATE.rules[_HEADER](glue)):
        raise RuleError(f"it is not what --pr {GATE.name} makes, must be")
    return wide


def edit_op(text: str) -> str:
    """The op of `gate`, with fp32 weights and the table of what was measured with them."""
    if (edited := _with_texts(text, OP)) == text:
        return text
    rows = "".join(
        f"    ({num_experts}, {hidden_size}, {weight}): ({num_tokens[0]}, {num_tokens[-1]}),"
        f"  # {name}\n"
        for weight in (torch.bfloat16, torch.float32)
        for (num_experts, hidden_size), (name, num_tokens) in taken(weight).items()
    )
    return with_value(cst.parse_module(edited), "NUM_TOKENS", f"{{\n{rows}}}").code


def edit_utils(text: str) -> str:
    """The models' `utils.py` with what says whether the kernel serves a gate's call."""
    if _HELPER in text:
        return text
    module = cst.parse_module(_with_texts(text, UTILS))
    module = with_import_before(
        module, "sglang.srt.utils", "from sglang.srt.runtime_context import get_exec\n"
    )
    return code_of(with_function_after(module, "cluster_router_gemm_tokens", HELPER))


def _or_else(call: str, logits: str, otherwise: str) -> str:
    return f"{logits} = {call}\nif {logits} is None:\n    {otherwise}\n"


def _or_go_on(call: str) -> str:
    return f"logits = {call}\nif logits is not None:\n    return logits\n"


def edit_deepseek_v2(text: str) -> str:
    """`MoEGate`, which has fp32 weights for Hy4."""
    own = "return F.linear(hidden_states.float(), self.weight)"
    return _with_helper(
        text,
        lambda module: with_statement_replaced(
            with_name_imported(module, _ORIGIN, _HELPER),
            GATE_CLASS,
            own,
            f"{_or_go_on(f'{_HELPER}(hidden_states, self)')}{own}\n",
        ),
    )


def edit_glm4_moe(text: str) -> str:
    """The gate of GLM-4.5."""
    own = "logits = F.linear(hidden_states.to(torch.float32), self.weight, None)"
    new = _or_else(f"{_HELPER}(hidden_states, self)", "logits", own)
    return _with_helper(
        text,
        lambda module: with_statement_replaced(
            _with_import(module, "sglang.srt.models.deepseek_v2"), "Glm4MoeGate", own, new
        ),
    )


def edit_mimo_v2(text: str) -> str:
    """The gate of MiMo-V2; its bf16 weights, which it may have too, return before."""
    own = "logits = F.linear(hidden_states.to(self.dtype), self.weight, None)"
    new = _or_else(f"{_HELPER}(hidden_states, self)", "logits", own)
    return _with_helper(
        text,
        lambda module: with_statement_replaced(
            _with_import(module, "sglang.srt.models.mimo_audio"), "MoEGate", own, new
        ),
    )


def edit_minimax_m2(text: str) -> str:
    """The block of MiniMax-M2, which casts for its gate: not where the kernel serves."""
    own = "router_logits, _ = self.gate(hidden_states.to(torch.float32))"
    new = _or_else(f"{_HELPER}(hidden_states, self.gate)", "router_logits", own)
    return _with_helper(
        text,
        lambda module: with_statement_replaced(
            _with_import(module, "sglang.srt.runtime_context"), "MiniMaxM2MoE", own, new, times=2
        ),
    )


def edit_longcat_flash(text: str) -> str:
    """The router of LongCat-Flash, before the package hpc, which serves from M = 64 on."""
    call = f"{_HELPER}(hidden_states, self.classifier)"
    return _with_helper(
        text,
        lambda module: with_beginning(
            _with_import(module, "sglang.srt.models.deepseek_v2"),
            "forward",
            _or_go_on(call),
            class_name="LongcatFlashRouter",
        ),
    )


def _with_helper(text: str, edit: Callable[[cst.Module], cst.Module]) -> str:
    return text if _HELPER in text else code_of(edit(cst.parse_module(text)))


def _with_import(module: cst.Module, neighbour: str) -> cst.Module:
    return with_import_before(module, neighbour, f"from {_ORIGIN} import {_HELPER}\n")


def _with_texts(text: str, texts: tuple[tuple[str, str], ...]) -> str:
    """Each text for another, or the text as it is where it has all of them already."""
    if all(new in text for _, new in texts):
        return text
    for old, new in texts:
        text = replaced_once(text, old, new)
    return text


FP32 = PullRequest(
    name="fp32",
    edits={
        _HEADER: edit_header,
        _OP: edit_op,
        f"{_MODELS}/deepseek_common/utils.py": edit_utils,
        f"{_MODELS}/deepseek_v2.py": edit_deepseek_v2,
        f"{_MODELS}/glm4_moe.py": edit_glm4_moe,
        f"{_MODELS}/longcat_flash.py": edit_longcat_flash,
        f"{_MODELS}/mimo_v2.py": edit_mimo_v2,
        f"{_MODELS}/minimax_m2.py": edit_minimax_m2,
        _TESTS: lambda text: _with_texts(text, TESTS),
        _BENCHMARK: lambda text: _with_texts(text, BENCHMARK),
    },
    needs=GATE,
)
