"""SGLang's gate on a CPU, for processes of the tests."""

from __future__ import annotations

from types import SimpleNamespace

import torch

CONFIG = SimpleNamespace(n_routed_experts=256, hidden_size=7168, topk_method="noaux_tc")


def build_gate() -> torch.nn.Module:
    """A `MoEGate` at DeepSeek-V3's width, in bf16, with every plugin applied."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # In this order: a plugin may replace the class.
    from sglang.srt.models.deepseek_v2 import MoEGate
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    torch.set_default_dtype(torch.bfloat16)  # as SGLang's loader does around the model
    try:
        gate: torch.nn.Module = MoEGate(CONFIG, quant_config=None)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate
