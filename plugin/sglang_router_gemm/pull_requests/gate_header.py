"""The CUDA header of `--pr gate`: the kernel of `csrc`, for bf16 weights and fp32 logits."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_router_gemm.pull_requests.header import (
    before,
    body,
    decided,
    opening_comment,
    renamed,
    replaced,
    unrolled,
    without_definition,
    without_sections,
)
from sglang_router_gemm.pull_requests.pull_request import RuleError

# What only fp32 weights, bf16 logits and a bias call.
_UNUSED = (
    "__device__ __forceinline__ void load_global(uint2& value",
    "__device__ __forceinline__ uint32_t high_halves(",
    "__device__ __forceinline__ float below(",
    "__device__ __forceinline__ void split(",
    "__device__ __forceinline__ void add(",
    "__device__ __forceinline__ void store(__nv_bfloat16*",
)

_DECIDED = (
    ("kChains == 4", True),
    ("S::kWide", False),
    ("S::kBias", False),
)

# With one dtype of weights and of logits, and no bias.
_REPLACED = (
    # The comments.
    (" (+ bias[N])", ""),
    (
        """\
// hidden_states in bf16, the weight in bf16 or fp32, the sum in fp32, rounded once where the logits
// are bf16. docs/kernel.md draws who holds what and counts the bytes.
""",
        """\
// hidden_states and the weight in bf16, the sum and the logits in fp32.
""",
    ),
    (
        """\
// PDL: global memory is read only after griddepcontrol.wait, so whatever an earlier kernel wrote,
// tokens or weights, is seen.
""",
        """\
// PDL: global memory is read only after the wait, so whatever an earlier kernel wrote, tokens or
// weights, is seen.
""",
    ),
    (
        """\
// The first four chains are the sums of the high terms, the others of what fp32 weights have below
// them. That is not a number where an infinity meets a zero there.
""",
        "",
    ),
    (
        """\
// elements of four lanes' loads the kEach from lane % 4 * kEach. To an mma, these are the places
// 2t, 2t + 1 and 2t + 8, 2t + 9 of a k16 step, twice where they are bf16. Both operands permute K
// alike, so the sum is the same.
""",
        """\
// elements of four lanes' loads the kEach from lane % 4 * kEach. To the mma, these are the places
// 2t, 2t + 1 and 2t + 8, 2t + 9 of two k16 steps. Both operands permute K alike, so the sum is the
// same.
""",
    ),
    (
        """\
// is the same either way, to the bit. Four chains of sums, for a quarter of the latency, and two
// for the lower terms. A warp without a chunk has sums of zero.
""",
        """\
// is the same either way, to the bit. Four chains of sums, for a quarter of the latency. A warp
// without a chunk has sums of zero.
""",
    ),
    (
        """\
constexpr int kRanks = 8;  // CTAs of a cluster, the most that is portable
""",
        """\
constexpr int kRanks = 8;   // CTAs of a cluster, the most that is portable
constexpr int kChains = 4;  // of sums, which do not wait for each other
""",
    ),
    # The shapes.
    (
        """\
template <
    typename Weight_,
    int kNumExperts_,
    int kHiddenSize_,
    int kExperts_,
    int kTokens_,
    bool kManyPasses_,
    typename Logits_ = float,
    bool kBias_ = false>
""",
        """\
template <int kNumExperts_, int kHiddenSize_, int kExperts_, int kTokens_, bool kManyPasses_>
""",
    ),
    (
        """\
  using Weight = Weight_;  // __nv_bfloat16 or float
  using Logits = Logits_;  // likewise
  static constexpr bool kBias = kBias_;  // bf16
""",
        "",
    ),
    ("  static constexpr bool kWide = sizeof(Weight) == 4;\n", ""),
    ("kWide || kHiddenSize", "kHiddenSize"),
    ("kEach = 16 / sizeof(Weight);    //", "kEach = 8;                      //"),
    ("  static constexpr int kTerms = kWide ? 3 : 1;         // bf16 of a weight\n", ""),
    # What a lane holds.
    (
        """\
template <typename S>
using TokenLoad = std::conditional_t<S::kWide, uint2, uint4>;
""",
        "",
    ),
    ("TokenLoad<S>", "uint4"),
    ("[S::kSteps][S::kTerms]", "[S::kSteps]"),
    ("i][0] = ", "i] = "),
    ("i + 1][0] = ", "i + 1] = "),
    # The products.
    ("[step][term]", "[step]"),
    ("chain_of(step, term)", "chain_of(step)"),
    (
        """\
  const auto chain_of = [](int step, int term) {
    const int half = step * 2 / S::kSteps;
    return term == 0 ? half * 2 + step % 2 : 4 + half;
  };
""",
        """\
  const auto chain_of = [](int step) { return step * 2 / S::kSteps * 2 + step % 2; };
""",
    ),
    ("  constexpr int kChains = S::kTerms == 1 ? 4 : 6;\n", ""),
    ("template <int kChains>\n", ""),
    (
        """\
  const float sum = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
  return sum;
""",
        """\
  return (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
""",
    ),
    # The arguments.
    ("const typename S::Weight*", "const __nv_bfloat16*"),
    ("typename S::Logits*", "float*"),
    (
        """\
        unsigned num_tokens,
        const __nv_bfloat16* __restrict__ bias) {
""",
        """\
        unsigned num_tokens) {
""",
    ),
    ("  uint2 bias_of_quad = {};\n", ""),
    # PDL, as SGLang's kernels have it.
    ("template <typename S>\n__global__", "template <typename S, bool kUsePDL>\n__global__"),
    ('asm volatile("griddepcontrol.wait;" ::: "memory");', "device::PDLWaitPrimary<kUsePDL>();"),
    (
        'asm volatile("griddepcontrol.launch_dependents;" ::: "memory");',
        "device::PDLTriggerSecondary<kUsePDL>();",
    ),
)

_RENAMED = (
    ("__nv_bfloat16", "bf16_t"),
    ("take_terms", "take_pairs"),
    ("Terms", "WeightPairs"),
    ("terms", "pairs"),
)


def gate_header(glue: str, csrc: Path) -> str:
    """The header, from the launcher as SGLang has them and the kernel of this tree.

    Args:
        glue: the launcher, with a line `// @kernel` and the like for each part of the tree's.
        csrc: the folder of the tree's CUDA sources.

    Raises:
        RuleError: a rule does not fit the sources.
    """
    ptx, kernel, module = (
        (csrc / name).read_text(encoding="utf-8")
        for name in ("ptx.cuh", "cluster_router_gemm.cuh", "cluster_router_gemm.cu")
    )
    parts = {
        "comment": opening_comment(kernel),
        "kernel": body(ptx, "router_gemm") + before(body(kernel, "router_gemm"), "Host"),
        "shapes": _shapes(module),
    }
    text = glue
    for name, part in parts.items():
        text = replaced(text, f"// @{name}\n", part)
    for signature in _UNUSED:
        text = without_definition(text, signature)
    for condition, value in _DECIDED:
        text = decided(text, condition, value)
    text = unrolled(text, "for (int term = S::kTerms - 1; term >= 0; --term)")
    for old, new in _REPLACED:
        text = replaced(text, old, new)
    for old, new in _RENAMED:
        text = renamed(text, old, new)
    return without_sections(text)


def _shapes(module: str) -> str:
    """What the module decides of the kernel: the largest M, the experts of a cluster, the tiles."""
    limit = re.search(r"^constexpr int kMaxTokens = .*\n", module, re.MULTILINE)
    choice = re.search(r"^// A wide tile .*?(?=^static_assert)", module, re.DOTALL | re.MULTILINE)
    if limit is None or choice is None:
        raise RuleError(
            "cluster_router_gemm.cu does not say kMaxTokens and the tile, must say both"
        )
    text = limit[0] + "\n" + choice[0]
    text = replaced(text, "constexpr ", "static constexpr ")
    text = replaced(text, "=\n    Shape<Weight, ", "= router_gemm::Shape<")
    text = replaced(text, ", Logits, kBias>", ">")
    return re.sub(r"^(?=.)", "  ", text, flags=re.MULTILINE).removeprefix("  ")
