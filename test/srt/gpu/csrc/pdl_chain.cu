// The neighbours of a gate at their worst, for the tests of programmatic dependent launch.
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

namespace {

using tvm::ffi::TensorView;

__device__ void spin(int64_t cycles) {
  const int64_t start = clock64();
  while (clock64() - start < cycles) {
  }
}

// Lets the next kernel start at once, then writes `target` as late as it can.
__global__ void write_late(const uint4* source, uint4* target, int64_t count, int64_t cycles) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  spin(cycles);
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    target[i] = source[i];
  }
}

// Reads `logits` as early as it may, then destroys `hidden_states`.
__global__ void read_early(
    const uint4* logits, uint4* kept, int64_t count, uint4* hidden_states, int64_t hidden_count) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  for (int64_t i = first; i < count; i += step) {
    kept[i] = logits[i];
  }
  for (int64_t i = first; i < hidden_count; i += step) {
    hidden_states[i] = make_uint4(0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u);  // NaN
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), DLDevice device, bool pdl, Arguments... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = pdl;
  cudaLaunchConfig_t config = {};
  config.gridDim = 16;
  config.blockDim = 256;
  config.stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
  }
}

int64_t vectors(const TensorView& tensor) {
  int64_t bytes = tensor.dtype().bits / 8;
  for (int i = 0; i < tensor.ndim(); ++i) {
    bytes *= tensor.size(i);
  }
  return bytes / static_cast<int64_t>(sizeof(uint4));
}

void produce(TensorView source, TensorView target, int64_t cycles, bool pdl) {
  launch(
      write_late,
      target.device(),
      pdl,
      static_cast<const uint4*>(source.data_ptr()),
      static_cast<uint4*>(target.data_ptr()),
      vectors(target),
      cycles);
}

void consume(TensorView logits, TensorView kept, TensorView hidden_states, bool pdl) {
  launch(
      read_early,
      logits.device(),
      pdl,
      static_cast<const uint4*>(logits.data_ptr()),
      static_cast<uint4*>(kept.data_ptr()),
      vectors(logits),
      static_cast<uint4*>(hidden_states.data_ptr()),
      vectors(hidden_states));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(produce, produce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(consume, consume);
