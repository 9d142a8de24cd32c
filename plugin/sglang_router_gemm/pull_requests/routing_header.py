"""The CUDA header of `--pr routing`: ids and weights of `csrc`'s kernel, of one release's bits."""

from __future__ import annotations

from pathlib import Path

from sglang_router_gemm.pull_requests.header import (
    before,
    body,
    decided,
    in_sglangs_style,
    opening_comment,
    replaced,
    without_definition,
    without_sections,
)

# The plan of the expert GEMM, which a cluster of CTAs makes.
_UNUSED = (
    "__device__ __forceinline__ void push_bit(",
    "__global__ void __launch_bounds__(32 * (kTokens < kMaxWarps",
)

# SGLang renormalises wherever the pull request takes the kernel.
_DECIDED = (("R::kRenormalize", True),)

_REPLACED = (
    # The comments.
    (
        """\
// Routing of DeepSeek-V3-class models: from the router's logits to the experts of each token, their
// weights, and the plan of the expert GEMM, in one launch. docs/route.md draws who holds what.
""",
        """\
// Routing of DeepSeek-V3-class models: from the router's logits to the experts of each token and
// their weights, the shared expert's column among them, in one launch.
""",
    ),
    (
        """\
// the warp takes the best of all lanes' first ones, top_k times. Nothing but the plan needs to know
// of other tokens: the CTAs are one cluster, and each token sets its bit in the row of each of its
// experts in the shared memory of every CTA. From these rows everybody reads how many tokens an
// expert has and which of them come first, so no order of atomics decides anything.
""",
        """\
// the warp takes the best of all lanes' first ones, top_k times. Tokens do not know of each other,
// so a token's bits do not depend on the batch it is in.
""",
    ),
    (
        "// PDL: global memory is read only after griddepcontrol.wait, the bias too.\n",
        "// PDL: global memory is read only after the wait, the bias too.\n",
    ),
    ("// Ids and weights alone: every token by itself.\n", ""),
    # One order for each arithmetic: that of Triton 3.8, and FlashInfer's.
    (
        """\
// In which order they add up eight numbers: first those four apart (FlashInfer, newer PyTorch),
// first those side by side (Triton 3.8, older PyTorch), or four after each other (Triton 3.6).
enum class SumOrder { kFar, kNear, kFours };
""",
        "",
    ),
    (
        """\
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
""",
        """\
// The sum of the first eight lanes, in each of them: FlashInfer adds first those four apart, Triton
// 3.8 first those side by side.
template <Arithmetic kArithmetic>
__device__ __forceinline__ float sum_of_eight(float value) {
  constexpr bool kFar = kArithmetic == Arithmetic::kFlashInfer;
  value += __shfl_xor_sync(kAll, value, kFar ? 4 : 1);
  value += __shfl_xor_sync(kAll, value, 2);
  return value + __shfl_xor_sync(kAll, value, kFar ? 1 : 4);
}
""",
    ),
    (
        "sum_of_eight(routed ? weight : 0.0f, kFlashInfer ? SumOrder::kFar : args.sum_order)",
        "sum_of_eight<R::kArithmetic>(routed ? weight : 0.0f)",
    ),
    (
        """\
    float shared = args.shared_weight;
    if (args.shared_of_sum) {
      const float sum_of_weights = sum_of_eight(routed ? weight : 0.0f, args.shared_order);
      shared *= __shfl_sync(kAll, sum_of_weights, 0);
    }
    weight = routed ? weight : shared;
""",
        "    weight = routed ? weight : args.shared_weight;\n",
    ),
    # The shapes.
    (
        """\
constexpr int kMaxTokens = 128, kMaxCtas = 8;  // 8 is the most that is portable
constexpr int kMaxWarps = kMaxTokens / kMaxCtas;
constexpr int kMinBlock = 16;  // tokens
""",
        "",
    ),
    (
        """\
template <
    int kNumExperts_,
    int kNumGroups_,
    int kTopGroups_,
    int kTopK_,
    int kShared_,
    bool kRenormalize_,
    Arithmetic kArithmetic_>
""",
        """\
template <int kNumExperts_, int kNumGroups_, int kTopGroups_, int kTopK_, int kShared_>
""",
    ),
    ("  static constexpr bool kRenormalize = kRenormalize_;\n", ""),
    (
        "  static constexpr Arithmetic kArithmetic = kArithmetic_;\n",
        "  static constexpr Arithmetic kArithmetic = "
        "kNumGroups > 1 ? Arithmetic::kFlashInfer : Arithmetic::kTriton;\n",
    ),
    # The arguments.
    (
        """\
  double scale;           // of the routed experts' weights
  float shared_weight;    // of the shared expert,
  bool shared_of_sum;     // or of the sum of the others' weights
  SumOrder shared_order;  // of that sum
  SumOrder sum_order;     // of the scores
  bool pdl;
  // The plan of the expert GEMM.
  int32_t *sorted_ids, *expert_ids, *num_tokens_post_padded;
  int block_shift;  // log2 of the tokens of a block
""",
        """\
  double scale;  // of the routed experts' weights
  float shared_weight;  // of the shared expert
""",
    ),
    # PDL, as SGLang's kernels have it.
    ("template <typename R>\n__global__", "template <typename R, bool kUsePDL>\n__global__"),
    ('asm volatile("griddepcontrol.wait;" ::: "memory");', "device::PDLWaitPrimary<kUsePDL>();"),
    (
        'asm volatile("griddepcontrol.launch_dependents;" ::: "memory");',
        "device::PDLTriggerSecondary<kUsePDL>();",
    ),
)


def routing_header(glue: str, csrc: Path) -> str:
    """The header, from the launcher as SGLang has them and the kernel of this tree.

    Args:
        glue: the launcher, with the lines `// @comment` and `// @kernel` for the tree's parts.
        csrc: the folder of the tree's CUDA sources.

    Raises:
        RuleError: a rule does not fit the sources.
    """
    kernel = (csrc / "cluster_route.cuh").read_text(encoding="utf-8")
    text = replaced(glue, "// @comment\n", opening_comment(kernel))
    text = replaced(text, "// @kernel\n", before(body(kernel, "router_gemm"), "Host"))
    for signature in _UNUSED:
        text = without_definition(text, signature)
    for condition, value in _DECIDED:
        text = decided(text, condition, value)
    for old, new in _REPLACED:
        text = replaced(text, old, new)
    return in_sglangs_style(without_sections(text))
