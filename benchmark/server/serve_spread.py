"""SGLang's server, whose dummy weights send tokens to all experts, as a trained model's do.

    python3 benchmark/server/serve_spread.py --load-format dummy …      # as sglang.launch_server

SGLang draws every weight from ±1e-3, the norm's, too, so the logits of a gate are about 3e-5, and
a correction bias of ±1e-3 decides: all tokens of a batch get nearly the same experts, whose GEMM
then reads a fraction of the weights. Here the gates' weights are larger, so that the logits have a
standard deviation of 1.
"""

from __future__ import annotations

import runpy
from typing import Any

import torch

from sglang.srt.model_loader import loader

# As SGLang draws them: uniform up to this, in either direction.
LARGEST = 1e-3
GATES = (".mlp.gate.weight", ".block_sparse_moe.gate.weight")

_own_initialize = loader.initialize_dummy_weights


def initialize(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """SGLang's own, then the gates."""
    _own_initialize(model, *args, **kwargs)
    for name, parameter in model.named_parameters():
        if name.endswith(GATES):
            hidden_size = parameter.shape[-1]
            parameter.data.mul_(1 / (hidden_size**0.5 * LARGEST**2 / 3))


# In every process of the server: those that it starts import this file again.
loader.initialize_dummy_weights = initialize

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
