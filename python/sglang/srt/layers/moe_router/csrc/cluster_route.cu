// cluster_route.cuh for one routing, as TVM FFI functions.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "checks.cuh"
#include "cluster_route.cuh"

#if !defined(ROUTE_NUM_EXPERTS) || !defined(ROUTE_NUM_GROUPS) || !defined(ROUTE_TOP_GROUPS) || \
    !defined(ROUTE_TOP_K) || !defined(ROUTE_NUM_SHARED) || !defined(ROUTE_RENORMALIZE) ||          \
    !defined(ROUTE_TRITON)
#error "the build defines the routing"
#endif

namespace router_gemm {

using tvm::ffi::Optional;
using Built = Routing<
    ROUTE_NUM_EXPERTS, ROUTE_NUM_GROUPS, ROUTE_TOP_GROUPS, ROUTE_TOP_K, ROUTE_NUM_SHARED,
    ROUTE_RENORMALIZE != 0, ROUTE_TRITON ? Arithmetic::kTriton : Arithmetic::kFlashInfer>;
constexpr const char* kName = "cluster_route";

// Loads the kernels on a device. Once for each, before the first `route` there.
void prepare(int64_t device) {
  const tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  throw_if(prepare_route<Built>(), kName);
}

// With sorted_ids, expert_ids and num_tokens_post_padded the plan of the expert GEMM is made, too.
void route(
    TensorView logits,
    TensorView bias,
    TensorView weights,
    TensorView ids,
    Optional<TensorView> sorted_ids,
    Optional<TensorView> expert_ids,
    Optional<TensorView> num_tokens_post_padded,
    int64_t block_size,
    double scale,
    double shared_weight,
    Optional<int64_t> shared_order,
    int64_t sum_order,
    bool pdl) {
  check_tensor(logits, "logits", 2, kFloat32);
  check_tensor(bias, "bias", 1, kFloat32);
  check_tensor(weights, "weights", 2, kFloat32);
  check_tensor(ids, "ids", 2, kInt32);
  const int64_t num_tokens = logits.size(0);
  const bool align = sorted_ids.has_value();
  const int64_t most =
      align ? kMaxTokens : std::numeric_limits<int32_t>::max() / Built::kNumExperts;
  if (num_tokens > most) {
    TVM_FFI_THROW(ValueError) << "num_tokens is " << num_tokens << ", must be " << most
                              << " or fewer";
  }
  check(logits.size(1) == Built::kNumExperts, "logits", "[M, N] of the N it was built for");
  check(bias.size(0) == Built::kNumExperts, "bias", "[N] of the N it was built for");
  for (const auto& [tensor, name] : {std::pair{&weights, "weights"}, std::pair{&ids, "ids"}}) {
    const bool fits = tensor->size(0) == num_tokens && tensor->size(1) == Built::kColumns;
    check(fits, name, "[M, columns]");
    check_same_device(*tensor, name, logits, "on logits' device");
  }
  check_same_device(bias, "bias", logits, "on logits' device");
  if (num_tokens == 0) {
    return;
  }
  Arguments args = {};
  const auto optional = [&](const Optional<TensorView>& tensor, const char* name, int64_t size) {
    if (!tensor.has_value()) {
      return static_cast<int32_t*>(nullptr);
    }
    const TensorView view = tensor.value();
    check(view.device().device_type == kDLCUDA, name, "on a CUDA device");
    check_same_device(view, name, logits, "on logits' device");
    check(view.dtype() == kInt32 && view.IsContiguous(), name, "int32 and contiguous");
    check(view.numel() >= size, name, "large enough");
    return static_cast<int32_t*>(view.data_ptr());
  };
  args.logits = static_cast<const float*>(logits.data_ptr());
  args.bias = static_cast<const float*>(bias.data_ptr());
  args.weights = static_cast<float*>(weights.data_ptr());
  args.ids = static_cast<int32_t*>(ids.data_ptr());
  args.num_tokens = static_cast<int>(num_tokens);
  args.scale = scale;
  args.shared_weight = static_cast<float>(shared_weight);
  const auto order = [](int64_t value, const char* name) {
    check(0 <= value && value <= 2, name, "0, 1 or 2");
    return static_cast<SumOrder>(value);
  };
  args.shared_of_sum = shared_order.has_value();
  args.shared_order = order(shared_order.value_or(0), "shared_order");
  args.sum_order = order(sum_order, "sum_order");
  args.pdl = pdl;
  if (align) {
    check(
        block_size >= 16 && block_size <= 128 && (block_size & (block_size - 1)) == 0,
        "block_size",
        "16, 32, 64 or 128");
    check(expert_ids.has_value() && num_tokens_post_padded.has_value(), "the plan", "whole");
    const int64_t numel = num_tokens * Built::kColumns;
    const int64_t used = std::min<int64_t>(numel, Built::kNumExperts + Built::kShared);
    const int64_t padded = numel + used * (block_size - 1);  // the last block of each, but for one
    args.sorted_ids = optional(sorted_ids, "sorted_ids", padded / block_size * block_size);
    args.expert_ids = optional(expert_ids, "expert_ids", padded / block_size);
    args.num_tokens_post_padded = optional(num_tokens_post_padded, "num_tokens_post_padded", 1);
    args.block_shift = __builtin_ctzll(static_cast<unsigned long long>(block_size));
  }
  const DLDevice device = logits.device();
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const auto stream =
      static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  throw_if(launch_route<Built>(args, align, stream), kName);
}

int64_t largest_num_tokens() {
  return kMaxTokens;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, route);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(largest_num_tokens, largest_num_tokens);

}  // namespace router_gemm
