"""SGLang's MoEGate with a kernel before `tiny_gemm`, as two of the pull requests have it."""

from __future__ import annotations

import libcst as cst

from sglang_router_gemm.contract import GATE_CLASS
from sglang_router_gemm.pull_requests.edits import (
    code_of,
    with_branch_before,
    with_import_before,
    with_name_imported,
    with_statement_after,
)


def with_kernel(text: str, op: str, policy: str, state: str, branch: str) -> str:
    """`deepseek_v2.py`, whose gate asks first whether the kernel of `op` takes the call.

    Args:
        text: SGLang's. It comes back as it is where it has the op.
        op: of `sglang.kernels.ops.gemm`.
        policy: the function of `deepseek_common/utils.py` that `state` calls.
        state: the statement of `__init__` that asks the policy.
        branch: the `if` of `forward` that calls the op.

    Raises:
        RuleError: the gate is another.
    """
    if op in text:
        return text
    tiny_gemm = "sglang.kernels.ops.gemm.tiny_gemm"
    imported = f"from sglang.kernels.ops.gemm.{op} import {op}\n"
    module = cst.parse_module(text)
    module = with_name_imported(module, "sglang.srt.models.deepseek_common.utils", policy)
    module = with_import_before(module, tiny_gemm, imported)
    module = with_statement_after(module, GATE_CLASS, "self.tiny_router_gemm_max_tokens", state)
    test = "hidden_states.shape[0] <= self.tiny_router_gemm_max_tokens"
    return code_of(with_branch_before(module, GATE_CLASS, test, branch))
