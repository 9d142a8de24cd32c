// @comment
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/runtime.cuh>
#include <sgl_kernel/utils.cuh>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include <cstdint>

namespace sglang {

namespace router_gemm {

// @kernel
}  // namespace router_gemm

// The kernel for one N and K. kUsePDL: it may start before the kernel ahead of it has ended.
template <int kNumExperts, int kHiddenSize, bool kUsePDL>
struct ClusterRouterGemmKernel {
  // @shapes

  // Writes logits [M, N] in fp32 for M up to kMaxTokens. hidden_states [M, K] and weight [N, K] are
  // bf16; all three are contiguous, 16-byte aligned and on one device.
  static void
  run(const tvm::ffi::TensorView hidden_states, const tvm::ffi::TensorView weight, const tvm::ffi::TensorView logits) {
    using namespace host;

    auto M = SymbolicSize{"num_tokens"};
    auto device = SymbolicDevice{};
    TensorMatcher({kNumExperts, kHiddenSize})
        .with_dtype<bf16_t>()
        .template with_device<kDLCUDA>(device)
        .ensure_alignment(16)
        .verify(weight);
    TensorMatcher({M, kHiddenSize}).with_dtype<bf16_t>().with_device(device).ensure_alignment(16).verify(hidden_states);
    TensorMatcher({M, kNumExperts}).with_dtype<fp32_t>().with_device(device).ensure_alignment(16).verify(logits);
    const auto num_tokens = M.unwrap();
    if (num_tokens == 0) return;
    CHECK_HOST(num_tokens <= kMaxTokens) << "num_tokens is " << num_tokens << ", must be at most " << kMaxTokens;
    const auto launch_on = num_tokens <= Few::kTokens    ? &launch<Few, Few::kTokens>
                           : num_tokens <= Some::kTokens ? &launch<Some, Some::kTokens>
                                                         : &launch<Many, kMaxTokens>;
    launch_on(
        device.unwrap(),
        static_cast<const bf16_t*>(hidden_states.data_ptr()),
        static_cast<const bf16_t*>(weight.data_ptr()),
        static_cast<fp32_t*>(logits.data_ptr()),
        static_cast<int>(num_tokens));
  }

 private:
  template <typename S, int kMostTokens>
  static void
  launch(DLDevice device, const bf16_t* hidden_states, const bf16_t* weight, fp32_t* logits, int num_tokens) {
    constexpr auto kernel = router_gemm::cluster_router_gemm_kernel<S, kUsePDL>;
    const tvm::ffi::CUDADeviceGuard guard(device.device_id);  // the attribute is set on the current one
    // The same for every call: it is a state of the kernel that all threads share.
    host::runtime::set_max_dynamic_smem_per_device<kernel>(device, S::shared_bytes(kMostTokens));
    host::LaunchKernel(kNumExperts / S::kExperts * router_gemm::kRanks, S::kThreads, device, S::shared_bytes(num_tokens))
        .enable_pdl(kUsePDL)(kernel, weight, hidden_states, logits, static_cast<unsigned>(num_tokens));
  }
};

}  // namespace sglang
