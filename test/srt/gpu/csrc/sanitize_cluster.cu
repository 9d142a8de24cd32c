// The cluster kernel in a program of its own, small enough for compute-sanitizer.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cluster_router_gemm.cuh"

namespace {

constexpr int kNumExperts = 64;

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

template <typename T>
std::vector<T> integers(size_t count, int most) {
  std::vector<T> values(count);
  for (auto& value : values) {
    value = T(static_cast<float>(std::rand() % (2 * most + 1) - most));
  }
  return values;
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* copy;
  check(cudaMalloc(&copy, values.size() * sizeof(T)));
  check(cudaMemcpy(copy, values.data(), values.size() * sizeof(T), cudaMemcpyDefault));
  return copy;
}

// Sums of integers below 2^24 are exact, in whatever order. An fp32 weight here has two terms.
template <
    typename Weight,
    typename Logits,
    bool kBias,
    int kHiddenSize,
    int kExperts,
    int kTokens,
    bool kManyPasses>
void run(int num_tokens, bool pdl) {
  const auto tokens = integers<__nv_bfloat16>(static_cast<size_t>(num_tokens) * kHiddenSize, 2);
  const int most = sizeof(Weight) == 4 ? 3000 : 2;
  const auto weight = integers<Weight>(static_cast<size_t>(kNumExperts) * kHiddenSize, most);
  auto* device_tokens = on_device(tokens);
  auto* device_weight = on_device(weight);
  const auto bias = integers<__nv_bfloat16>(kNumExperts, 100);  // not lost where logits are rounded
  auto* device_bias = on_device(bias);
  std::vector<Logits> logits(static_cast<size_t>(num_tokens) * kNumExperts);
  Logits* device_logits;
  check(cudaMalloc(&device_logits, logits.size() * sizeof(Logits)));
  using Shape = router_gemm::
      Shape<Weight, kNumExperts, kHiddenSize, kExperts, kTokens, kManyPasses, Logits, kBias>;
  check(router_gemm::allow_shared_memory<Shape>(num_tokens));
  for (int i = 0; i < 2; ++i) {
    check(router_gemm::launch<Shape>(
        device_tokens, device_weight, device_logits, num_tokens, pdl, nullptr, device_bias));
  }
  check(
      cudaMemcpy(logits.data(), device_logits, logits.size() * sizeof(Logits), cudaMemcpyDefault));
  for (int m = 0; m < num_tokens; ++m) {
    for (int n = 0; n < kNumExperts; ++n) {
      float expected = kBias ? static_cast<float>(bias[n]) : 0;
      for (int k = 0; k < kHiddenSize; ++k) {
        expected += static_cast<float>(tokens[m * kHiddenSize + k]) *
                    static_cast<float>(weight[n * kHiddenSize + k]);
      }
      const auto logit = static_cast<float>(logits[m * kNumExperts + n]);
      if (logit != static_cast<float>(static_cast<Logits>(expected))) {
        std::fprintf(stderr, "M %d: logits[%d][%d] is wrong\n", num_tokens, m, n);
        std::exit(1);
      }
    }
  }
  check(cudaFree(device_tokens));
  check(cudaFree(device_weight));
  check(cudaFree(device_bias));
  check(cudaFree(device_logits));
}

template <typename Weight, int kHiddenSize, typename Logits = float, bool kBias = false>
void run_all(bool pdl) {
  for (const int num_tokens : {1, 5, 8}) {
    run<Weight, Logits, kBias, kHiddenSize, 16, 8, false>(num_tokens, pdl);
    run<Weight, Logits, kBias, kHiddenSize, 32, 8, false>(num_tokens, pdl);
  }
  run<Weight, Logits, kBias, kHiddenSize, 16, 16, false>(9, pdl);
  run<Weight, Logits, kBias, kHiddenSize, 32, 16, false>(16, pdl);
  run<Weight, Logits, kBias, kHiddenSize, 16, 16, true>(17, pdl);
  run<Weight, Logits, kBias, kHiddenSize, 32, 16, true>(77, pdl);
  run<Weight, Logits, kBias, kHiddenSize, 32, 16, true>(128, pdl);
}

}  // namespace

int main() {
  for (const bool pdl : {false, true}) {
    run_all<__nv_bfloat16, 2048>(pdl);
    run_all<__nv_bfloat16, 1088>(pdl);  // the last warps have no chunk of K
    run_all<float, 2048>(pdl);
    run_all<__nv_bfloat16, 1088, __nv_bfloat16, true>(pdl);
  }
  std::puts("right");
}
