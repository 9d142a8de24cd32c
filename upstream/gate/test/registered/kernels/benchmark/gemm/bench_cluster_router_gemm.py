"""The cluster router GEMM against what MoEGate runs without it, in CUDA graphs."""

import torch

from sglang.kernels.jit.benchmark import marker
from sglang.kernels.jit.benchmark.utils import create_random
from sglang.kernels.ops.gemm.bf16_fp32 import linear_bf16_fp32
from sglang.kernels.ops.gemm.cluster_router_gemm import (
    NUM_TOKENS,
    cluster_router_gemm,
)
from sglang.kernels.ops.gemm.tiny_gemm import tiny_gemm_bf16
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(
    est_time=30, stage="base-b-kernel-benchmark", runner_config="1-gpu-large"
)

MAX_M_TINY = 16


def tiny_gemm(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return tiny_gemm_bf16(
        hidden_states, weight, out_dtype=torch.float32, max_m=MAX_M_TINY
    )


KERNELS = {
    "cluster": cluster_router_gemm,
    "tiny_gemm": tiny_gemm,
    "cublas": linear_bf16_fp32,
}


@marker.parametrize(
    "num_experts,hidden_size", sorted(NUM_TOKENS), ci_vals=[(256, 7168)]
)
@marker.parametrize("num_tokens", [1, 2, 4, 8, 16, 32, 64, 128], [1, 16, 64])
@marker.benchmark("kernel", list(KERNELS))
def benchmark(
    num_experts: int, hidden_size: int, num_tokens: int, kernel: str
) -> marker.BenchResult:
    if torch.cuda.get_device_capability() != (9, 0):
        marker.skip("SM90 required")
    if kernel == "tiny_gemm" and num_tokens > MAX_M_TINY:
        marker.skip(f"at most {MAX_M_TINY} tokens")
    return marker.do_bench(
        KERNELS[kernel],
        input_args=(
            create_random(num_tokens, hidden_size),
            create_random(num_experts, hidden_size),
        ),
    )


if __name__ == "__main__":
    benchmark.run()
