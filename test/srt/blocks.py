"""SGLang's real MoE blocks whose gate is a linear layer, in a process of the tests."""

from __future__ import annotations

import importlib
import inspect
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from sglang.srt.layers.moe_router.models import Gate


def config(num_experts: int, hidden_size: int) -> SimpleNamespace:
    """What these blocks read of a config.json, each under its model's names."""
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")
    counts, top_k = dict.fromkeys(experts, num_experts), dict.fromkeys(chosen, 8)
    return SimpleNamespace(
        **counts,
        **top_k,
        num_shared_experts=1,
        shared_expert_intermediate_size=0,
        model_type="qwen3_next",
        hidden_size=hidden_size,
        intermediate_size=128,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        moe_renormalize=True,
        route_norm=True,
        hidden_act="silu",
        scoring_func="sigmoid",
        use_routing_bias=True,
        routed_scaling_factor=1.0,
        num_expert_group=1,
        topk_group=1,
        use_mixed_mlp_moe=0,
        activation_situ_beta=None,
        activation_situ_linear_beta=None,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        n_group=1,
        router_bias=False,
        moe_router_scaling_factor=1.0,
        use_moe_router_bias=True,
        swiglu_limits=[0.0],
        need_fp32_gate=False,
        dtype=torch.bfloat16,
    )


class _Logits(torch.nn.Module):
    """In place of a block's top-k and experts: gives the logits, as wide as hidden_states."""

    def forward(self, hidden_states: torch.Tensor, topk_output: torch.Tensor) -> torch.Tensor:
        missing = hidden_states.shape[1] - topk_output.shape[1]
        return torch.nn.functional.pad(topk_output, (0, missing))


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """SGLang as in a server of one GPU, or of none."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device=device))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="gloo",
    )
    initialize_model_parallel()
    sizes = dict.fromkeys(("tp_size", "moe_tp_size", "moe_ep_size"), 1)
    ranks = dict.fromkeys(("tp_rank", "moe_tp_rank", "moe_ep_rank"), 0)
    with get_parallel().override(**sizes, **ranks):
        yield


def build(gate: Gate, num_experts: int, hidden_size: int, **more: Any) -> tuple[Any, Any]:
    """The block, with every hook applied, and its gate with random weights.

    In `one_rank`, on the current default device. `more` goes into the config.
    """
    assert gate.linear is not None
    block_class = _class_of(gate)
    given: dict[str, Any] = {"config": config(num_experts, hidden_size)}
    vars(given["config"]).update(more)
    if gate.module == "kimi_linear":  # its shared expert needs CUTLASS for Python on a GPU
        given["config"].num_shared_experts = None
    if "layer_id" in inspect.signature(block_class.__init__).parameters:
        given["layer_id"] = 0
    torch.set_default_dtype(torch.bfloat16)  # as SGLang's loader does around the model
    try:
        block = block_class(**given).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    linear = getattr(block, gate.linear)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    return block, linear


def call_methods(
    gate: Gate, block: Any, hidden_states: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits from each method of a block that multiplies, and those from SGLang's own."""
    assert gate.linear is not None
    block_class = _class_of(gate)
    num_experts = getattr(block, gate.linear).weight.shape[0]
    block.topk, block.experts = _Logits(), _Logits()
    for method in gate.multiplying:
        more = [None] if method == "forward_deepep" else []
        logits = getattr(block, method)(hidden_states, *more)
        own = getattr(block_class, method)(block, hidden_states, *more)
        yield logits[:, :num_experts], own[:, :num_experts]


def _class_of(gate: Gate) -> Any:
    return getattr(importlib.import_module(f"sglang.srt.models.{gate.module}"), gate.name)
