// What the kernels of this folder share of PTX: the mbarriers of a cluster, and how its CTAs name
// each other's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace router_gemm {

// A barrier that the cluster sees, for one phase.
__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The phase ends with the last of `bytes`, some of which may have come before.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p;"
        "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;"
        "  selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
  }
}

__device__ __forceinline__ uint32_t in_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

}  // namespace router_gemm
