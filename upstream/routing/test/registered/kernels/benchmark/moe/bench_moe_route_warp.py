"""The top-k by a warp a token against the whole select_experts without it, in CUDA graphs."""

from typing import Any

import torch

from sglang.kernels.jit.benchmark import marker
from sglang.kernels.jit.benchmark.utils import create_random
from sglang.kernels.ops.moe.moe_route_warp import ROUTINGS
from sglang.srt.configs.shared_experts import SharedExpertsConfig
from sglang.srt.layers.moe import topk
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(
    est_time=30, stage="base-b-kernel-benchmark", runner_config="1-gpu-large"
)


@marker.parametrize("routing", sorted(ROUTINGS), [(256, 8, 4, 8)])
@marker.parametrize("num_shared", [0, 1], [1])
@marker.parametrize("num_tokens", [1, 2, 4, 8, 16, 32, 64, 128], [1, 16, 64])
@marker.benchmark("kernel", ["warp", "without"])
def benchmark(
    routing: tuple[int, int, int, int], num_shared: int, num_tokens: int, kernel: str
) -> marker.BenchResult:
    if torch.cuda.get_device_capability() != (9, 0):
        marker.skip("SM90 required")
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cuda"))
    num_experts, num_groups, top_groups, top_k = routing
    config = topk.TopKConfig(
        top_k=top_k + num_shared,
        use_grouped_topk=True,
        num_expert_group=num_groups,
        topk_group=top_groups,
        shared_experts=SharedExpertsConfig(num_fused_shared_experts=num_shared),
        correction_bias=create_random(num_experts, dtype=torch.float32) / 10,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
    )

    def select(hidden_states: torch.Tensor, logits: torch.Tensor) -> Any:
        return topk.select_experts(hidden_states, logits, config)[:2]

    own = topk._is_sm90
    topk._is_sm90 = kernel == "warp"
    try:
        return marker.do_bench(
            select,
            input_args=(
                create_random(num_tokens, 8),
                create_random(num_tokens, num_experts, dtype=torch.float32),
            ),
        )
    finally:
        topk._is_sm90 = own


if __name__ == "__main__":
    benchmark.run()
