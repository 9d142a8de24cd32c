"""Whether SGLang's own gate computes what a kernel computes, asked of a twin of the gate.

A fork's gate may have the signature and the weight of SGLang's and do more: add a bias, say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from sglang.srt.layers.moe_router.kernel import Run, Target, empty_logits, relative_error

# So many that SGLang's own path is cuBLAS in every release: up to 16 it may compile a kernel.
NUM_TOKENS = 32

# fp32 logits differ by the order of the sums: cuBLAS is within 4e-6 of fp64 (H100, torch 2.11,
# 2026-11-27). Others differ by their rounding, too.
_MAX_DIFFERENCE_FP32 = 1e-5
# SGLang multiplies some models' fp32 gates in TF32, which has 10 bits of mantissa. Products that
# are each off by up to 2^-11 leave a sum of random ones off by less.
_MAX_DIFFERENCE_TF32 = 2.0**-10


def find_difference(
    gate: nn.Module,
    own_forward: Callable[..., torch.Tensor],
    run: Run,
    target: Target,
    num_tokens: range,
) -> str | None:
    """Why the kernel must not answer for the gate, as a phrase; None if the two agree.

    Args:
        gate: as it was built; its weights need not be there yet, and are not touched.
        own_forward: SGLang's, which the kernel is to replace.
        run: the kernel.
        target: what it was loaded for.
        num_tokens: the M that the kernel takes.

    Raises:
        Exception: whatever a gate raises that is not as expected.
    """
    # Of its own, on the CPU: the global ones seed dummy weights and sampling.
    generator = torch.Generator("cpu").manual_seed(1)
    twin = copy.copy(gate)
    for name in ("_buffers", "_modules"):  # what a forward keeps there is not the gate's
        twin.__dict__[name] = dict(gate.__dict__[name])
    twin.__dict__["_parameters"] = {
        name: _random_like(parameter, target.device, generator)
        for name, parameter in gate._parameters.items()
    }
    weight, bias = twin.weight, twin.bias if target.bias else None
    shape = (NUM_TOKENS, target.hidden_size)
    dtype = torch.bfloat16 if target.dtype == torch.float32 else target.dtype
    hidden_states = _random(shape, target.device, dtype, generator)
    rows = min(NUM_TOKENS, num_tokens[-1])
    ours = torch.cat(
        [
            run(
                chunk, weight, empty_logits(chunk, weight, target.logits_dtype), False, bias
            ).clone()
            for chunk in hidden_states.split(rows)
        ]
    )
    theirs = own_forward(twin, hidden_states)
    if theirs.shape != ours.shape:
        return f"SGLang's own gate gives {list(theirs.shape)}, must give {list(ours.shape)}"
    if ours.dtype not in (torch.float32, theirs.dtype):
        return f"SGLang's own gate gives {theirs.dtype}, must give {ours.dtype}"
    difference = relative_error(ours, theirs)
    allowed = torch.finfo(theirs.dtype).eps
    if theirs.dtype == torch.float32:
        tf32 = target.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        allowed = _MAX_DIFFERENCE_TF32 if tf32 else _MAX_DIFFERENCE_FP32
    if not difference <= allowed:
        return (
            f"SGLang's own gate does not give hidden_states @ weight.T: the logits differ by "
            f"{difference:.1e}, must be within {allowed:.0e}"
        )
    return None


def _random_like(
    parameter: nn.Parameter | None, device: torch.device, generator: torch.Generator
) -> nn.Parameter | None:
    if parameter is None or not parameter.dtype.is_floating_point:
        return parameter
    # Large enough that whatever a gate does with another parameter shows.
    random = _random(tuple(parameter.shape), device, parameter.dtype, generator)
    scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
    return nn.Parameter(random * scale, requires_grad=False)


def _random(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    random = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return random.to(device, dtype)
