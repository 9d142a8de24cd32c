// Router GEMM of MoE models: logits[M, N] = hidden_states[M, K] @ weight[N, K].T (+ bias[N]),
// hidden_states in bf16, the weight in bf16 or fp32, the sum in fp32, rounded once where the logits
// are bf16. docs/kernel.md draws who holds what and counts the bytes.
//
// A cluster of 8 CTAs computes kExperts experts; each CTA holds one eighth of K, and each of its
// warps one chunk of that, loaded from global memory straight into the registers of mma.m16n8k16.
// The sums go over the warps in shared memory, then over the cluster: a token belongs to one CTA,
// the others push theirs to it with st.async, and its mbarrier counts the bytes, so no cluster
// barrier closes.
//
// The floor of DeepSeek-V3's on an H100: 3.67 MB of weights at 3.0 TB/s, 1.22 µs, and 0.80 µs for
// an empty kernel in the same place, part of which they overlap. So the order of the loads counts
// most; then what is left to do once they are there: no trip through shared memory, no more
// products than M needs.
//
// Every sum has one order, whatever M is: a row's bits do not depend on the batch it came in.
// PDL: global memory is read only after griddepcontrol.wait, so whatever an earlier kernel wrote,
// tokens or weights, is seen.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace router_gemm {

constexpr int kRanks = 8;  // CTAs of a cluster, the most that is portable

// ---- PTX -------------------------------------------------------------------------------------

// Relaxed, not weak: ptxas keeps the order in which they are written, and L1, where an older copy
// of a line may lie, is passed by.
__device__ __forceinline__ void load_global(uint4& value, const __nv_bfloat16* from) {
  asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
}

__device__ __forceinline__ void load_global(uint2& value, const __nv_bfloat16* from) {
  asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(from)
               : "memory");
}

// 16 bytes of what is read once: L2 may evict it first, and fetches kBytes from memory at once.
template <int kBytes>
__device__ __forceinline__ uint4 load_once(const void* from, uint64_t evict_first) {
  static_assert(kBytes == 128 || kBytes == 256, "what L2 can be told to fetch");
  uint4 value;
  if constexpr (kBytes == 256) {
    asm volatile(
        "ld.relaxed.gpu.global.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 "
        "{%0,%1,%2,%3}, [%4], %5;"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(from), "l"(evict_first)
        : "memory");
  } else {
    asm volatile(
        "ld.relaxed.gpu.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 "
        "{%0,%1,%2,%3}, [%4], %5;"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(from), "l"(evict_first)
        : "memory");
  }
  return value;
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The clock is 64 bits wide: without the cast the difference would not wrap where `start` does.
__device__ __forceinline__ void spin(unsigned cycles) {
  const unsigned start = clock();
  while (static_cast<unsigned>(clock()) - start < cycles) {
  }
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

__device__ __forceinline__ void store_shared(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
}

// Not volatile, unlike the rest: the compiler may interleave independent sums.
__device__ __forceinline__ void mma(
    float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The first four chains are the sums of the high terms, the others of what fp32 weights have below
// them. That is not a number where an infinity meets a zero there.
template <int kChains>
__device__ __forceinline__ float sum_of(const float (&chains)[kChains][4], int i) {
  const float sum = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
  if constexpr (kChains == 4) {
    return sum;
  } else {
    return fabsf(sum) < INFINITY ? sum + (chains[4][i] + chains[5][i]) : sum;
  }
}

// ---- fp32 weights ----------------------------------------------------------------------------

// Two pairs of bf16: what a lane holds of a row of a k16 step.
using Pairs = uint2;

__device__ __forceinline__ uint32_t high_halves(float first, float second) {
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
}

// What is left of a float without its high half, exactly.
__device__ __forceinline__ float below(float value) {
  return value - __uint_as_float(__float_as_uint(value) & 0xffff0000u);
}

// Four fp32 as the sum of three bf16 each, of 8 bits of the mantissa.
__device__ __forceinline__ void split(const uint4& loaded, Pairs (&terms)[3]) {
  float values[4] = {
      __uint_as_float(loaded.x),
      __uint_as_float(loaded.y),
      __uint_as_float(loaded.z),
      __uint_as_float(loaded.w)};
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    terms[term].x = high_halves(values[0], values[1]);
    terms[term].y = high_halves(values[2], values[3]);
    if (term < 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = below(values[i]);
      }
    }
  }
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

// ---- Logits ----------------------------------------------------------------------------------

// Adds four bf16.
__device__ __forceinline__ void add(float4& sum, const uint2& bias) {
  sum.x += __uint_as_float(bias.x << 16);
  sum.y += __uint_as_float(bias.x & 0xffff0000u);
  sum.z += __uint_as_float(bias.y << 16);
  sum.w += __uint_as_float(bias.y & 0xffff0000u);
}

__device__ __forceinline__ void store(float* logits, const float4& sum) {
  *reinterpret_cast<float4*>(logits) = sum;
}

__device__ __forceinline__ void store(__nv_bfloat16* logits, const float4& sum) {
  __nv_bfloat162 pairs[2] = {
      __floats2bfloat162_rn(sum.x, sum.y), __floats2bfloat162_rn(sum.z, sum.w)};
  *reinterpret_cast<uint2*>(logits) = *reinterpret_cast<uint2*>(pairs);
}

// ---- Shapes ----------------------------------------------------------------------------------

// kNumExperts is N, kHiddenSize is K. kExperts are computed by one cluster, kTokens in one pass.
template <
    typename Weight_,
    int kNumExperts_,
    int kHiddenSize_,
    int kExperts_,
    int kTokens_,
    bool kManyPasses_,
    typename Logits_ = float,
    bool kBias_ = false>
struct Shape {
  using Weight = Weight_;  // __nv_bfloat16 or float
  using Logits = Logits_;  // likewise
  static constexpr bool kBias = kBias_;  // bf16
  static constexpr int kNumExperts = kNumExperts_, kHiddenSize = kHiddenSize_;
  static constexpr int kExperts = kExperts_, kTokens = kTokens_;
  static constexpr bool kManyPasses = kManyPasses_;
  static_assert(kExperts % 16 == 0 && kNumExperts % kExperts == 0, "experts are m16 or two n8");
  static_assert(kTokens == 8 || kTokens == 16, "tokens are the mma's n8 or m16");
  static_assert(kHiddenSize % 64 == 0, "K must be a multiple of 64");

  static constexpr bool kWide = sizeof(Weight) == 4;
  static constexpr int kChunk = kWide || kHiddenSize % 1024 ? 64 : 128;  // K of a warp
  static constexpr int kChunks = kHiddenSize / kChunk;
  static constexpr int kWarps = (kChunks + kRanks - 1) / kRanks, kThreads = 32 * kWarps;
  static_assert(kThreads <= 1024, "K must be at most 8 * 32 chunks");
  static constexpr int kSlice = kWarps * kChunk;          // K of a CTA
  static constexpr bool kUneven = kChunks % kRanks != 0;  // the last warps have no chunk
  static constexpr int kEach = 16 / sizeof(Weight);    // elements of a lane's load, of four lanes'
  static constexpr int kLoads = kChunk / (4 * kEach);  // a lane's of a row of the chunk
  static constexpr int kSteps = kChunk / 16;           // of k16
  static constexpr int kTerms = kWide ? 3 : 1;         // bf16 of a weight
  static constexpr int kRun = kTokens == 16 ? 2 : kLoads < 4 ? kLoads : 4;  // one after another
  static constexpr int kExpertTiles = kExperts / 8, kTokenTiles = kTokens / 8;  // of 8 rows
  static constexpr int kQuads = kExperts / 4;  // threads that sum up a token, four experts each

  // Shared memory, in bytes. The padding puts the stores of a warp into different banks.
  static constexpr int kSumBytes = 4 * (kExperts + (kTokens == 8 ? 4 : 8));
  static constexpr int kSumsOfPass = kWarps * kTokens * kSumBytes;  // [warp][token]
  static constexpr int kBarrier = 0, kSums = 16;                    // [pass % 2]
  static constexpr int kPushed = kSums + (kManyPasses ? 2 : 1) * kSumsOfPass;  // [slot][rank]
  static constexpr int kSlot = kRanks * kExperts * 4;  // pushed for one token

  static constexpr int shared_bytes(int num_tokens) {
    return kPushed + (num_tokens + kRanks - 1) / kRanks * kSlot;
  }
};

// ---- Kernel ----------------------------------------------------------------------------------

// What a lane holds of its warp's chunk of K: of each tile of 8 rows the row lane / 4, and of the
// elements of four lanes' loads the kEach from lane % 4 * kEach. To an mma, these are the places
// 2t, 2t + 1 and 2t + 8, 2t + 9 of a k16 step, twice where they are bf16. Both operands permute K
// alike, so the sum is the same.
template <typename S>
using Weights = uint4[S::kExpertTiles][S::kLoads];
template <typename S>
using TokenLoad = std::conditional_t<S::kWide, uint2, uint4>;
template <typename S>
using Tokens = TokenLoad<S>[S::kTokenTiles][S::kLoads];
template <typename S>
using Terms = Pairs[S::kExpertTiles][S::kSteps][S::kTerms];

template <typename S>
__device__ __forceinline__ void take_terms(const Weights<S>& weights, Terms<S>& terms) {
#pragma unroll
  for (int tile = 0; tile < S::kExpertTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < S::kLoads; ++i) {
      const uint4& loaded = weights[tile][i];
      if constexpr (S::kWide) {
        split(loaded, terms[tile][i]);
      } else {
        terms[tile][2 * i][0] = make_uint2(loaded.x, loaded.y);
        terms[tile][2 * i + 1][0] = make_uint2(loaded.z, loaded.w);
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ Pairs token_pairs(const Tokens<S>& tokens, int tile, int step) {
  if constexpr (S::kWide) {
    return tokens[tile][step];
  } else {
    const uint4& loaded = tokens[tile][step / 2];
    return step % 2 ? make_uint2(loaded.z, loaded.w) : make_uint2(loaded.x, loaded.y);
  }
}

// Multiplies a warp's chunk and stores the sums, [token][expert], at `sums` of shared memory. The
// tokens are B where 8 are enough, which halves the work, and A where there are 16. A dot product
// is the same either way, to the bit. Four chains of sums, for a quarter of the latency, and two
// for the lower terms. A warp without a chunk has sums of zero.
template <typename S>
__device__ __forceinline__ void multiply(
    const Terms<S>& weights, const Tokens<S>& tokens, bool has_chunk, uint32_t sums) {
  constexpr int kChains = S::kTerms == 1 ? 4 : 6;
  const unsigned lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;
  const auto chain_of = [](int step, int term) {
    const int half = step * 2 / S::kSteps;
    return term == 0 ? half * 2 + step % 2 : 4 + half;
  };
  if constexpr (S::kTokens == 8) {
#pragma unroll
    for (int m = 0; m < S::kExpertTiles / 2; ++m) {
      float chains[kChains][4] = {};
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        const Pairs b = token_pairs<S>(tokens, 0, step);
#pragma unroll
        for (int term = S::kTerms - 1; term >= 0; --term) {
          const Pairs &low = weights[2 * m][step][term], &high = weights[2 * m + 1][step][term];
          mma(chains[chain_of(step, term)], low.x, high.x, low.y, high.y, b.x, b.y);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned token = pair + i % 2, expert = m * 16 + i / 2 * 8 + row;
        store_shared(
            sums + token * S::kSumBytes + expert * 4, has_chunk ? sum_of(chains, i) : 0.0f);
      }
    }
  } else {
    float chains[S::kExpertTiles][kChains][4] = {};
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const Pairs low = token_pairs<S>(tokens, 0, step), high = token_pairs<S>(tokens, 1, step);
#pragma unroll
      for (int n = 0; n < S::kExpertTiles; ++n) {
#pragma unroll
        for (int term = S::kTerms - 1; term >= 0; --term) {
          const Pairs& b = weights[n][step][term];
          mma(chains[n][chain_of(step, term)], low.x, high.x, low.y, high.y, b.x, b.y);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < S::kExpertTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const unsigned token = i / 2 * 8 + row, expert = n * 8 + pair;
        store_shared(
            sums + token * S::kSumBytes + expert * 4,
            has_chunk ? sum_of(chains[n], i) : 0.0f,
            has_chunk ? sum_of(chains[n], i + 1) : 0.0f);
      }
    }
  }
}

template <typename S>
__global__ void __cluster_dims__(kRanks, 1, 1) __launch_bounds__(S::kThreads, 1)
    cluster_router_gemm_kernel(
        const typename S::Weight* __restrict__ weight,
        const __nv_bfloat16* __restrict__ hidden_states,
        typename S::Logits* __restrict__ logits,
        unsigned num_tokens,
        const __nv_bfloat16* __restrict__ bias) {
  extern __shared__ __align__(16) uint8_t shared[];
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = lane / 4;
  const unsigned rank = blockIdx.x % kRanks;
  const unsigned first_expert = blockIdx.x / kRanks * S::kExperts;
  const unsigned chunk_at = rank * S::kSlice + warp * S::kChunk;
  const bool has_chunk = !S::kUneven || chunk_at < S::kHiddenSize;  // else it reads the first one
  const unsigned column = (has_chunk ? chunk_at : 0) + lane % 4 * S::kEach;
  const typename S::Weight* weight_at = weight + ((first_expert + row) * S::kHiddenSize + column);

  Weights<S> weights;
  Tokens<S> tokens;
  const uint64_t evict_first = evict_first_policy();
  constexpr int kWeightLoads = S::kExpertTiles * S::kLoads;
  const auto load_weights = [&](int from, int to) {
#pragma unroll
    for (int j = from; j < to; ++j) {
      const int tile = j / S::kRun % S::kExpertTiles;
      const int i = j / (S::kRun * S::kExpertTiles) * S::kRun + j % S::kRun;
      weights[tile][i] = load_once<S::kRun * 64>(
          weight_at + (tile * 8 * S::kHiddenSize + i * 4 * S::kEach), evict_first);
    }
  };
  const auto load_tokens = [&](unsigned pass) {
#pragma unroll
    for (int tile = 0; tile < S::kTokenTiles; ++tile) {
      // Past M the last row is loaded again; its sums are not stored.
      const unsigned token = min(pass * S::kTokens + tile * 8 + row, num_tokens - 1);
      const __nv_bfloat16* token_at = hidden_states + (token * S::kHiddenSize + column);
#pragma unroll
      for (int i = 0; i < S::kLoads; ++i) {
        load_global(tokens[tile][i], token_at + i * 4 * S::kEach);
      }
    }
  };

  asm volatile("griddepcontrol.wait;" ::: "memory");
  // Half of the weights, which come from memory, then the tokens, which come from L2: behind all of
  // the weights they would wait for the load unit.
  load_weights(0, kWeightLoads / 2);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const unsigned owned = (num_tokens + kRanks - 1 - rank) / kRanks;  // tokens of this CTA
  if (thread == 0) {
    barrier_init(base + S::kBarrier);
  }
  __syncwarp();
  // A push needs the barrier of its target. All have arrived long before the wait for it, below.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  // The next kernel may be scheduled from here on; it waits for the end of this one by itself.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  load_tokens(0);
  // Every warp's tokens before any warp's other half, which can wait: memory is busy as it is.
  // Without it 2.30 us for 2.16 at M = 1, N = 256, K = 7168 (H200). 48 to 192 cycles are alike.
  spin(64);
  load_weights(kWeightLoads / 2, kWeightLoads);

  const unsigned quad = thread % S::kQuads, thread_token = thread / S::kQuads;
  constexpr unsigned kTokensAtOnce = S::kThreads / S::kQuads;
  constexpr unsigned kRounds = (S::kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  const uint32_t store_at = base + S::kSums + warp * S::kTokens * S::kSumBytes;
  const uint32_t sums_at = base + S::kSums + thread_token * S::kSumBytes + quad * 16;
  const uint32_t pushed = base + S::kPushed + quad * 16;

  Tokens<S> current;
  const auto take_tokens = [&](unsigned zero) {
#pragma unroll
    for (int tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < S::kLoads; ++i) {
        const TokenLoad<S>& loaded = tokens[tile][i];
        current[tile][i] = loaded;
        current[tile][i].x ^= zero, current[tile][i].y ^= zero;
        if constexpr (!S::kWide) {
          current[tile][i].z ^= zero, current[tile][i].w ^= zero;
        }
      }
    }
  };
  const auto push_sums = [&](unsigned pass) {
#pragma unroll
    for (unsigned i = 0; i < kRounds; ++i) {
      const unsigned token_of_pass = thread_token + i * kTokensAtOnce;
      const unsigned token = pass * S::kTokens + token_of_pass;
      if (token_of_pass < S::kTokens && token < num_tokens) {
        float4 sums[S::kWarps];
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) {
          const unsigned at = (w * S::kTokens + i * kTokensAtOnce) * S::kSumBytes;
          sums[w] = load_shared(sums_at + pass % 2 * S::kSumsOfPass + at);
        }
        const unsigned owner = token % kRanks;
        const uint32_t to = pushed + token / kRanks * S::kSlot + rank * (S::kExperts * 4);
        push(in_rank(to, owner), in_rank(base + S::kBarrier, owner), tree_sum(sums));
      }
    }
  };

  // As A, tokens from two loads share four registers, so they must be moved. ptxas would do that
  // between one mma and the next; as arithmetic with a zero it does not know, ahead of them all.
  take_tokens(S::kTokens == 16 ? num_tokens >> 31 : 0);
  if constexpr (S::kManyPasses) {
    load_tokens(1);
  }
  Terms<S> terms;
  take_terms<S>(weights, terms);
  multiply<S>(terms, current, has_chunk, store_at);
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  push_sums(0);
  // Not the same code as the first pass: in a loop, ptxas has the first product wait for every
  // load, the other half of the weights too.
  if constexpr (S::kManyPasses) {
    const unsigned passes = (num_tokens + S::kTokens - 1) / S::kTokens;
#pragma unroll 1
    for (unsigned pass = 1; pass < passes; ++pass) {
      take_tokens(0);
      if (pass + 1 < passes) {
        load_tokens(pass + 1);
      }
      multiply<S>(terms, current, has_chunk, store_at + pass % 2 * S::kSumsOfPass);
      __syncthreads();
      push_sums(pass);
    }
  }

  uint2 bias_of_quad = {};
  if constexpr (S::kBias) {
    load_global(bias_of_quad, bias + first_expert + quad * 4);
  }
  if (thread == 0) {
    barrier_expect(base + S::kBarrier, owned * S::kSlot);
  }
#pragma unroll 1
  for (unsigned slot = thread_token; slot < owned; slot += kTokensAtOnce) {
    barrier_wait(base + S::kBarrier);
    float4 sums[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      sums[r] = load_shared(pushed + slot * S::kSlot + r * (S::kExperts * 4));
    }
    const unsigned token = slot * kRanks + rank;
    float4 sum = tree_sum(sums);
    if constexpr (S::kBias) {
      add(sum, bias_of_quad);
    }
    store(logits + (token * S::kNumExperts + first_expert + quad * 4), sum);
  }
}

// ---- Host ------------------------------------------------------------------------------------

// Once a device, before the first launch: it is a state of the kernel that all threads share, so no
// call may change it.
template <typename S>
cudaError_t allow_shared_memory(int max_num_tokens) {
  return cudaFuncSetAttribute(
      cluster_router_gemm_kernel<S>,
      cudaFuncAttributeMaxDynamicSharedMemorySize,
      S::shared_bytes(max_num_tokens));
}

template <typename S>
cudaError_t launch(
    const void* hidden_states,
    const void* weight,
    void* logits,
    int num_tokens,
    bool pdl,
    cudaStream_t stream,
    const void* bias = nullptr) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = pdl;
  cudaLaunchConfig_t config = {};
  config.gridDim = S::kNumExperts / S::kExperts * kRanks;
  config.blockDim = S::kThreads;
  config.dynamicSmemBytes = S::shared_bytes(num_tokens);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(
      &config,
      cluster_router_gemm_kernel<S>,
      static_cast<const typename S::Weight*>(weight),
      static_cast<const __nv_bfloat16*>(hidden_states),
      static_cast<typename S::Logits*>(logits),
      static_cast<unsigned>(num_tokens),
      static_cast<const __nv_bfloat16*>(bias));
}

}  // namespace router_gemm
