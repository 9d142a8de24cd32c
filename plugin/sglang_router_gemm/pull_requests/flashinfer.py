"""`--pr flashinfer`: FlashInfer's router GEMM back in MoEGate, behind an op with a right schema."""

from __future__ import annotations

import libcst as cst

from sglang_router_gemm.pull_requests.edits import (
    code_of,
    with_function_after,
    with_kernel_registered,
    with_name_imported,
)
from sglang_router_gemm.pull_requests.moe_gate import with_kernel
from sglang_router_gemm.pull_requests.pull_request import PullRequest

_OP = "flashinfer_dsv3_router_gemm"
_PACKAGE = "python/sglang"

_POLICY = '''\
def use_flashinfer_dsv3_router_gemm(
    *, num_experts: int, hidden_size: int, weight_dtype: torch.dtype
) -> bool:
    """Whether the router is DeepSeek-V3's, on a GPU where FlashInfer's kernel serves it."""
    return (
        _is_cuda
        and _device_sm in (100, 103)
        and (num_experts, hidden_size) == (256, 7168)
        and weight_dtype == torch.bfloat16
        and is_flashinfer_available()
    )
'''

_FLAG = """\
self.use_flashinfer_dsv3_router_gemm = use_flashinfer_dsv3_router_gemm(
    num_experts=config.n_routed_experts,
    hidden_size=config.hidden_size,
    weight_dtype=self.weight.dtype,
)
"""

_BRANCH = """\
if (
    self.use_flashinfer_dsv3_router_gemm
    and 1 <= hidden_states.shape[0] <= 16
    and hidden_states.is_contiguous()
):
    logits = flashinfer_dsv3_router_gemm(hidden_states, self.weight)
"""

_SPEC = """\
register_kernel(
    KernelSpec(
        op="gemm.flashinfer_dsv3_router_gemm",
        backend=KernelBackend.FLASHINFER,
        target=(
            "sglang.kernels.ops.gemm.flashinfer_dsv3_router_gemm"
            ":flashinfer_dsv3_router_gemm"
        ),
        capabilities=_SM10X,
    )
)
"""


def edit_model(text: str) -> str:
    """SGLang's `deepseek_v2.py`, whose gate asks first whether FlashInfer's kernel serves M."""
    return with_kernel(text, _OP, f"use_{_OP}", _FLAG, _BRANCH)


def edit_utils(text: str) -> str:
    """The models' `utils.py` with the policy beside that of `tiny_gemm`."""
    if _OP in text:
        return text
    module = cst.parse_module(text)
    module = with_name_imported(module, "sglang.srt.utils", "is_flashinfer_available")
    return code_of(with_function_after(module, "tiny_router_gemm_max_tokens", _POLICY))


def edit_registry(text: str) -> str:
    """The inventory of GEMMs with this one, behind `tiny_gemm`."""
    return with_kernel_registered(text, _OP, "gemm.tiny_gemm", _SPEC)


_BENCHMARK = "benchmark_deepgemm_dsv3_router_gemm_blackwell.py"

FLASHINFER = PullRequest(
    name="flashinfer",
    edits={
        f"{_PACKAGE}/srt/models/deepseek_v2.py": edit_model,
        f"{_PACKAGE}/srt/models/deepseek_common/utils.py": edit_utils,
        f"{_PACKAGE}/kernels/ops/gemm/__init__.py": edit_registry,
    },
    # SGLang had one of this name that times kernels which are gone.
    replaces=frozenset({f"benchmark/kernels/deepseek/{_BENCHMARK}"}),
)
