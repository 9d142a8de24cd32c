// Routing of DeepSeek-V3-class models: from the router's logits to the experts of each token, their
// weights, and the plan of the expert GEMM, in one launch. docs/route.md draws who holds what.
//
// A warp takes a token. Each lane holds N / 32 experts that lie side by side and sorts them; then
// the warp takes the best of all lanes' first ones, top_k times. Nothing but the plan needs to know
// of other tokens: the CTAs are one cluster, and each token sets its bit in the row of each of its
// experts in the shared memory of every CTA. From these rows everybody reads how many tokens an
// expert has and which of them come first, so no order of atomics decides anything.
//
// What bounds it is latency, not bytes: 1 KB a token in, 72 bytes out. So the order of the steps
// counts, and what can be done before the logits are there is done before.
//
// PDL: global memory is read only after griddepcontrol.wait, the bias too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace router_gemm {

// Whose arithmetic the weights have, to the bit.
enum class Arithmetic { kFlashInfer, kTriton };
// In which order they add up eight numbers: first those four apart (FlashInfer, newer PyTorch),
// first those side by side (Triton 3.8, older PyTorch), or four after each other (Triton 3.6).
enum class SumOrder { kFar, kNear, kFours };

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxTokens = 128, kMaxCtas = 8;  // 8 is the most that is portable
constexpr int kMaxWarps = kMaxTokens / kMaxCtas;
constexpr int kMinBlock = 16;  // tokens

// ---- Numbers ---------------------------------------------------------------------------------

// Explicitly flushed, as FlashInfer is compiled (--use_fast_math).
__device__ __forceinline__ float add_flushed(float a, float b) {
  float sum;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

// The score of a logit, which is its weight before the weights are normalised.
template <Arithmetic kArithmetic>
__device__ __forceinline__ float sigmoid(float x) {
  float score;
  if constexpr (kArithmetic == Arithmetic::kFlashInfer) {
    asm("{ .reg .f32 t;"
        "  mul.rn.ftz.f32 t, %1, 0f3F000000;"
        "  tanh.approx.f32 t, t;"
        "  fma.rn.ftz.f32 %0, t, 0f3F000000, 0f3F000000; }"
        : "=f"(score)
        : "f"(x));
  } else {
    asm("{ .reg .f32 t;"
        "  mul.f32 t, %1, 0fBFB8AA3B;"
        "  ex2.approx.f32 t, t;"
        "  add.f32 t, t, 0f3F800000;"
        "  div.full.f32 %0, 0f3F800000, t; }"
        : "=f"(score)
        : "f"(x));
  }
  return score;
}

// Unsigned integers in the order of the floats; NaN, which is positive here, is above all, and zero
// is below all.
__device__ __forceinline__ uint32_t to_key(float value) {
  const int32_t bits = __float_as_int(value);
  return static_cast<uint32_t>(bits ^ ((bits >> 31) | static_cast<int32_t>(0x80000000)));
}

__device__ __forceinline__ float from_key(uint32_t key) {
  const int32_t flipped = static_cast<int32_t>(key);
  return __int_as_float(flipped ^ (~(flipped >> 31) | static_cast<int32_t>(0x80000000)));
}

// What experts are ranked by.
template <Arithmetic kArithmetic>
__device__ __forceinline__ uint32_t rank_key(float score, float bias) {
  if constexpr (kArithmetic == Arithmetic::kFlashInfer) {
    return to_key(add_flushed(score, bias));
  } else {
    const float biased = score + bias;
    return to_key(biased == biased ? biased + 0.0f : -1e30f);  // -0 is 0
  }
}

// The sum of the first eight lanes, in each of them, in the order of whoever's bits are asked for.
__device__ __forceinline__ float sum_of_eight(float value, SumOrder order) {
  if (order == SumOrder::kFours) {  // ((0 + 1) + 2) + 3, and the other four likewise
    const unsigned first = threadIdx.x % 32 & ~3u;
    float sum = __shfl_sync(kAll, value, first);
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      sum += __shfl_sync(kAll, value, first + i);
    }
    return sum + __shfl_xor_sync(kAll, sum, 4);
  }
  const bool far = order == SumOrder::kFar;
  value += __shfl_xor_sync(kAll, value, far ? 4 : 1);
  value += __shfl_xor_sync(kAll, value, 2);
  return value + __shfl_xor_sync(kAll, value, far ? 1 : 4);
}

// The nearest float to a / b, for 0 <= a <= 1 and 2^-12 <= b <= 8. Not __fdiv_rn, whose code for
// what is not normal every warp would walk through where some lanes divide zero.
__device__ __forceinline__ float divide(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  inverse = __fmaf_rn(__fmaf_rn(-b, inverse, 1.0f), inverse, inverse);
  float quotient = a * inverse;
  quotient = __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
  return __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
}

// ---- Shapes ----------------------------------------------------------------------------------

template <
    int kNumExperts_,
    int kNumGroups_,
    int kTopGroups_,
    int kTopK_,
    int kShared_,
    bool kRenormalize_,
    Arithmetic kArithmetic_>
struct Routing {
  static constexpr int kNumExperts = kNumExperts_, kNumGroups = kNumGroups_;
  static constexpr int kTopGroups = kTopGroups_, kTopK = kTopK_, kShared = kShared_;
  static constexpr bool kRenormalize = kRenormalize_;
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  static constexpr int kColumns = kTopK + kShared;             // of the ids and weights
  static constexpr int kEach = kNumExperts / 32;               // experts of a lane
  static constexpr int kKept = kEach < kTopK ? kEach : kTopK;  // of them, that can be chosen
  static constexpr int kLanes = 32 / kNumGroups;               // of a group
  static_assert(kNumExperts % 32 == 0 && kNumExperts <= 512, "N is a multiple of 32 up to 512");
  static_assert(32 % kNumGroups == 0, "groups are a power of two up to 32");
  static_assert(kNumGroups == 1 || kEach >= 2, "a group is worth its two best");
  static_assert(1 <= kTopGroups && kTopGroups <= kNumGroups, "of the groups some are kept");
  static_assert(1 <= kTopK && kTopK <= 8, "top_k is 1 to 8");
  static_assert(
      kTopK <= kNumExperts / kNumGroups * kTopGroups, "the groups kept have top_k experts");
  static_assert(kShared == 0 || kShared == 1, "one shared expert at most");
};

struct Arguments {
  const float *logits, *bias;           // [M, N], [N]
  float* weights;                       // [M, columns]
  int32_t* ids;                         // [M, columns]
  int num_tokens;
  double scale;           // of the routed experts' weights
  float shared_weight;    // of the shared expert,
  bool shared_of_sum;     // or of the sum of the others' weights
  SumOrder shared_order;  // of that sum
  SumOrder sum_order;     // of the scores
  bool pdl;
  // The plan of the expert GEMM.
  int32_t *sorted_ids, *expert_ids, *num_tokens_post_padded;
  int block_shift;  // log2 of the tokens of a block
};

// ---- A warp's token --------------------------------------------------------------------------

// A lane's experts, best first.
template <int kCount>
struct Sorted {
  uint32_t key[kCount];
  uint32_t at[kCount];  // which of the lane's it is
};

// Batcher's odd-even merge sort, from one of its steps on; of equal keys the one that came first
// stays first.
template <int kCount, int kRun = 1, int kApart = 1>
__device__ __forceinline__ void sort(Sorted<kCount>& all) {
#pragma unroll
  for (int a = kApart % kRun; a + kApart < kCount; ++a) {
    const int b = a + kApart;
    if ((a - kApart % kRun) % (2 * kApart) < kApart && a / (2 * kRun) == b / (2 * kRun)) {
      const uint32_t key = all.key[a], at = all.at[a];
      const bool swap = all.key[b] > key | (all.key[b] == key & all.at[b] < at);  // no branches
      all.key[a] = swap ? all.key[b] : key;
      all.at[a] = swap ? all.at[b] : at;
      all.key[b] = swap ? key : all.key[b];
      all.at[b] = swap ? at : all.at[b];
    }
  }
  if constexpr (kApart > 1) {
    sort<kCount, kRun, kApart / 2>(all);
  } else if constexpr (2 * kRun < kCount) {
    sort<kCount, 2 * kRun, 2 * kRun>(all);
  }
}

template <typename R>
__device__ __forceinline__ void load_row(const float* row, float (&values)[R::kEach]) {
  const unsigned lane = threadIdx.x % 32;
  if constexpr (R::kEach % 4 == 0) {
#pragma unroll
    for (int i = 0; i < R::kEach / 4; ++i) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(row) + lane * (R::kEach / 4) + i);
      values[4 * i] = four.x, values[4 * i + 1] = four.y;
      values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < R::kEach; ++i) {
      values[i] = __ldcg(row + lane * R::kEach + i);
    }
  }
}

// Takes the keys of the groups that are not among the best. Each lane of a group compares it with
// some of the groups, and a ballot adds that up.
template <typename R>
__device__ __forceinline__ void drop_groups(Sorted<R::kEach>& mine) {
  const unsigned lane = threadIdx.x % 32, group = lane / R::kLanes, first = group * R::kLanes;
  uint32_t best = mine.key[0], second = mine.key[1];
#pragma unroll
  for (int step = 1; step < R::kLanes; step *= 2) {
    const uint32_t other_best = __shfl_xor_sync(kAll, best, step);
    const uint32_t other_second = __shfl_xor_sync(kAll, second, step);
    second = max(min(best, other_best), max(second, other_second));
    best = max(best, other_best);
  }
  const uint32_t worth = to_key(add_flushed(from_key(best), from_key(second)));
  constexpr unsigned kOfGroup = R::kLanes == 32 ? kAll : (1u << R::kLanes) - 1;
  int better = 0;
#pragma unroll
  for (int from = 0; from < R::kNumGroups; from += R::kLanes) {
    const unsigned other = from + lane % R::kLanes;
    const uint32_t theirs = __shfl_sync(kAll, worth, other * R::kLanes);
    const bool beats = other < R::kNumGroups && theirs > worth - (other < group);  // of equal ones
    better += __popc(__ballot_sync(kAll, beats) >> first & kOfGroup);              // the lower
  }
  if (better >= R::kTopGroups) {
#pragma unroll
    for (int i = 0; i < R::kKept; ++i) {
      mine.key[i] = 0;
    }
  }
}

// Takes the best of all lanes' first ones, top_k times. With kTies the lowest id of equal ones;
// without, which is faster, it says whether there were any.
template <typename R, bool kTies>
__device__ __forceinline__ unsigned pick(Sorted<R::kEach> mine, int* picks) {
  const unsigned lane = threadIdx.x % 32, below = (1u << lane) - 1;
  unsigned ties = 0;
#pragma unroll
  for (int rank = 0; rank < R::kTopK; ++rank) {
    const uint32_t best = __reduce_max_sync(kAll, mine.key[0]);
    const unsigned holders = __ballot_sync(kAll, mine.key[0] == best);
    ties |= holders & (holders - 1);
    const bool holds = mine.key[0] == best, lowest = holds && (holders & below) == 0;
    if (lowest) {
      picks[rank] = lane * R::kEach + mine.at[0];
    }
    if (kTies ? lowest : holds) {
#pragma unroll
      for (int i = 0; i + 1 < R::kKept; ++i) {
        mine.key[i] = mine.key[i + 1];
        mine.at[i] = mine.at[i + 1];
      }
      mine.key[R::kKept - 1] = 0;
    }
  }
  __syncwarp();
  return ties;
}

// A token's expert of rank `lane`, in lanes below top_k, and the shared one in the next.
struct Chosen {
  int id;
  float weight;
};

// `scores` has room for N floats, `picks` for eight integers; both are this warp's own.
template <typename R>
__device__ __forceinline__ Chosen choose(
    const Arguments& args, int token, float* scores, int* picks) {
  const unsigned lane = threadIdx.x % 32;
  float logits[R::kEach], bias[R::kEach];
  load_row<R>(args.logits + token * R::kNumExperts, logits);
  load_row<R>(args.bias, bias);
  Sorted<R::kEach> mine;
#pragma unroll
  for (int i = 0; i < R::kEach; ++i) {
    const float score = sigmoid<R::kArithmetic>(logits[i]);
    scores[i * 32 + lane] = score;
    mine.key[i] = rank_key<R::kArithmetic>(score, bias[i]);
    mine.at[i] = i;
  }
  sort(mine);
  if constexpr (R::kNumGroups > 1) {
    drop_groups<R>(mine);
  }
  if (pick<R, false>(mine, picks)) {
    pick<R, true>(mine, picks);
  }
  const bool routed = lane < R::kTopK;
  const int id = picks[routed ? lane : 0];
  float weight = scores[id % R::kEach * 32 + id / R::kEach];
  constexpr bool kFlashInfer = R::kArithmetic == Arithmetic::kFlashInfer;
  float sum = sum_of_eight(routed ? weight : 0.0f, kFlashInfer ? SumOrder::kFar : args.sum_order);
  sum = routed ? sum : 1.0f;  // the other lanes go the same way
  if constexpr (kFlashInfer) {
    // Where 1e-20 is lost in the sum and the scale is 1, one division gives the same bits.
    if (args.scale == 1.0 && sum >= 0x1p-12f) {
      weight = divide(weight, sum);
    } else {
      const double scaled = static_cast<double>(weight) * args.scale;
      weight = static_cast<float>(scaled / (static_cast<double>(sum) + 1e-20));
    }
  } else {
    if constexpr (R::kRenormalize) {
      sum = sum > 0.0f ? sum : 1.0f;
      asm("div.full.f32 %0, %0, %1;" : "+f"(weight) : "f"(sum));
    }
    if (args.scale != 1.0) {
      weight *= static_cast<float>(args.scale);
    }
  }
  if constexpr (R::kShared == 1) {
    float shared = args.shared_weight;
    if (args.shared_of_sum) {
      const float sum_of_weights = sum_of_eight(routed ? weight : 0.0f, args.shared_order);
      shared *= __shfl_sync(kAll, sum_of_weights, 0);
    }
    weight = routed ? weight : shared;
  }
  return {routed ? id : R::kNumExperts, weight};
}

template <typename R>
__device__ __forceinline__ void store(const Arguments& args, int token, const Chosen& chosen) {
  const unsigned lane = threadIdx.x % 32;
  if (lane < R::kColumns) {
    args.ids[token * R::kColumns + lane] = chosen.id;
    args.weights[token * R::kColumns + lane] = chosen.weight;
  }
}

// ---- Kernels ---------------------------------------------------------------------------------

// Brings the bias near without reading it: an earlier kernel may still be writing to it.
template <typename R>
__device__ __forceinline__ void prefetch_bias(const float* bias) {
  if (threadIdx.x < R::kNumExperts / 32) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bias + threadIdx.x * 32));
  }
}

constexpr int kTokensOfCta = 4;

// Ids and weights alone: every token by itself.
template <typename R>
__global__ void __launch_bounds__(32 * kTokensOfCta) route_kernel(const Arguments args) {
  __shared__ float scores[kTokensOfCta][R::kNumExperts];
  __shared__ int picks[kTokensOfCta][8];
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0);  // the same in all lanes: ptxas sees it
  const int token = blockIdx.x * kTokensOfCta + warp;
  prefetch_bias<R>(args.bias);
  // Whatever starts now must wait before it stores, too: the gate may still be running.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (token >= args.num_tokens) {
    return;
  }
  store<R>(args, token, choose<R>(args, token, scores[warp], picks[warp]));
}

// Sets a token's bit in another CTA and counts the four bytes on its barrier.
__device__ __forceinline__ void push_bit(uint32_t to, uint32_t barrier, uint32_t bit) {
  asm volatile(
      "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.or.b32 "
      "[%0], %1, [%2];" ::"r"(to),
      "r"(bit),
      "r"(barrier)
      : "memory");
}

// The same, and the plan, for up to kTokens tokens. The grid is one cluster, and token t belongs to
// its CTA t % ctas.
template <typename R, int kTokens>
__global__ void __launch_bounds__(32 * (kTokens < kMaxWarps ? kTokens : kMaxWarps))
    route_and_align_kernel(const Arguments args) {
  constexpr int kWarps = kTokens < kMaxWarps ? kTokens : kMaxWarps;
  constexpr int kWords = (kTokens + 31) / 32;
  // An expert has at most kTokens / kMinBlock blocks: so many bits a count of them has.
  constexpr int kBits = kTokens <= 16 ? 1 : kTokens <= 32 ? 2 : kTokens <= 64 ? 3 : 4;
  static_assert(kTokens / kMinBlock < 1 << kBits, "a count of blocks fits");
  __shared__ float scores[kWarps][R::kNumExperts];
  __shared__ int picks[kWarps][8];
  __shared__ uint32_t tokens_of[kWords][R::kNumExperts];  // a bit a token
  __shared__ __align__(8) uint64_t barrier;
  const unsigned lane = threadIdx.x % 32, ctas = gridDim.x;
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0);
  const int token = warp * ctas + blockIdx.x, word = token / 32;
  const uint32_t bit = 1u << (token % 32);
  const auto shared_address = [](const void* of) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(of));
  };

  prefetch_bias<R>(args.bias);
  for (int i = threadIdx.x; i < kWords * R::kNumExperts; i += blockDim.x) {
    (&tokens_of[0][0])[i] = 0;
  }
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&barrier));
    barrier_expect(shared_address(&barrier), args.num_tokens * R::kTopK * 4);
  }
  __syncwarp();
  // Nobody may push before the rows are zero and the barrier is there.
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  // Whatever starts now must wait before it stores, too: the gate may still be running.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (token >= args.num_tokens) {
    return;  // another warp of this CTA has a token, and stays until all pushes have come
  }

  const Chosen chosen = choose<R>(args, token, scores[warp], picks[warp]);
  if (ctas == 1) {
    if (lane < R::kTopK) {
      atomicOr(&tokens_of[word][chosen.id], bit);
    }
    store<R>(args, token, chosen);
    __syncthreads();  // all warps are here: a single CTA has as many as there are tokens
  } else {
    // Eight lanes for each CTA.
    const uint32_t row = shared_address(&tokens_of[word][__shfl_sync(kAll, chosen.id, lane % 8)]);
#pragma unroll
    for (unsigned four = 0; four < kMaxCtas; four += 4) {
      const unsigned to = four + lane / 8;
      if (to < ctas && lane % 8 < R::kTopK) {
        push_bit(in_rank(row, to), in_rank(shared_address(&barrier), to), bit);
      }
    }
    store<R>(args, token, chosen);
    barrier_wait(shared_address(&barrier));
  }

  // Lane r asks for the expert of rank r: its tokens, this token's place among them, and its first
  // block, which comes behind all blocks of the experts before. The shared expert comes last.
  const int size = 1 << args.block_shift;
  const auto blocks_for = [&](int tokens) { return (tokens + size - 1) >> args.block_shift; };
  int total = 0, first = 0;
#pragma unroll
  for (int chunk = 0; chunk < R::kNumExperts / 32; ++chunk) {
    int tokens = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      tokens += __popc(tokens_of[w][chunk * 32 + lane]);
    }
    const int blocks = blocks_for(tokens);
    int before = total;
#pragma unroll
    for (int b = 0; b < kBits; ++b) {
      const unsigned plane = __ballot_sync(kAll, blocks >> b & 1);
      before += __popc(plane & ((1u << chosen.id % 32) - 1)) << b;
      total += __popc(plane) << b;
    }
    first = chunk == chosen.id / 32 ? before : first;
  }
  const bool routed = lane < R::kTopK, member = lane < R::kColumns;
  int count = 0, place = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t tokens = tokens_of[w][routed ? chosen.id : 0];
    count += __popc(tokens);
    place += __popc(w < word ? tokens : w == word ? tokens & (bit - 1) : 0);
  }
  count = routed ? count : args.num_tokens;
  place = routed ? place : token;
  first = routed ? first : total;
  if (member) {
    args.sorted_ids[first * size + place] = token * R::kColumns + lane;
  }
  // An expert's first token writes what belongs to all of them: whose blocks these are, and what
  // stands for no token in the last one.
  const bool leads = member && place == 0;
  const int blocks = blocks_for(count), most = blocks_for(args.num_tokens);
#pragma unroll 1
  for (int b = 0; b < most; ++b) {
    if (leads && b < blocks) {
      args.expert_ids[first + b] = chosen.id;
    }
  }
  // Half a warp an expert, all experts side by side.
  constexpr int kPairs = (R::kColumns + 1) / 2;
  const int end = first * size + count, pads = leads ? blocks * size - count : 0;
  const int end_and_pads = end << 8 | pads;
  int theirs[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    theirs[pair] = __shfl_sync(kAll, end_and_pads, 2 * pair + lane / 16);
  }
#pragma unroll 1
  for (int step = 0; step < size; step += 16) {
    const int i = step + static_cast<int>(lane % 16);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (i < (theirs[pair] & 0xff)) {
        args.sorted_ids[(theirs[pair] >> 8) + i] = args.num_tokens * R::kColumns;
      }
    }
  }
  if (token == 0 && lane == 0) {
    *args.num_tokens_post_padded = (total + R::kShared * most) << args.block_shift;
  }
}

// ---- Host ------------------------------------------------------------------------------------

// Loads the kernels on the current device.
template <typename R>
cudaError_t prepare_route() {
  const void* kernels[] = {
      reinterpret_cast<const void*>(route_kernel<R>),
      reinterpret_cast<const void*>(route_and_align_kernel<R, 16>),
      reinterpret_cast<const void*>(route_and_align_kernel<R, 32>),
      reinterpret_cast<const void*>(route_and_align_kernel<R, 64>),
      reinterpret_cast<const void*>(route_and_align_kernel<R, kMaxTokens>)};
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) {
      return error;
    }
  }
  return cudaSuccess;
}

// As measured on an H200: up to four tokens have a scheduler of one SM each. A CTA without a token
// would be gone when the others push to it.
inline int ctas_for(int num_tokens) {
  return num_tokens <= 4 ? 1 : num_tokens < kMaxCtas ? 4 : kMaxCtas;
}

template <typename R>
cudaError_t launch_route(const Arguments& args, bool align, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = args.pdl;
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  if (!align) {
    config.gridDim = (args.num_tokens + kTokensOfCta - 1) / kTokensOfCta;
    config.blockDim = 32 * kTokensOfCta;
    return cudaLaunchKernelEx(&config, route_kernel<R>, args);
  }
  const int ctas = ctas_for(args.num_tokens);
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = ctas;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.numAttrs = 2;
  config.gridDim = ctas;
  config.blockDim = (args.num_tokens + ctas - 1) / ctas * 32;
  const auto kernel = args.num_tokens <= 16   ? route_and_align_kernel<R, 16>
                      : args.num_tokens <= 32 ? route_and_align_kernel<R, 32>
                      : args.num_tokens <= 64 ? route_and_align_kernel<R, 64>
                                              : route_and_align_kernel<R, kMaxTokens>;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace router_gemm
