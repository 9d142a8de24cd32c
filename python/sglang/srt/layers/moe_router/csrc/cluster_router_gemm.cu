// cluster_router_gemm.cuh for one N and K, as a TVM FFI function.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "cluster_router_gemm.cuh"

#if !defined(ROUTER_GEMM_NUM_EXPERTS) || !defined(ROUTER_GEMM_HIDDEN_SIZE)
#error "the build defines N and K"
#endif

namespace router_gemm {

using tvm::ffi::TensorView;

constexpr int kNumExperts = ROUTER_GEMM_NUM_EXPERTS, kHiddenSize = ROUTER_GEMM_HIDDEN_SIZE;
constexpr int kMaxTokens = 128;

// A wide tile has fewer CTAs read each token; with N below 256 it would leave too few of them to
// keep the memory busy.
constexpr int kExperts = kNumExperts < 256 || kNumExperts % 32 != 0 ? 16 : 32;

template <int kTokens, bool kManyPasses>
using ShapeOf = Shape<kNumExperts, kHiddenSize, kExperts, kTokens, kManyPasses>;
using Few = ShapeOf<8, false>;
using Some = ShapeOf<16, false>;
using Many = ShapeOf<16, true>;
static_assert(Many::shared_bytes(kMaxTokens) <= 99 * 1024, "all that a CTA may have on SM 120");

void check(bool condition, const char* argument, const char* must) {
  if (!condition) {
    TVM_FFI_THROW(ValueError) << argument << " must be " << must;
  }
}

void check_matrix(const TensorView& matrix, const char* argument, DLDataType dtype) {
  check(matrix.device().device_type == kDLCUDA, argument, "on a CUDA device");
  check(matrix.ndim() == 2, argument, "a matrix");
  check(matrix.dtype() == dtype, argument, dtype.code == kDLBfloat ? "bfloat16" : "float32");
  // As in PyTorch, a matrix without elements is contiguous whatever its strides are.
  check(matrix.numel() == 0 || matrix.IsContiguous(), argument, "contiguous");
  check(reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0, argument, "16-byte aligned");
}

void throw_if(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // cleared, or PyTorch would report it for a call of its own
    TVM_FFI_THROW(RuntimeError) << "cluster_router_gemm: " << cudaGetErrorString(error);
  }
}

// Loads the kernels on a device. Once for each, before the first `run` there.
void prepare(int64_t device) {
  const tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  throw_if(allow_shared_memory<Few>(Few::kTokens));
  throw_if(allow_shared_memory<Some>(Some::kTokens));
  throw_if(allow_shared_memory<Many>(kMaxTokens));
}

void run(TensorView hidden_states, TensorView weight, TensorView logits, bool pdl) {
  check_matrix(hidden_states, "hidden_states", DLDataType{kDLBfloat, 16, 1});
  check_matrix(weight, "weight", DLDataType{kDLBfloat, 16, 1});
  check_matrix(logits, "logits", DLDataType{kDLFloat, 32, 1});
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
  check(weight.device().device_id == device.device_id, "weight", "on hidden_states' device");
  check(logits.device().device_id == device.device_id, "logits", "on hidden_states' device");
  if (num_tokens == 0) {
    return;
  }
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const auto stream =
      static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  const auto launch_on = num_tokens <= Few::kTokens    ? &launch<Few>
                         : num_tokens <= Some::kTokens ? &launch<Some>
                                                       : &launch<Many>;
  throw_if(launch_on(
      hidden_states.data_ptr(),
      weight.data_ptr(),
      static_cast<float*>(logits.data_ptr()),
      static_cast<int>(num_tokens),
      pdl,
      stream));
}

// The largest M of each kernel: whoever loads the module runs each of them once.
tvm::ffi::Array<int64_t> largest_num_tokens() {
  return {Few::kTokens, Some::kTokens, kMaxTokens};
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(largest_num_tokens, largest_num_tokens);

}  // namespace router_gemm
