"""What the patch leans on in SGLang, read off SGLang's sources without importing them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

MODEL = "srt/models/deepseek_v2.py"
GATE_CLASS = "MoEGate"
GATE_OP = "sglang.kernels.ops.gemm.cluster_router_gemm"
"""What the gate imports in an SGLang that has merged `export --pr gate`."""

_ENVIRON = "srt/environ.py"
_CUSTOM_OP = "srt/utils/custom_op.py"
_SERVER_ARGS = ("srt/server_args.py", "get_global_server_args")

_FORWARD = "self, hidden_states, gemm_output_zero_allocator=None, forward_batch=None"

# How a gate asks for deterministic inference, and the function that `moe_router.plan`
# asks in its place.
DETERMINISTIC_INFERENCE = {
    "get_global_server_args().enable_deterministic_inference": _SERVER_ARGS,
    "get_server_args().enable_deterministic_inference": _SERVER_ARGS,
    "get_exec().deterministic.enable_deterministic_inference": (
        "srt/runtime_context.py",
        "get_exec",
    ),
}


class Contract(NamedTuple):
    """What one SGLang has of it."""

    problem: str | None = None
    """Why the patch does not fit, in one phrase; None if it does."""
    in_tree: bool = False
    """The gate takes the fast path by itself."""


class _BrokenError(Exception):
    pass


def examine(package: Path) -> Contract:
    """Reads the contract off SGLang's sources.

    Args:
        package: the folder `sglang`, which has `srt` in it.
    """
    try:
        model = _parse(package, MODEL)
        expression = _check_gate(_class(model, MODEL, GATE_CLASS))
        file, function = DETERMINISTIC_INFERENCE[expression]
        _function(_parse(package, file).body, f"sglang/{file}", function)
        _check_custom_op(_parse(package, _CUSTOM_OP))
        _check_environ(_parse(package, _ENVIRON))
    except _BrokenError as broken:
        return Contract(problem=str(broken))
    return Contract(
        in_tree=any(
            isinstance(node, ast.ImportFrom) and node.module == GATE_OP for node in ast.walk(model)
        ),
    )


_TOPK = "srt/layers/moe/topk.py"
_ALIGN = "srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py"
_RECORDER = "srt/eplb/expert_distribution.py"

# The arguments that the patch gives to SGLang's functions, or takes in their place.
_TOPK_FUNCTIONS = {
    "select_experts": (
        "hidden_states, router_logits, topk_config, layer_id, num_token_non_padded, "
        "expert_location_dispatch_info"
    ),
    "_post_process_topk_ids": (
        "topk_ids, topk_weights, topk_config, router_logits, layer_id, num_token_non_padded, "
        "expert_location_dispatch_info"
    ),
    "capture_routed_experts_if_allowed": "topk_config, layer_id, topk_ids",
}
_TOPK_CONFIG = {
    "top_k",
    "use_grouped_topk",
    "topk_group",
    "num_expert_group",
    "renormalize",
    "correction_bias",
    "routed_scaling_factor",
    "fused_shared_experts_scaling_factor",
    "apply_routed_scaling_factor_on_output",
    "scoring_func",
    "torch_native",
    "allow_routed_experts_capture",
}


@functools.cache  # two hooks and each row of doctor ask it of the same sources
def examine_routing(package: Path) -> str | None:
    """Why the patch does not fit SGLang's top-k and alignment, in one phrase; None if it does.

    Args:
        package: the folder `sglang`, which has `srt` in it.
    """
    try:
        topk = _parse(package, _TOPK)
        for name, arguments in _TOPK_FUNCTIONS.items():
            _check_arguments(_function(topk.body, f"sglang/{_TOPK}", name), arguments)
        config = _class(topk, _TOPK, "TopKConfig")
        _check_names(config, _TOPK_CONFIG)
        if not _names(config) & {"num_fused_shared_experts", "num_shared_topk_slots"}:
            raise _BrokenError("TopKConfig does not say how many shared experts are fused")
        _check_names(
            _class(topk, _TOPK, "StandardTopKOutput"),
            {"topk_weights", "topk_ids", "router_logits"},
        )
        imported = {
            alias.name
            for node in topk.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if "get_global_expert_distribution_recorder" not in imported:
            raise _BrokenError("the top-k does not ask for a recorder")
        align = _parse(package, _ALIGN)
        _check_arguments(
            _function(align.body, f"sglang/{_ALIGN}", "moe_align_block_size"),
            "topk_ids, block_size, num_experts",
        )
        recorder = _class(_parse(package, _RECORDER), _RECORDER, "ExpertDistributionRecorder")
        _check_names(recorder, {"on_select_experts"})
    except _BrokenError as broken:
        return str(broken)
    return None


def _check_arguments(function: ast.FunctionDef, first: str) -> None:
    """Whether a function takes these arguments first, and others only if it need not get them."""
    args = function.args
    taken = [each.arg for each in (*args.args, *args.kwonlyargs)]
    needed = first.split(", ")
    if taken[: len(needed)] != needed:
        raise _BrokenError(f"{function.name} takes {', '.join(taken)}, must take {first} first")
    positional = args.args[: len(args.args) - len(args.defaults)]
    keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    required = [each.arg for each in positional] + [k.arg for k, value in keywords if value is None]
    others = [name for name in required if name not in needed]
    if others:
        raise _BrokenError(f"{function.name} must be given {', '.join(others)}")


def _check_gate(gate: ast.ClassDef) -> str:
    where = f"{gate.name}.__init__"
    init = _function(gate.body, gate.name, "__init__")
    assigned = [
        ast.unparse(target)
        for node in ast.walk(init)
        if isinstance(node, ast.Assign)
        for target in node.targets
    ]
    if "self.weight" not in assigned:
        raise _BrokenError(f"{where} sets {', '.join(assigned) or 'nothing'}, must set self.weight")
    forward = _function(gate.body, gate.name, "forward")
    for argument in ast.walk(forward.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    taken = ast.unparse(forward.args)
    if taken != _FORWARD:
        raise _BrokenError(f"{gate.name}.forward takes ({taken}), must take ({_FORWARD})")
    asked = {
        ast.unparse(node)
        for node in ast.walk(forward)
        if isinstance(node, ast.Attribute) and node.attr == "enable_deterministic_inference"
    }
    if len(asked) != 1 or not asked <= DETERMINISTIC_INFERENCE.keys():
        raise _BrokenError(
            f"{gate.name}.forward asks {' and '.join(sorted(asked)) or 'nothing'} for "
            f"deterministic inference, must ask {' or '.join(DETERMINISTIC_INFERENCE)}"
        )
    return asked.pop()


def _check_custom_op(module: ast.Module) -> None:
    # Its overloads name all keywords, its implementation only some.
    taken = {
        argument.arg
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == "register_custom_op"
        for argument in node.args.kwonlyargs
    }
    missing = {"op_name", "mutates_args", "fake_impl"} - taken
    if missing:
        raise _BrokenError(f"register_custom_op does not take {', '.join(sorted(missing))}")


def _check_environ(module: ast.Module) -> None:
    for name in ("EnvStr", "EnvBool", "Envs"):
        _class(module, _ENVIRON, name)
    _check_names(_class(module, _ENVIRON, "EnvField"), {"__init__", "__set_name__", "parse"})


def _names(scope: ast.ClassDef) -> set[str]:
    """What a class defines: functions, and names with a value or a type."""
    found = {node.name for node in scope.body if isinstance(node, ast.FunctionDef)}
    for node in scope.body:
        if isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
    return found


def _check_names(scope: ast.ClassDef, names: set[str]) -> None:
    found = _names(scope)
    if not names <= found:
        raise _BrokenError(f"{scope.name} has no {', '.join(sorted(names - found))}")


def _parse(package: Path, file: str) -> ast.Module:
    try:
        return ast.parse((package / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _BrokenError(f"there is no sglang/{file}") from None
    except SyntaxError as error:
        raise _BrokenError(f"sglang/{file} does not parse ({error})") from None


def _class(module: ast.Module, file: str, name: str) -> ast.ClassDef:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise _BrokenError(f"sglang/{file} has no class {name}")


def _function(body: list[ast.stmt], where: str, name: str) -> ast.FunctionDef:
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise _BrokenError(f"{where} has no function {name}")
