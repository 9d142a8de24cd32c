// cluster_router_gemm.cuh for one N and K and their dtypes, as a TVM FFI function.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "checks.cuh"
#include "cluster_router_gemm.cuh"

#if !defined(ROUTER_GEMM_NUM_EXPERTS) || !defined(ROUTER_GEMM_HIDDEN_SIZE)
#error "the build defines N and K"
#endif

namespace router_gemm {

constexpr int kNumExperts = ROUTER_GEMM_NUM_EXPERTS, kHiddenSize = ROUTER_GEMM_HIDDEN_SIZE;
constexpr int kMaxTokens = 128;
#ifdef ROUTER_GEMM_FP32
using Weight = float;
constexpr DLDataType kWeight = kFloat32;
#else
using Weight = __nv_bfloat16;
constexpr DLDataType kWeight = kBfloat16;
#endif
#ifdef ROUTER_GEMM_BF16_LOGITS
using Logits = __nv_bfloat16;
constexpr DLDataType kLogits = kBfloat16;
#else
using Logits = float;
constexpr DLDataType kLogits = kFloat32;
#endif
#ifdef ROUTER_GEMM_BIAS
constexpr bool kBias = true;
#else
constexpr bool kBias = false;
#endif
constexpr const char* kName = "cluster_router_gemm";

// A wide tile has fewer CTAs read each token; with N below 256 it would leave too few of them to
// keep the memory busy.
constexpr int kExperts = kNumExperts < 256 || kNumExperts % 32 != 0 ? 16 : 32;
// With fp32 weights and N above 512 not all wide tiles are resident at once. Up to M = 8 two
// narrow ones fit an SM, beyond that not. Timed with [768, 6144] alone (docs/kernel.md).
constexpr int kExpertsOfFew = sizeof(Weight) == 4 && kNumExperts > 512 ? 16 : kExperts;

template <int kTokens, bool kManyPasses>
using ShapeOf =
    Shape<Weight, kNumExperts, kHiddenSize, kTokens == 8 ? kExpertsOfFew : kExperts, kTokens,
          kManyPasses, Logits, kBias>;
using Few = ShapeOf<8, false>;
using Some = ShapeOf<16, false>;
using Many = ShapeOf<16, true>;
static_assert(Many::shared_bytes(kMaxTokens) <= 99 * 1024, "all that a CTA may have on SM 120");

// Loads the kernels on a device. Once for each, before the first `run` there.
void prepare(int64_t device) {
  const tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  throw_if(allow_shared_memory<Few>(Few::kTokens), kName);
  throw_if(allow_shared_memory<Some>(Some::kTokens), kName);
  throw_if(allow_shared_memory<Many>(kMaxTokens), kName);
}

void run(
    TensorView hidden_states,
    TensorView weight,
    TensorView logits,
    bool pdl,
    tvm::ffi::Optional<TensorView> bias) {
  check_tensor(hidden_states, "hidden_states", 2, kBfloat16);
  check_tensor(weight, "weight", 2, kWeight);
  check_tensor(logits, "logits", 2, kLogits);
  const int64_t num_tokens = hidden_states.size(0);
  if (num_tokens > kMaxTokens) {
    TVM_FFI_THROW(ValueError) << "num_tokens is " << num_tokens << ", must be " << kMaxTokens
                              << " or fewer";
  }
  check(hidden_states.size(1) == kHiddenSize, "hidden_states", "[M, K] of the K it was built for");
  check(
      weight.size(0) == kNumExperts && weight.size(1) == kHiddenSize,
      "weight",
      "[N, K] of the N and K it was built for");
  check(logits.size(0) == num_tokens && logits.size(1) == kNumExperts, "logits", "[M, N]");
  const DLDevice device = hidden_states.device();
  check_same_device(weight, "weight", hidden_states, "on hidden_states' device");
  check_same_device(logits, "logits", hidden_states, "on hidden_states' device");
  check(bias.has_value() == kBias, "bias", kBias ? "a vector" : "None");
  if constexpr (kBias) {
    check_tensor(bias.value(), "bias", 1, kBfloat16);
    check(bias.value().size(0) == kNumExperts, "bias", "[N]");
    check_same_device(bias.value(), "bias", hidden_states, "on hidden_states' device");
  }
  if (num_tokens == 0) {
    return;
  }
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const auto stream =
      static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  const auto launch_on = num_tokens <= Few::kTokens    ? &launch<Few>
                         : num_tokens <= Some::kTokens ? &launch<Some>
                                                       : &launch<Many>;
  const cudaError_t error = launch_on(
      hidden_states.data_ptr(),
      weight.data_ptr(),
      logits.data_ptr(),
      static_cast<int>(num_tokens),
      pdl,
      stream,
      kBias ? bias.value().data_ptr() : nullptr);
  throw_if(error, kName);
}

// The largest M of each kernel: whoever loads the module runs each of them once.
tvm::ffi::Array<int64_t> largest_num_tokens() {
  return {Few::kTokens, Some::kTokens, kMaxTokens};
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(largest_num_tokens, largest_num_tokens);

}  // namespace router_gemm
