"""`csrc/cluster_route.cuh` in Python: one compiled module for each routing and SM."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sglang.srt.layers.moe_router import jit

SOURCE = Path(__file__).parent / "csrc" / "cluster_route.cu"

# The kernel's own limits; the .cuh asserts those of the routing, the .cu says the M.
MAX_NUM_TOKENS = 128
BLOCK_SIZES = (16, 32, 64, 128)


class Routing(NamedTuple):
    """How the experts of a token are chosen: what the kernel is compiled for."""

    num_experts: int
    num_groups: int
    """1: there are none."""
    top_groups: int
    """The groups whose experts may be chosen."""
    top_k: int
    """Routed experts of a token."""
    num_shared: int
    """Columns behind those, for a shared expert: 0 or 1."""
    renormalize: bool

    @property
    def num_columns(self) -> int:
        """Of ids and weights."""
        return self.top_k + self.num_shared

    @property
    def uses_triton(self) -> bool:
        """Whether SGLang's Triton router gives the bits, or FlashInfer's kernel.

        As `biased_grouped_topk_gpu` of SGLang 0.5.11 to 0.5.23 chooses between them.
        """
        return self.num_groups == 1

    def refusal(self) -> str | None:
        """Why the kernel does not take it, as a phrase; None if it does."""
        experts, groups, top_groups = self.num_experts, self.num_groups, self.top_groups
        if experts % 32 or not 32 <= experts <= 512:
            return f"N is {experts}, must be a multiple of 32 up to 512"
        if groups not in (1, 2, 4, 8, 16, 32):
            return f"there are {groups} groups, must be a power of two up to 32"
        if groups > 1 and experts < 64:
            return f"N is {experts}, must be 64 or more where there are groups"
        if not 1 <= top_groups <= groups:
            return f"{top_groups} groups are kept, must be 1 to {groups}"
        most = min(8, experts // groups * top_groups)
        if not 1 <= self.top_k <= most:
            return f"top_k is {self.top_k}, must be 1 to {most}"
        if self.num_shared not in (0, 1):
            return f"{self.num_shared} shared experts are fused, must be 0 or 1"
        if groups > 1 and not self.renormalize:
            return "the weights are not renormalised, which FlashInfer always does"
        return None


class SumOrder(IntEnum):
    """In which order eight scores are added up, as in the .cuh."""

    FAR = 0
    NEAR = 1
    FOURS = 2


class Variant(NamedTuple):
    """What differs between releases of SGLang, FlashInfer and Triton."""

    sum_order: SumOrder
    shared_order: SumOrder | None = None
    """In which order the weights are added up whose sum the shared expert's weight is a share of;
    None: it is a number."""


def variants(routing: Routing) -> list[Variant]:
    """Those that were seen, the newest first.

    FOURS: Triton 3.6, NEAR: 3.8. A share of the sum: SGLang up to 0.5.17, in the order in which
    PyTorch adds up a row (`block_x_reduce` in its Reduce.cuh), FAR today and NEAR in older ones.
    """
    orders = (SumOrder.NEAR, SumOrder.FOURS) if routing.uses_triton else (SumOrder.FAR,)
    shared = (None, SumOrder.FAR, SumOrder.NEAR) if routing.num_shared else (None,)
    return [Variant(order, each) for order in orders for each in shared]


class ExpertPlan(NamedTuple):
    """What an expert GEMM needs to know of the ids: SGLang's `moe_align_block_size` gives these."""

    sorted_token_ids: torch.Tensor
    """int32, places in the flattened ids, by expert, each expert's padded to whole blocks."""
    expert_ids: torch.Tensor
    """int32, the expert of each block."""
    num_tokens_post_padded: torch.Tensor
    """int32 `[1]`."""


def empty_plan(ids: torch.Tensor, block_size: int, num_experts: int) -> ExpertPlan:
    """Not written, of the sizes that SGLang gives them, which are the grid of its expert GEMM.

    Args:
        ids: `[M, columns]`.
        block_size: tokens of a block.
        num_experts: the shared one counts.
    """
    numel = ids.shape[0] * ids.shape[1]
    size = numel * block_size
    if numel > num_experts:
        size = -(-(numel + (num_experts + 1) * (block_size - 1)) // 4) * 4
    return ExpertPlan(ids.new_empty(size), ids.new_empty(-(-size // block_size)), ids.new_empty(1))


def is_plan_of(plan: ExpertPlan, ids: torch.Tensor, block_size: int, num_experts: int) -> bool:
    """Whether a plan is one for these ids, by PyTorch on the CPU.

    Args:
        ids: `[M, columns]`, all of them experts.
        num_experts: the shared one counts.
    """
    flat = ids.flatten().cpu().long()
    experts, places = torch.sort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    first = (blocks.cumsum(0) - blocks) * block_size
    rank = torch.arange(len(flat), device="cpu") - (counts.cumsum(0) - counts)[experts]
    total = int(blocks.sum()) * block_size
    sorted_ids = torch.full((total,), len(flat), device="cpu")
    sorted_ids[first[experts] + rank] = places
    expert_ids = torch.repeat_interleave(torch.arange(num_experts, device="cpu"), blocks)
    return (
        plan.num_tokens_post_padded.tolist() == [total]
        and torch.equal(plan.sorted_token_ids[:total].cpu().long(), sorted_ids)
        and torch.equal(plan.expert_ids[: len(expert_ids)].cpu().long(), expert_ids)
    )


class Kernel(NamedTuple):
    """A loaded module."""

    launch: Any
    routing: Routing

    def __call__(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor,
        variant: Variant,
        scale: float,
        shared_weight: float,
        pdl: bool,
        block_size: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, ExpertPlan | None]:
        """Weights and ids of each token's experts, and the plan of the expert GEMM.

        Args:
            logits: fp32 `[M, N]`; with a block size M is at most `MAX_NUM_TOKENS`.
            bias: fp32 `[N]`, added to the scores by which experts are ranked.
            variant: of the installed release.
            scale: of the routed experts' weights.
            shared_weight: of the shared expert, or its share of the sum of the others'.
            pdl: launch with programmatic dependent launch.
            block_size: tokens of a block of the plan, one of `BLOCK_SIZES`; 0: no plan.

        Returns:
            fp32 and int32, both `[M, columns]`, best expert first and the shared one last, and
            the plan, or None.

        Raises:
            ValueError: an argument is not that; it is named.
        """
        shape = logits.shape[0], self.routing.num_columns
        weights = logits.new_empty(shape, dtype=torch.float32)
        ids = logits.new_empty(shape, dtype=torch.int32)
        plan: ExpertPlan | None = None
        if block_size:
            plan = empty_plan(ids, block_size, self.routing.num_experts + self.routing.num_shared)
        self.launch(
            logits,
            bias,
            weights,
            ids,
            *(plan or (None, None, None)),
            block_size,
            scale,
            shared_weight,
            variant.shared_order,
            variant.sum_order,
            pdl,
        )
        return weights, ids, plan


def spec(routing: Routing, sm: int) -> jit.Spec:
    """What is compiled for one routing on one SM."""
    name = "_".join(str(int(value)) for value in routing)
    defines = {
        "ROUTE_NUM_EXPERTS": routing.num_experts,
        "ROUTE_NUM_GROUPS": routing.num_groups,
        "ROUTE_TOP_GROUPS": routing.top_groups,
        "ROUTE_TOP_K": routing.top_k,
        "ROUTE_NUM_SHARED": routing.num_shared,
        "ROUTE_RENORMALIZE": int(routing.renormalize),
        "ROUTE_TRITON": int(routing.uses_triton),
    }
    return jit.Spec(f"cluster_route_{name}_sm{sm}", SOURCE, sm, tuple(defines.items()))


def build(routing: Routing, sm: int) -> str:
    """Compiles the kernel into the cache, without a GPU, and returns the module's name.

    Raises:
        jit.BuildError: there is no compiler, it fails, or the cache cannot be trusted.
    """
    built = spec(routing, sm)
    jit.build(built)
    return built.name


def load(routing: Routing, device: torch.device, sm: int) -> Kernel:
    """Loads the kernel; builds it where it is not cached.

    Raises:
        jit.BuildError: as `build`.
    """
    module = jit.load(spec(routing, sm))
    module.prepare(device.index)
    return Kernel(module.route, routing)
