"""`--pr gate`: the kernel for Hopper, its op, and the branch of SGLang's MoEGate that takes it."""

from __future__ import annotations

import libcst as cst
import torch

from sglang.srt.layers.moe_router.cluster_router_gemm import SOURCE
from sglang.srt.layers.moe_router.kernel import Form
from sglang.srt.layers.moe_router.models import MODELS
from sglang_router_gemm.pull_requests.edits import (
    with_function_after,
    with_kernel_registered,
    with_value,
)
from sglang_router_gemm.pull_requests.gate_header import gate_header
from sglang_router_gemm.pull_requests.moe_gate import with_kernel
from sglang_router_gemm.pull_requests.pull_request import PullRequest

SM = 90

_OP = "cluster_router_gemm"
_PACKAGE = "python/sglang"
_UTILS = "srt/models/deepseek_common/utils.py"

_POLICY = '''\
def cluster_router_gemm_tokens(
    *, num_experts: int, hidden_size: int, weight_dtype: torch.dtype
) -> tuple[int, int]:
    """The fewest and the most rows for which the router takes the cluster GEMM, where
    it was measured to be faster than what it ran before; (1, 0) for none.
    """
    if not _is_cuda or _device_sm != 90 or weight_dtype != torch.bfloat16:
        return 1, 0

    from sglang.kernels.ops.gemm.cluster_router_gemm import NUM_TOKENS

    fewest, most = NUM_TOKENS.get((num_experts, hidden_size), (1, 0))
    # Beyond the 16 of tiny_gemm the user may have chosen what runs.
    if envs.SGLANG_OPT_BF16_FP32_GEMM_ALGO.get() != "cublas":
        most = min(most, 16)
    return fewest, most
'''

_TOKENS = """\
self.cluster_router_gemm_min_tokens, self.cluster_router_gemm_max_tokens = (
    cluster_router_gemm_tokens(
        num_experts=config.n_routed_experts,
        hidden_size=config.hidden_size,
        weight_dtype=self.weight.dtype,
    )
)
"""

_BRANCH = """\
if (
    self.cluster_router_gemm_min_tokens
    <= hidden_states.shape[0]
    <= self.cluster_router_gemm_max_tokens
    and hidden_states.is_contiguous()
):
    logits = cluster_router_gemm(hidden_states, self.weight)
"""

_SPEC = """\
register_kernel(
    KernelSpec(
        op="gemm.cluster_router_gemm",
        backend=KernelBackend.JIT,
        target="sglang.kernels.ops.gemm.cluster_router_gemm:cluster_router_gemm",
        capabilities=_SM90,
    )
)
"""


def taken(weight: torch.dtype = torch.bfloat16) -> dict[tuple[int, int], tuple[str, range]]:
    """The gates that are served with such a weight: N and K, and whose it is and for which M."""
    rows: dict[tuple[int, int], tuple[str, range]] = {}
    for model in MODELS:
        shape, auto = (model.num_experts, model.hidden_size), model.auto.get(SM)
        if model.form == Form(weight) and auto is not None and auto.backend == "cluster":
            rows.setdefault(shape, (model.name, auto.num_tokens))  # the first of its shape
    return rows


def edit_model(text: str) -> str:
    """SGLang's `deepseek_v2.py`, whose gate asks first whether the kernel was measured for M."""
    return with_kernel(text, _OP, "cluster_router_gemm_tokens", _TOKENS, _BRANCH)


def edit_utils(text: str) -> str:
    """The models' `utils.py` with the policy beside that of `tiny_gemm`."""
    if _OP in text:
        return text
    after = "tiny_router_gemm_max_tokens"
    return with_function_after(cst.parse_module(text), after, _POLICY).code


def edit_registry(text: str) -> str:
    """The inventory of GEMMs with this one, behind `tiny_gemm`."""
    return with_kernel_registered(text, _OP, "gemm.tiny_gemm", _SPEC)


def complete_op(text: str) -> str:
    """The op with the table of what was measured."""
    rows = "".join(
        f"    {shape}: ({num_tokens[0]}, {num_tokens[-1]}),  # {name}\n"
        for shape, (name, num_tokens) in taken().items()
    )
    return with_value(cst.parse_module(text), "NUM_TOKENS", f"{{\n{rows}}}").code


def complete_header(text: str) -> str:
    """The launcher with the kernel."""
    return gate_header(text, SOURCE.parent)


GATE = PullRequest(
    name="gate",
    edits={
        f"{_PACKAGE}/srt/models/deepseek_v2.py": edit_model,
        f"{_PACKAGE}/{_UTILS}": edit_utils,
        f"{_PACKAGE}/kernels/ops/gemm/__init__.py": edit_registry,
    },
    rules={
        f"{_PACKAGE}/kernels/jit/csrc/gemm/{_OP}.cuh": complete_header,
        f"{_PACKAGE}/kernels/ops/gemm/{_OP}.py": complete_op,
    },
)
