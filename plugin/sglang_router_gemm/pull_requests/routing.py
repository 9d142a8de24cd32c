"""`--pr routing`: ids and weights of each token's experts in one launch on Hopper, and its op."""

from __future__ import annotations

import libcst as cst

from sglang.srt.layers.moe_router.cluster_route import SOURCE
from sglang.srt.layers.moe_router.models import MODELS
from sglang_router_gemm.pull_requests.edits import (
    code_of,
    with_beginning,
    with_call_after,
    with_function_after,
    with_import_before,
    with_kernel_registered,
    with_name_imported,
    with_value,
)
from sglang_router_gemm.pull_requests.pull_request import PullRequest
from sglang_router_gemm.pull_requests.routing_header import routing_header

SM = 90

_OP = "moe_route_warp"
_PACKAGE = "python/sglang"

_IMPORT = f"from sglang.kernels.ops.moe.{_OP} import can_route_warp, {_OP}\n"

_ROUTING = """\
def _warp_routing(topk_config: TopKConfig) -> dict[str, int]:
    grouped = topk_config.use_grouped_topk
    return dict(
        num_groups=topk_config.num_expert_group if grouped else 1,
        top_groups=topk_config.topk_group if grouped else 1,
        top_k=topk_config.top_k - topk_config.num_shared_topk_slots,
        num_shared=topk_config.num_shared_topk_slots,
    )
"""

_TAKES = '''\
def _takes_warp_routing(router_logits: torch.Tensor, topk_config: TopKConfig) -> bool:
    """Whether moe_route_warp gives what the other kernels give, and was faster."""
    bias = topk_config.correction_bias
    if (
        not _is_sm90
        or bias is None
        or not can_route_warp(router_logits, bias, **_warp_routing(topk_config))
        or not (topk_config.use_grouped_topk or topk_config.scoring_func == "sigmoid")
        or not topk_config.renormalize
        or topk_config.custom_routing_function is not None
        or topk_config.torch_native
        or has_per_rank_fused_shared_slots(topk_config.num_shared_topk_slots)
        or fused_topk_deepseek is None  # the kernel has its bits
        or envs.SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK.get()
        or _SGLANG_EXPERIMENTAL_LORA_OPTI
        or routing_simulation_enabled()
    ):
        return False
    try:
        return not get_exec().deterministic.enable_deterministic_inference
    except ValueError:
        return True  # no server, as in unit tests
'''

_SELECT = """\
def _select_experts_by_warp(
    router_logits: torch.Tensor,
    topk_config: TopKConfig,
    layer_id: Optional[int],
    num_token_non_padded: Optional[torch.Tensor],
) -> StandardTopKOutput:
    scale = topk_config.routed_scaling_factor
    fused_in_topk = is_routed_scaling_factor_fused_in_topk(topk_config)
    topk_weights, topk_ids = moe_route_warp(
        router_logits,
        topk_config.correction_bias,
        scale=scale if fused_in_topk and scale else 1.0,
        shared_weight=fused_shared_expert_weight(
            routed_scaling_factor=scale, fused_in_topk=fused_in_topk
        ),
        **_warp_routing(topk_config),
    )
    if num_token_non_padded is None and (
        topk_config.fused_shared_experts_scaling_factor in (None, 1)
    ):
        # The columns are final: without this, the shared one would be copied.
        capture_routed_experts_if_allowed(topk_config, layer_id, topk_ids)
        num_routed_topk = topk_config.top_k - topk_config.num_shared_topk_slots
        recorder_topk_ids = topk_ids[:, :num_routed_topk]
    else:
        topk_ids, topk_weights, recorder_topk_ids = _post_process_topk_ids(
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            topk_config=topk_config,
            router_logits=router_logits,
            layer_id=layer_id,
            num_token_non_padded=num_token_non_padded,
        )
    get_global_expert_distribution_recorder().on_select_experts(
        topk_ids=recorder_topk_ids
    )
    return StandardTopKOutput(topk_weights, topk_ids, router_logits)
"""

_BRANCH = """\
if (
    dynamic_expert_bias is None
    and router_logits_partials is None
    and expert_location_dispatch_info is None
    and _takes_warp_routing(router_logits, topk_config)
):
    return _select_experts_by_warp(
        router_logits, topk_config, layer_id, num_token_non_padded
    )
"""

_SPEC = f"""\
register_kernel(
    KernelSpec(
        op="moe.{_OP}",
        backend=KernelBackend.JIT,
        target="sglang.kernels.ops.moe.{_OP}:{_OP}",
        capabilities=frozenset(
            {{CapabilityRequirement.cuda(min_sm=(9, 0), max_sm=(9, 0))}}
        ),
    )
)
"""


def taken() -> dict[tuple[int, int, int, int], list[str]]:
    """The routings that the pull request serves: N, groups, those kept and top-k, and whose."""
    routings: dict[tuple[int, int, int, int], list[str]] = {}
    for model in MODELS:
        if model.route is not None and SM in model.route.auto:
            routings.setdefault((model.num_experts, *model.route[:3]), []).append(model.name)
    return routings


def edit_topk(text: str) -> str:
    """SGLang's `topk.py`, whose `select_experts` asks first whether the kernel takes the call."""
    if _OP in text:
        return text
    module = cst.parse_module(text)
    module = with_import_before(
        module, "sglang.srt.distributed.device_communicators.pynccl_allocator", _IMPORT
    )
    module = with_name_imported(module, "sglang.srt.utils", "get_device_sm")
    module = with_call_after(
        module, "_is_cuda=is_cuda()", "_is_sm90 = _is_cuda and get_device_sm() == 90\n"
    )
    for function in (_SELECT, _TAKES, _ROUTING):  # each goes in front of the one before
        module = with_function_after(module, "_post_process_topk_ids", function)
    return code_of(with_beginning(module, "select_experts", _BRANCH))


def edit_registry(text: str) -> str:
    """The inventory of MoE kernels with this one, behind `shuffle_weighted_sum`."""
    return with_kernel_registered(text, _OP, "moe.shuffle_weighted_sum", _SPEC)


def complete_op(text: str) -> str:
    """The op with the table of what was measured."""
    rows = "".join(
        f"        {routing},  # {', '.join(names)}\n" for routing, names in taken().items()
    )
    table = f"frozenset(\n    {{\n{rows}    }}\n)"
    return with_value(cst.parse_module(text), "ROUTINGS", table).code


def complete_header(text: str) -> str:
    """The launcher with the kernel."""
    return routing_header(text, SOURCE.parent)


ROUTING = PullRequest(
    name="routing",
    edits={
        f"{_PACKAGE}/srt/layers/moe/topk.py": edit_topk,
        f"{_PACKAGE}/kernels/ops/moe/__init__.py": edit_registry,
    },
    rules={
        f"{_PACKAGE}/kernels/jit/csrc/moe/route_warp.cuh": complete_header,
        f"{_PACKAGE}/kernels/ops/moe/{_OP}.py": complete_op,
    },
)
