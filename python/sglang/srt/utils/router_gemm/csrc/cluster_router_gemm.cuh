// Router GEMM of DeepSeek-V3-class models: logits[M, N] = hidden_states[M, K] @ weight[N, K].T,
// bf16 in, fp32 out. docs/kernel.md draws who holds what and counts the bytes.
//
// A cluster of 8 CTAs computes kExperts experts; each CTA holds one eighth of K, and each of its
// warps one chunk of that, with TMA copies and barriers of its own. The warp multiplies its chunk
// with mma.m16n8k16 (weights are A, tokens are B). The sums go over the warps in shared memory,
// then over the cluster: a token belongs to one CTA, the others push theirs to it with st.async,
// and its mbarrier counts the bytes, so no cluster barrier closes.
//
// Every sum has one order, whatever M is: a row's bits do not depend on the batch it came in.
// PDL: global memory is read only after griddepcontrol.wait, so whatever an earlier kernel wrote,
// tokens or weights, is seen. What comes before touches nothing of theirs.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace router_gemm {

constexpr int kRanks = 8;   // CTAs of a cluster, the most that is portable
constexpr int kBlock = 64;  // elements of K in kBlockBytes, the span of a TMA swizzle
constexpr int kBlockBytes = 128;

// ---- PTX -------------------------------------------------------------------------------------

__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
}

// Makes barriers that were initialised visible to copies and to the cluster.
__device__ __forceinline__ void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// For copies of this CTA.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p;"
        "  mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;"
        "  selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// For pushes of the cluster, the first phase.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier) {
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

// Copies the box of `map` that starts at (0, row, block) and counts its bytes on `barrier`.
__device__ __forceinline__ void tma_copy(
    uint32_t to, const CUtensorMap& map, int row, int block, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(&map), "r"(0), "r"(row), "r"(block), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ uint32_t in_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Stores 16 bytes in another CTA and counts them on its barrier.
__device__ __forceinline__ void push(uint32_t to, uint32_t barrier, const float4& value) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// Not volatile, unlike the rest: the compiler may interleave independent sums.
__device__ __forceinline__ void mma(
    float (&sum)[4], const uint32_t (&weights)[4], uint32_t tokens0, uint32_t tokens1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(weights[0]),
        "r"(weights[1]),
        "r"(weights[2]),
        "r"(weights[3]),
        "r"(tokens0),
        "r"(tokens1));
}

// Adds in pairs, then pairs of pairs: the same tree for every M.
template <int kCount>
__device__ __forceinline__ float4 tree_sum(float4 (&values)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < kCount; i += 2 * step) {
      values[i].x += values[i + step].x;
      values[i].y += values[i + step].y;
      values[i].z += values[i + step].z;
      values[i].w += values[i + step].w;
    }
  }
  return values[0];
}

// ---- Shapes ----------------------------------------------------------------------------------

// kNumExperts is N, kHiddenSize is K. kExperts are computed by one cluster, kTokens in one pass,
// kStages passes' tokens fit into shared memory at once.
template <int kNumExperts_, int kHiddenSize_, int kExperts_, int kTokens_, int kStages_>
struct Shape {
  static constexpr int kNumExperts = kNumExperts_, kHiddenSize = kHiddenSize_;
  static constexpr int kExperts = kExperts_, kTokens = kTokens_, kStages = kStages_;
  static_assert(kExperts % 16 == 0 && kNumExperts % kExperts == 0, "experts are the mma's m16");
  static_assert(kTokens % kRanks == 0, "a thread pushes to the same CTA in every pass");

  static constexpr int kSlice = kHiddenSize / kRanks;                          // K of a CTA
  static constexpr int kBlocks = kHiddenSize % (2 * kBlock * kRanks) ? 1 : 2;  // of a warp
  static_assert(kHiddenSize % (kRanks * kBlock) == 0, "K must be a multiple of 512");
  static constexpr int kWarps = kSlice / (kBlocks * kBlock);
  static_assert(kWarps <= 16, "one warp a chunk, 512 threads at most");
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kExpertTiles = kExperts / 16, kTokenTiles = kTokens / 8;  // m16, n8
  static constexpr int kQuads = kExperts / 4;  // threads that sum up a token, four experts each

  // Shared memory, in bytes. The swizzle puts the eight rows of an ldmatrix into different banks,
  // the padding of the sums does so for the stores of a warp.
  static constexpr int kWeightBlock = kExperts * kBlockBytes, kTokenBlock = kTokens * kBlockBytes;
  static constexpr int kSumBytes = 4 * (kExperts + 4);
  static constexpr int kWeights = 0;                                      // [warp][block]
  static constexpr int kTokenRows = kWeights + kWarps * kBlocks * kWeightBlock;  // [stage]...
  static constexpr int kStage = kWarps * kBlocks * kTokenBlock;           // ...[warp][block]
  static constexpr int kSums = kTokenRows + kStages * kStage;             // [warp][token]
  static constexpr int kBarriers = kSums + kWarps * kTokens * kSumBytes;  // [warp]
  static constexpr int kWarpBarriers = 8 * (kBlocks + kStages);
  static constexpr int kPushBarrier = kBarriers + kWarps * kWarpBarriers;
  static constexpr int kPushed = (kPushBarrier + 8 + 15) / 16 * 16;  // [rank][slot]
  static constexpr int kOwned = kRanks * kExperts * 4;  // pushed for one token

  static constexpr int shared_bytes(int num_tokens) {
    return kPushed + (num_tokens + kRanks - 1) / kRanks * kOwned;
  }
};

// ---- Kernel ----------------------------------------------------------------------------------

template <typename S>
__global__ void __cluster_dims__(kRanks, 1, 1) __launch_bounds__(S::kThreads, 1)
    cluster_router_gemm_kernel(
        float* __restrict__ logits,
        int num_tokens,
        const __grid_constant__ CUtensorMap hidden_states,
        const __grid_constant__ CUtensorMap weight) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(base));  // computed once
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(0xffffffff, thread / 32, 0);  // uniform, for the copies
  const int rank = blockIdx.x % unsigned{kRanks};
  const int first_expert = blockIdx.x / unsigned{kRanks} * S::kExperts;
  const int first_block = rank * (S::kSlice / kBlock) + warp * S::kBlocks;
  const int passes = (num_tokens + S::kTokens - 1) / S::kTokens;
  const int slots = (num_tokens + kRanks - 1) / kRanks;  // tokens that belong to a CTA, at most
  const bool leader = elect_one();

  const uint32_t weight_barrier = base + S::kBarriers + warp * S::kWarpBarriers;
  const uint32_t token_barrier = weight_barrier + 8 * S::kBlocks;
  const uint32_t push_barrier = base + S::kPushBarrier;
  const auto copy_tokens = [&](int pass) {
    const int stage = static_cast<unsigned>(pass) % S::kStages;
    const int at = stage * S::kStage + warp * S::kBlocks * S::kTokenBlock;
    const uint32_t barrier = token_barrier + 8 * stage;
    barrier_expect(barrier, S::kBlocks * S::kTokenBlock);  // rows past M come as zeros
    tma_copy(base + S::kTokenRows + at, hidden_states, pass * S::kTokens, first_block, barrier);
  };
  if (leader) {
#pragma unroll
    for (int i = 0; i < S::kBlocks + S::kStages; ++i) {
      barrier_init(weight_barrier + 8 * i);
    }
    barrier_fence();
  }
  __syncwarp();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (leader) {
    // Few tokens come at once, from L2; many would come late behind the weights.
    constexpr bool kTokensFirst = S::kTokens > 16;
    if (kTokensFirst) {
      copy_tokens(0);
    }
#pragma unroll
    for (int i = 0; i < S::kBlocks; ++i) {
      const int at = (warp * S::kBlocks + i) * S::kWeightBlock;
      barrier_expect(weight_barrier + 8 * i, S::kWeightBlock);
      tma_copy(base + S::kWeights + at, weight, first_expert, first_block + i, weight_barrier + 8 * i);
    }
#pragma unroll
    for (int pass = kTokensFirst; pass < S::kStages; ++pass) {
      if (pass < passes) {
        copy_tokens(pass);
      }
    }
    if (warp == 0) {
      barrier_init(push_barrier);
      barrier_fence();
    }
  }
  __syncwarp();
  if (warp == 0 && leader) {
    const int owned = (num_tokens - rank + kRanks - 1) / kRanks;
    barrier_expect(push_barrier, owned * S::kOwned);
  }
  __syncwarp();
  // A push needs the barrier of its target: hence the cluster's wait, which the copies hide.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  // The next kernel may be scheduled from here on; it waits for the end of this one by itself.
  asm volatile("griddepcontrol.launch_dependents;");

  // While the copies fly: every address that is needed after they have landed. In a row of a
  // block, the swizzle moves 16 bytes from place p to p ^ (row % 8).
  const unsigned row = lane % 8;
  const uint32_t weights_at =
      base + S::kWeights + warp * S::kBlocks * S::kWeightBlock + lane % 16 * kBlockBytes;
  const uint32_t tokens_at =
      base + S::kTokenRows + warp * S::kBlocks * S::kTokenBlock + row * kBlockBytes;
  uint32_t store_at =
      base + S::kSums + (warp * S::kTokens + lane % 4 * 2) * S::kSumBytes + lane / 4 * 4;
  constexpr int kTokensAtOnce = S::kThreads / S::kQuads;
  constexpr int kRounds = (S::kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  const unsigned quad = thread % S::kQuads, thread_token = thread / S::kQuads;
  uint32_t sums_at = base + S::kSums + thread_token * S::kSumBytes + quad * 16;
  uint32_t push_at[kRounds], push_to[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const unsigned token = thread_token + i * kTokensAtOnce;
    const int slot = rank * slots + token / kRanks;
    push_at[i] = in_rank(base + S::kPushed + (slot * S::kQuads + quad) * 16, token % kRanks);
    push_to[i] = in_rank(push_barrier, token % kRanks);
    asm volatile("" : "+r"(push_at[i]), "+r"(push_to[i]));
  }
  const int owned_token = thread_token * kRanks + rank;
  uint32_t pushed_at = base + S::kPushed + thread * 16;
  float* logits_at =
      logits + static_cast<size_t>(owned_token) * S::kNumExperts + first_expert + quad * 4;
  asm volatile("" : "+r"(store_at), "+r"(sums_at), "+r"(pushed_at), "+l"(logits_at));
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");

  uint32_t weights[S::kExpertTiles][4 * S::kBlocks][4];  // k16 steps
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int stage = static_cast<unsigned>(pass) % S::kStages;
    uint32_t tokens[S::kTokenTiles][2 * S::kBlocks][4];  // pairs of k16 steps
    barrier_wait(token_barrier + 8 * stage, static_cast<unsigned>(pass) / S::kStages % 2);
#pragma unroll
    for (int n = 0; n < S::kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2 * S::kBlocks; ++i) {
        const uint32_t tile = i / 2 * S::kTokenBlock + n * 8 * kBlockBytes;
        const uint32_t place = ((i % 2 * 4 + lane / 8) ^ row) * 16;
        load_matrices(tokens[n][i], tokens_at + stage * S::kStage + tile + place);
      }
    }
    float even[S::kExpertTiles][S::kTokenTiles][4] = {};  // two chains: half the latency
    float odd[S::kExpertTiles][S::kTokenTiles][4] = {};
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      if (pass == 0) {
        barrier_wait(weight_barrier + 8 * block, 0);
#pragma unroll
        for (int m = 0; m < S::kExpertTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t tile = block * S::kWeightBlock + m * 16 * kBlockBytes;
            const uint32_t place = ((i * 2 + lane / 16) ^ row) * 16;
            load_matrices(weights[m][block * 4 + i], weights_at + tile + place);
          }
        }
      }
#pragma unroll
      for (int i = block * 2; i < block * 2 + 2; ++i) {
#pragma unroll
        for (int m = 0; m < S::kExpertTiles; ++m) {
#pragma unroll
          for (int n = 0; n < S::kTokenTiles; ++n) {
            mma(even[m][n], weights[m][2 * i], tokens[n][i][0], tokens[n][i][1]);
            mma(odd[m][n], weights[m][2 * i + 1], tokens[n][i][2], tokens[n][i][3]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < S::kExpertTiles; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = n * 8 + i % 2, expert = m * 16 + i / 2 * 8;
          const uint32_t at = store_at + token * S::kSumBytes + expert * 4;
          store_shared(at, even[m][n][i] + odd[m][n][i]);
        }
      }
    }
    __syncthreads();  // all sums are stored, and this warp has read its stage
    if (leader && pass + S::kStages < passes) {
      copy_tokens(pass + S::kStages);
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int token = thread_token + i * kTokensAtOnce;
      if (token < S::kTokens && pass * S::kTokens + token < num_tokens) {
        float4 sums[S::kWarps];
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) {
          sums[w] = load_shared(sums_at + (w * S::kTokens + i * kTokensAtOnce) * S::kSumBytes);
        }
        const uint32_t slot = pass * (S::kTokens / kRanks) * (S::kQuads * 16);
        push(push_at[i] + slot, push_to[i], tree_sum(sums));
      }
    }
    if (pass + 1 < passes) {
      __syncthreads();  // the sums are read
    }
  }

#pragma unroll 1
  for (int i = 0; owned_token + i * kTokensAtOnce * kRanks < num_tokens; ++i) {
    barrier_wait_cluster(push_barrier);
    float4 sums[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      sums[r] = load_shared(pushed_at + (r * slots * S::kQuads + i * S::kThreads) * 16);
    }
    const size_t token = static_cast<size_t>(i) * kTokensAtOnce * kRanks;
    *reinterpret_cast<float4*>(logits_at + token * S::kNumExperts) = tree_sum(sums);
  }
}

// ---- Host ------------------------------------------------------------------------------------

// A row-major [rows, columns] bf16 matrix as [columns / kBlock][rows][kBlock].
inline CUresult make_map(
    CUtensorMap* map, const void* address, int rows, int columns, int box_rows, int box_blocks) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (encode == nullptr) {
    return CUDA_ERROR_NOT_FOUND;
  }
  const cuuint64_t sizes[] = {
      kBlock, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / kBlock)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2, kBlockBytes};
  const cuuint32_t box[] = {
      kBlock, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_blocks)};
  const cuuint32_t steps[] = {1, 1, 1};
  return encode(
      map,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3,
      const_cast<void*>(address),
      sizes,
      strides,
      box,
      steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <typename S>
cudaError_t launch(
    const void* hidden_states,
    const void* weight,
    float* logits,
    int num_tokens,
    bool pdl,
    cudaStream_t stream) {
  CUtensorMap tokens, weights;
  if (make_map(&tokens, hidden_states, num_tokens, S::kHiddenSize, S::kTokens, S::kBlocks) ||
      make_map(&weights, weight, S::kNumExperts, S::kHiddenSize, S::kExperts, 1)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = cluster_router_gemm_kernel<S>;
  const int shared_bytes = S::shared_bytes(num_tokens);
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
    return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = pdl;
  cudaLaunchConfig_t config = {};
  config.gridDim = S::kNumExperts / S::kExperts * kRanks;
  config.blockDim = S::kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, logits, num_tokens, tokens, weights);
}

}  // namespace router_gemm
