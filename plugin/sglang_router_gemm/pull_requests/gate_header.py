"""The CUDA header of `--pr gate` and `--pr fp32`: the kernel of `csrc`, with fp32 logits.

Both have the rules that cut bf16 logits and the bias. `gate` has those that cut fp32 weights, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sglang_router_gemm.pull_requests.header import (
    before,
    body,
    decided,
    in_sglangs_style,
    opening_comment,
    renamed,
    replaced,
    unrolled,
    without_definition,
    without_sections,
)
from sglang_router_gemm.pull_requests.pull_request import RuleError


class _Rules(NamedTuple):
    """What becomes of the sources, in this order."""

    unused: tuple[str, ...] = ()
    """Functions that nobody calls."""
    decided: tuple[tuple[str, bool], ...] = ()
    unrolled: tuple[str, ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


# Without bf16 logits and a bias, and with what SGLang's kernels have.
_FP32_LOGITS = _Rules(
    unused=(
        "__device__ __forceinline__ void add(",
        "__device__ __forceinline__ void store(__nv_bfloat16*",
    ),
    decided=(("S::kBias", False),),
    replaced=(
        (" (+ bias[N])", ""),
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
template <
    typename Weight_,
    int kNumExperts_,
    int kHiddenSize_,
    int kExperts_,
    int kTokens_,
    bool kManyPasses_>
""",
        ),
        (
            """\
  using Logits = Logits_;  // likewise
  static constexpr bool kBias = kBias_;  // bf16
""",
            "",
        ),
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
        (
            'asm volatile("griddepcontrol.wait;" ::: "memory");',
            "device::PDLWaitPrimary<kUsePDL>();",
        ),
        (
            'asm volatile("griddepcontrol.launch_dependents;" ::: "memory");',
            "device::PDLTriggerSecondary<kUsePDL>();",
        ),
    ),
    renamed=(("__nv_bfloat16", "bf16_t"),),
)

_BF16_WEIGHTS = _Rules(
    unused=(
        "__device__ __forceinline__ void load_global(uint2& value",
        "__device__ __forceinline__ uint32_t high_halves(",
        "__device__ __forceinline__ float below(",
        "__device__ __forceinline__ void split(",
    ),
    decided=(("kChains == 4", True), ("S::kWide", False)),
    unrolled=("for (int term = S::kTerms - 1; term >= 0; --term)",),
    replaced=(
        # The comments.
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
constexpr int kRanks = 8;  // CTAs of a cluster, the most that is portable
constexpr int kChains = 4;  // of sums, which do not wait for each other
""",
        ),
        # The shapes.
        ("    typename Weight_,\n", ""),
        ("  using Weight = Weight_;  // bf16_t or float\n", ""),
        ("  static constexpr bool kWide = sizeof(Weight) == 4;\n", ""),
        ("kWide || kHiddenSize", "kHiddenSize"),
        ("kEach = 16 / sizeof(Weight);", "kEach = 8;"),
        ("  static constexpr int kTerms = kWide ? 3 : 1;         // bf16 of a weight\n", ""),
        (
            """\
  // With fp32 weights and N above 512 not all wide tiles are resident at once. Up to M = 8 two
  // narrow ones fit an SM, beyond that not. Timed with [768, 6144] alone (docs/kernel.md).
  static constexpr int kExpertsOfFew = sizeof(Weight) == 4 && kNumExperts > 512 ? 16 : kExperts;
""",
            "",
        ),
        ("kTokens == 8 ? kExpertsOfFew : kExperts", "kExperts"),
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
        ("const typename S::Weight*", "const bf16_t*"),
    ),
    renamed=(("take_terms", "take_pairs"), ("Terms", "WeightPairs"), ("terms", "pairs")),
)

_ANY_WEIGHTS = _Rules(
    replaced=(
        (
            """\
// hidden_states in bf16, the weight in bf16 or fp32, the sum in fp32, rounded once where the logits
// are bf16. docs/kernel.md draws who holds what and counts the bytes.
""",
            """\
// hidden_states in bf16, the weight in bf16 or fp32, the sum and the logits in fp32. An fp32 weight
// is the sum of three bf16, split in registers.
""",
        ),
        ("// bf16_t or float", "// bf16_t or fp32_t"),
        (" (docs/kernel.md)", ""),
    ),
)

# The launcher of `gate` for a weight of either dtype.
_LAUNCHER = (
    (
        "#include <cstdint>\n",
        "#include <cmath>\n#include <cstdint>\n#include <type_traits>\n",
    ),
    (
        """\
// The kernel for one N and K. kUsePDL: it may start before the kernel ahead of it has ended.
template <int kNumExperts, int kHiddenSize, bool kUsePDL>
""",
        """\
// The kernel for one N and K. kUsePDL: it may start before the kernel ahead of it has ended.
template <int kNumExperts, int kHiddenSize, bool kUsePDL, typename Weight>
""",
    ),
    (
        """\
  // Writes logits [M, N] in fp32 for M up to kMaxTokens. hidden_states [M, K] and weight [N, K] are
  // bf16; all three are contiguous, 16-byte aligned and on one device.
""",
        """\
  // Writes logits [M, N] in fp32 for M up to kMaxTokens. hidden_states [M, K] is bf16, and weight
  // [N, K] a Weight; all three are contiguous, 16-byte aligned and on one device.
""",
    ),
    (
        "struct ClusterRouterGemmKernel {\n",
        """\
struct ClusterRouterGemmKernel {
  static_assert(std::is_same_v<Weight, bf16_t> || std::is_same_v<Weight, fp32_t>, "no fp16");

""",
    ),
    (".with_dtype<bf16_t>()\n", ".with_dtype<Weight>()\n"),
    (
        "static_cast<const bf16_t*>(weight.data_ptr())",
        "static_cast<const Weight*>(weight.data_ptr())",
    ),
    (
        "const bf16_t* hidden_states, const bf16_t* weight,",
        "const bf16_t* hidden_states, const Weight* weight,",
    ),
)


def gate_header(glue: str, csrc: Path) -> str:
    """The header for bf16 weights, from the launcher and the kernel of this tree.

    Args:
        glue: the launcher, with a line `// @kernel` and the like for each part of the tree's.
        csrc: the folder of the tree's CUDA sources.

    Raises:
        RuleError: a rule does not fit the sources.
    """
    return _header(glue, csrc, _BF16_WEIGHTS, "Shape<")


def fp32_header(glue: str, csrc: Path) -> str:
    """The same for bf16 and fp32 weights."""
    for old, new in _LAUNCHER:
        glue = replaced(glue, old, new)
    return _header(glue, csrc, _ANY_WEIGHTS, "Shape<Weight, ")


def _header(glue: str, csrc: Path, of_weights: _Rules, shape: str) -> str:
    ptx, kernel, module = (
        (csrc / name).read_text(encoding="utf-8")
        for name in ("ptx.cuh", "cluster_router_gemm.cuh", "cluster_router_gemm.cu")
    )
    parts = {
        "comment": opening_comment(kernel),
        "kernel": body(ptx, "router_gemm") + before(body(kernel, "router_gemm"), "Host"),
        "shapes": _shapes(module, shape),
    }
    text = glue
    for name, part in parts.items():
        text = replaced(text, f"// @{name}\n", part)
    for rules in (_FP32_LOGITS, of_weights):
        text = _applied(text, rules)
    return in_sglangs_style(without_sections(text))


def _applied(text: str, rules: _Rules) -> str:
    for signature in rules.unused:
        text = without_definition(text, signature)
    for condition, value in rules.decided:
        text = decided(text, condition, value)
    for loop in rules.unrolled:
        text = unrolled(text, loop)
    for old, new in rules.replaced:
        text = replaced(text, old, new)
    for old, new in rules.renamed:
        text = renamed(text, old, new)
    return text


def _shapes(module: str, shape: str) -> str:
    """What the module decides of the kernel: the largest M, the experts of a cluster, the tiles."""
    limit = re.search(r"^constexpr int kMaxTokens = .*\n", module, re.MULTILINE)
    choice = re.search(r"^// A wide tile .*?(?=^static_assert)", module, re.DOTALL | re.MULTILINE)
    if limit is None or choice is None:
        raise RuleError(
            "cluster_router_gemm.cu does not say kMaxTokens and the tile, must say both"
        )
    text = limit[0] + "\n" + choice[0]
    text = replaced(text, "constexpr ", "static constexpr ")
    text = replaced(text, "=\n    Shape<Weight, ", f"= router_gemm::{shape}")
    text = replaced(text, ", Logits, kBias>", ">")
    return re.sub(r"^(?=.)", "  ", text, flags=re.MULTILINE).removeprefix("  ")
