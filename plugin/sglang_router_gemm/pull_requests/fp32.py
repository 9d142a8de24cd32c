"""`--pr fp32`, on top of `--pr gate`: fp32 router weights, for the gates that have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import libcst as cst
import torch
from whatthepatch import apply_diff, parse_patch
from whatthepatch.exceptions import WhatThePatchException

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
from sglang_router_gemm.pull_requests.gate import GATE, taken
from sglang_router_gemm.pull_requests.gate_header import fp32_header
from sglang_router_gemm.pull_requests.pull_request import REPOSITORY, PullRequest, RuleError

PATCH = REPOSITORY / "upstream" / "fp32.patch"
"""What becomes of the op, the test and the benchmark that `gate` adds."""

_HELPER = "try_cluster_router_gemm"
_ORIGIN = "sglang.srt.models.deepseek_common.utils"
_MODELS = "python/sglang/srt/models"
_HEADER = "python/sglang/kernels/jit/csrc/gemm/cluster_router_gemm.cuh"
_OP = "python/sglang/kernels/ops/gemm/cluster_router_gemm.py"
_TESTS = "test/registered/kernels/ops/gemm/test_cluster_router_gemm.py"
_BENCHMARK = "test/registered/kernels/benchmark/gemm/bench_cluster_router_gemm.py"

# What `gate` has put into `utils.py`, and what becomes of it.
_LOOKUP = (
    (
        "    if not _is_cuda or _device_sm != 90 or weight_dtype != torch.bfloat16:\n",
        "    if not _is_cuda or _device_sm != 90:\n",
    ),
    (
        "    fewest, most = NUM_TOKENS.get((num_experts, hidden_size), (1, 0))\n",
        "    shape = num_experts, hidden_size\n"
        "    fewest, most = NUM_TOKENS.get((*shape, weight_dtype), (1, 0))\n",
    ),
    (
        "    # Beyond the 16 of tiny_gemm the user may have chosen what runs.\n"
        '    if envs.SGLANG_OPT_BF16_FP32_GEMM_ALGO.get() != "cublas":\n',
        "    # Beyond the 16 of tiny_gemm the user may have chosen what runs with bf16 weights.\n"
        "    if (\n"
        "        weight_dtype == torch.bfloat16\n"
        '        and envs.SGLANG_OPT_BF16_FP32_GEMM_ALGO.get() != "cublas"\n'
        "    ):\n",
    ),
)

_HELPER_TEXT = '''\
def try_cluster_router_gemm(
    hidden_states: torch.Tensor, gate: torch.nn.Module
) -> Optional[torch.Tensor]:
    """The fp32 logits of a gate with an fp32 weight, by the cluster GEMM, which reads
    hidden_states in bf16. None where it does not serve the call: the gate must.
    """
    weight = getattr(gate, "weight", None)
    if (
        weight is None
        or weight.dtype != torch.float32
        or hidden_states.dtype != torch.bfloat16
        or not hidden_states.is_cuda
        or hidden_states.dim() != 2
        or not hidden_states.is_contiguous()
        # LoRA's layers and a bias add to the product.
        or hasattr(gate, "base_layer")
        or getattr(gate, "bias", None) is not None
    ):
        return None
    fewest, most = cluster_router_gemm_tokens(
        num_experts=weight.shape[0],
        hidden_size=weight.shape[1],
        weight_dtype=weight.dtype,
    )
    if not fewest <= hidden_states.shape[0] <= most:
        return None
    try:
        if get_exec().deterministic.enable_deterministic_inference:
            return None
    except ValueError:
        pass  # no server, as in unit tests

    from sglang.kernels.ops.gemm.cluster_router_gemm import cluster_router_gemm

    return cluster_router_gemm(hidden_states, weight)
'''


def _made_of_gates(path: str, make: Callable[[str], str]) -> Callable[[str], str]:
    """The edit of a file that `gate` adds: what is made of its source, where `gate`'s stands."""

    def edit(text: str) -> str:
        source = (GATE.folder / path).read_text(encoding="utf-8")
        wide = make(source)
        if text not in (wide, GATE.rules.get(path, str)(source)):
            raise RuleError(f"it is not what --pr {GATE.name} makes, must be")
        return wide

    return edit


def _header(source: str) -> str:
    return fp32_header(source, SOURCE.parent)


def _op(source: str) -> str:
    """With the table of what was measured, for weights of both dtypes."""
    rows = "".join(
        f"    ({num_experts}, {hidden_size}, {weight}): ({num_tokens[0]}, {num_tokens[-1]}),"
        f"  # {name}\n"
        for weight in (torch.bfloat16, torch.float32)
        for (num_experts, hidden_size), (name, num_tokens) in taken(weight).items()
    )
    module = cst.parse_module(_patched(_OP, source))
    return with_value(module, "NUM_TOKENS", f"{{\n{rows}}}").code


def _patched(path: str, source: str) -> str:
    """A source of `gate` with the patch's changes.

    Raises:
        RuleError: the source has moved on.
    """
    (changes,) = (
        each
        for each in parse_patch(PATCH.read_text(encoding="utf-8"))
        if each.header is not None and each.header.new_path == path
    )
    try:
        lines = apply_diff(changes, source.splitlines())
    except WhatThePatchException as error:
        raise RuleError(f"{PATCH.name} does not apply: {error}") from error
    return "\n".join([*lines, ""])


def edit_utils(text: str) -> str:
    """The models' `utils.py` with what says whether the kernel serves a gate's call."""
    if _HELPER in text:
        return text
    for old, new in _LOOKUP:
        text = replaced_once(text, old, new)
    module = cst.parse_module(text)
    module = with_import_before(
        module, "sglang.srt.utils", "from sglang.srt.runtime_context import get_exec\n"
    )
    return code_of(with_function_after(module, "cluster_router_gemm_tokens", _HELPER_TEXT))


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


def _asks_first(
    class_name: str, own: str, neighbour: str, gate: str = "self", times: int = 1
) -> Callable[[str], str]:
    """The edit of a class whose own product comes second, where the kernel does not serve.

    Args:
        own: the statement that multiplies, an assignment.
        neighbour: the module before whose import the helper's comes.
        gate: what has the weight.
        times: how often the statement is there.
    """
    logits = own.partition(" =")[0].partition(",")[0]
    new = f"{logits} = {_HELPER}(hidden_states, {gate})\nif {logits} is None:\n    {own}\n"
    return lambda text: _with_helper(
        text,
        lambda module: with_statement_replaced(
            _with_import(module, neighbour), class_name, own, new, times=times
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


FP32 = PullRequest(
    name="fp32",
    edits={
        _HEADER: _made_of_gates(_HEADER, _header),
        _OP: _made_of_gates(_OP, _op),
        f"{_MODELS}/deepseek_common/utils.py": edit_utils,
        f"{_MODELS}/deepseek_v2.py": edit_deepseek_v2,
        f"{_MODELS}/glm4_moe.py": _asks_first(
            "Glm4MoeGate",
            "logits = F.linear(hidden_states.to(torch.float32), self.weight, None)",
            "sglang.srt.models.deepseek_v2",
        ),
        f"{_MODELS}/longcat_flash.py": edit_longcat_flash,
        # bf16 weights, which MiMo-V2 may have too, return before.
        f"{_MODELS}/mimo_v2.py": _asks_first(
            "MoEGate",
            "logits = F.linear(hidden_states.to(self.dtype), self.weight, None)",
            "sglang.srt.models.mimo_audio",
        ),
        # Where the kernel serves, the block does not cast for its gate.
        f"{_MODELS}/minimax_m2.py": _asks_first(
            "MiniMaxM2MoE",
            "router_logits, _ = self.gate(hidden_states.to(torch.float32))",
            "sglang.srt.runtime_context",
            gate="self.gate",
            times=2,
        ),
        _TESTS: _made_of_gates(_TESTS, partial(_patched, _TESTS)),
        _BENCHMARK: _made_of_gates(_BENCHMARK, partial(_patched, _BENCHMARK)),
    },
    needs=GATE,
)
