"""DeepSeek-V3's router GEMM: FlashInfer's kernel against what MoEGate runs without it.

python3 benchmark_deepgemm_dsv3_router_gemm_blackwell.py

Each kernel is compared with fp64 before it is timed, in CUDA graphs.
"""

import sys

import torch

from sglang.kernels.jit.benchmark import marker
from sglang.kernels.jit.benchmark.utils import create_random
from sglang.kernels.ops.gemm.bf16_fp32 import linear_bf16_fp32
from sglang.kernels.ops.gemm.flashinfer_dsv3_router_gemm import (
    flashinfer_dsv3_router_gemm,
)
from sglang.kernels.ops.gemm.tiny_gemm import tiny_gemm_bf16

NUM_EXPERTS, HIDDEN_SIZE = 256, 7168


def tiny_gemm(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return tiny_gemm_bf16(hidden_states, weight, out_dtype=torch.float32, max_m=16)


KERNELS = {
    "flashinfer": flashinfer_dsv3_router_gemm,
    "tiny_gemm": tiny_gemm,
    "cublas": linear_bf16_fp32,
}


@marker.parametrize("num_tokens", list(range(1, 17)))
@marker.benchmark("kernel", list(KERNELS))
def benchmark(num_tokens: int, kernel: str) -> marker.BenchResult:
    hidden_states = create_random(num_tokens, HIDDEN_SIZE)
    weight = create_random(NUM_EXPERTS, HIDDEN_SIZE)
    logits = KERNELS[kernel](hidden_states, weight).double()
    expected = hidden_states.double() @ weight.double().t()
    error = (logits - expected).norm() / expected.norm()
    if not error <= 1e-5:
        marker.skip(f"{kernel} is off by {error:.1e}")
    return marker.do_bench(KERNELS[kernel], input_args=(hidden_states, weight))


if __name__ == "__main__":
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 10:
        sys.exit("SM100 or SM103 required")
    benchmark.run()
