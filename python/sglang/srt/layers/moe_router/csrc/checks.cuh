// What the TVM FFI functions of this folder ask of their arguments, and how they raise.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>

namespace router_gemm {

using tvm::ffi::TensorView;

constexpr DLDataType kBfloat16{kDLBfloat, 16, 1}, kFloat32{kDLFloat, 32, 1}, kInt32{kDLInt, 32, 1};

inline void check(bool condition, const char* argument, const char* must) {
  if (!condition) {
    TVM_FFI_THROW(ValueError) << argument << " must be " << must;
  }
}

inline void check_tensor(
    const TensorView& tensor, const char* argument, int ndim, DLDataType dtype) {
  check(tensor.device().device_type == kDLCUDA, argument, "on a CUDA device");
  check(tensor.ndim() == ndim, argument, ndim == 1 ? "a vector" : "a matrix");
  const char* name = dtype.code == kDLBfloat  ? "bfloat16"
                     : dtype.code == kDLFloat ? "float32"
                                              : "int32";
  check(tensor.dtype() == dtype, argument, name);
  // As in PyTorch, a tensor without elements is contiguous whatever its strides are.
  check(tensor.numel() == 0 || tensor.IsContiguous(), argument, "contiguous");
  check(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, argument, "16-byte aligned");
}

inline void check_same_device(
    const TensorView& tensor, const char* argument, const TensorView& first, const char* must) {
  check(tensor.device().device_id == first.device().device_id, argument, must);
}

inline void throw_if(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // cleared, or PyTorch would report it for a call of its own
    TVM_FFI_THROW(RuntimeError) << kernel << ": " << cudaGetErrorString(error);
  }
}

}  // namespace router_gemm
