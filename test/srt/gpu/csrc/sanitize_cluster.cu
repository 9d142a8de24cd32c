// The cluster kernel in a program of its own, small enough for compute-sanitizer.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cluster_router_gemm.cuh"

namespace {

constexpr int kNumExperts = 64, kHiddenSize = 2048;

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

std::vector<__nv_bfloat16> small_integers(size_t count) {
  std::vector<__nv_bfloat16> values(count);
  for (auto& value : values) {
    value = __nv_bfloat16(static_cast<float>(std::rand() % 5 - 2));
  }
  return values;
}

__nv_bfloat16* on_device(const std::vector<__nv_bfloat16>& values) {
  __nv_bfloat16* copy;
  check(cudaMalloc(&copy, values.size() * sizeof(__nv_bfloat16)));
  check(cudaMemcpy(copy, values.data(), values.size() * sizeof(__nv_bfloat16), cudaMemcpyDefault));
  return copy;
}

// Sums of small integers are exact, in whatever order.
template <int kExperts, int kTokens, bool kManyPasses>
void run(int num_tokens, bool pdl) {
  const auto tokens = small_integers(static_cast<size_t>(num_tokens) * kHiddenSize);
  const auto weight = small_integers(static_cast<size_t>(kNumExperts) * kHiddenSize);
  auto *device_tokens = on_device(tokens), *device_weight = on_device(weight);
  std::vector<float> logits(static_cast<size_t>(num_tokens) * kNumExperts);
  float* device_logits;
  check(cudaMalloc(&device_logits, logits.size() * sizeof(float)));
  using Shape = router_gemm::Shape<kNumExperts, kHiddenSize, kExperts, kTokens, kManyPasses>;
  check(router_gemm::allow_shared_memory<Shape>(num_tokens));
  for (int i = 0; i < 2; ++i) {
    check(router_gemm::launch<Shape>(
        device_tokens, device_weight, device_logits, num_tokens, pdl, nullptr));
  }
  check(cudaMemcpy(logits.data(), device_logits, logits.size() * sizeof(float), cudaMemcpyDefault));
  for (int m = 0; m < num_tokens; ++m) {
    for (int n = 0; n < kNumExperts; ++n) {
      float expected = 0;
      for (int k = 0; k < kHiddenSize; ++k) {
        expected += static_cast<float>(tokens[m * kHiddenSize + k]) *
                    static_cast<float>(weight[n * kHiddenSize + k]);
      }
      if (logits[m * kNumExperts + n] != expected) {
        std::fprintf(stderr, "M %d: logits[%d][%d] is wrong\n", num_tokens, m, n);
        std::exit(1);
      }
    }
  }
  check(cudaFree(device_tokens));
  check(cudaFree(device_weight));
  check(cudaFree(device_logits));
}

}  // namespace

int main() {
  for (const bool pdl : {false, true}) {
    for (const int num_tokens : {1, 5, 8}) {
      run<16, 8, false>(num_tokens, pdl);
      run<32, 8, false>(num_tokens, pdl);
    }
    run<16, 16, false>(9, pdl);
    run<32, 16, false>(16, pdl);
    run<16, 16, true>(17, pdl);
    run<32, 16, true>(77, pdl);
    run<32, 16, true>(128, pdl);
  }
  std::puts("right");
}
