// @comment
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/utils.cuh>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include <cstdint>
#include <limits>

namespace sglang {

namespace route_warp {

// @kernel
}  // namespace route_warp

// The kernel for one routing. kUsePDL: it may start before the kernel ahead of it has ended.
template <int kNumExperts, int kNumGroups, int kTopGroups, int kTopK, int kNumShared, bool kUsePDL>
struct RouteWarpKernel {
  using R = route_warp::Routing<kNumExperts, kNumGroups, kTopGroups, kTopK, kNumShared>;

  // Writes weights [M, columns] in fp32 and ids [M, columns] in int32. logits [M, N] and bias [N] are
  // fp32; all four are contiguous and on one device, logits and bias 16-byte aligned.
  static void
  run(const tvm::ffi::TensorView logits,
      const tvm::ffi::TensorView bias,
      const tvm::ffi::TensorView weights,
      const tvm::ffi::TensorView ids,
      double scale,
      double shared_weight) {
    using namespace host;

    auto M = SymbolicSize{"num_tokens"};
    auto device = SymbolicDevice{};
    TensorMatcher({kNumExperts}).with_dtype<fp32_t>().with_device<kDLCUDA>(device).ensure_alignment(16).verify(bias);
    TensorMatcher({M, kNumExperts}).with_dtype<fp32_t>().with_device(device).ensure_alignment(16).verify(logits);
    TensorMatcher({M, R::kColumns}).with_dtype<fp32_t>().with_device(device).verify(weights);
    TensorMatcher({M, R::kColumns}).with_dtype<int32_t>().with_device(device).verify(ids);
    const auto num_tokens = M.unwrap();
    if (num_tokens == 0) return;
    constexpr auto kMost = std::numeric_limits<int32_t>::max() / kNumExperts;
    CHECK_HOST(num_tokens <= kMost) << "num_tokens is " << num_tokens << ", must be at most " << kMost;
    const route_warp::Arguments args = {
        .logits = static_cast<const fp32_t*>(logits.data_ptr()),
        .bias = static_cast<const fp32_t*>(bias.data_ptr()),
        .weights = static_cast<fp32_t*>(weights.data_ptr()),
        .ids = static_cast<int32_t*>(ids.data_ptr()),
        .num_tokens = static_cast<int>(num_tokens),
        .scale = scale,
        .shared_weight = static_cast<fp32_t>(shared_weight),
    };
    const tvm::ffi::CUDADeviceGuard guard(device.unwrap().device_id);
    constexpr int kTokens = route_warp::kTokensOfCta;
    constexpr auto kernel = route_warp::route_kernel<R, kUsePDL>;
    LaunchKernel((num_tokens + kTokens - 1) / kTokens, 32 * kTokens, device.unwrap()).enable_pdl(kUsePDL)(kernel, args);
  }
};

}  // namespace sglang
