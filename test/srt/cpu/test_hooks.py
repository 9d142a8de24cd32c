"""Our hook beside those of other plugins, which SGLang finds and loads as it does ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang.srt.layers.moe_router.models import GATES, Gate

OURS = "dsv3_router_gemm"

# `torch` serves on a CPU, in fp32; SGLang's own gate gives bf16 there.
CALL = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
sys.path.{add}
from gates import build_gate
import torch
gate = build_gate()
with torch.no_grad():
    logits = gate(torch.randn(4, 7168, dtype=torch.bfloat16))
import other_plugin
dtype = str(logits.dtype).removeprefix("torch.")
print(json.dumps(dict(dtype=dtype, gate=type(gate).__name__, seen=other_plugin.seen)))
"""

PLUGIN = """
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
GATE = "sglang.srt.models.deepseek_v2.MoEGate"
seen = []

def activate():
"""

AROUND = """
    HookRegistry.register(f"{GATE}.forward", around, HookType.AROUND)

def around(original, gate, hidden_states, *arguments):
    seen.append("around")
    return original(gate, hidden_states, *arguments)
"""

MODEL_FIRST = "    import sglang.srt.models.deepseek_v2\n" + AROUND.lstrip("\n")

BEFORE_AND_AFTER = """
    HookRegistry.register(f"{GATE}.forward", before, HookType.BEFORE)
    HookRegistry.register(f"{GATE}.forward", after, HookType.AFTER)
    HookRegistry.register(f"{GATE}.__init__", init, HookType.AFTER)

def before(gate, hidden_states):
    seen.append("before")

def after(logits, gate, hidden_states):
    seen.append("after")

def init(result, gate, *arguments, **named):
    seen.append("init")
"""

BY_A_SUBCLASS = """
    from sglang.srt.models.deepseek_v2 import MoEGate

    class Gate(MoEGate):
        def forward(self, *arguments):
            seen.append("subclass")
            return super().forward(*arguments)

    HookRegistry.register(GATE, Gate, HookType.REPLACE)
"""

WITHOUT_A_WEIGHT = """
    class Gate(torch.nn.Module):
        def __init__(self, config, quant_config, prefix=""):
            super().__init__()
            self.router = torch.nn.Linear(config.hidden_size, config.n_routed_experts)

        def forward(self, hidden_states, *arguments):
            seen.append("without a weight")
            return self.router(hidden_states)

"""

BY_REGISTRY = "    HookRegistry.register(GATE, Gate, HookType.REPLACE)\n"
BY_HAND = "    from sglang.srt.models import deepseek_v2\n    deepseek_v2.MoEGate = Gate\n"


@pytest.fixture(params=["first", "last"])
def call(
    request: pytest.FixtureRequest, tmp_path: Path, fork_python: Callable[..., str]
) -> Callable[[str], tuple[dict[str, object], str]]:
    """Calls a gate beside a plugin that SGLang loads before ours, or after it."""
    added = tmp_path / "added"
    metadata = added / "other_plugin-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nother = other_plugin:activate\n"
    )

    def run(body: str) -> tuple[dict[str, object], str]:
        (added / "other_plugin.py").write_text(PLUGIN.rstrip("\n") + "\n" + body.lstrip("\n"))
        add = "insert(0, {!r})" if request.param == "first" else "append({!r})"
        code = CALL.format(add=add.format(str(added)))
        said = fork_python(code, SGLANG_ROUTER_GEMM_BACKEND="torch")
        executed = [
            line.split()[-1] for line in said.splitlines() if "Executed general plugin" in line
        ]
        ordered = [name for name in executed if name in ("other", OURS)]
        assert ordered == (["other", OURS] if request.param == "first" else [OURS, "other"])
        assert "ERROR" not in said
        return json.loads(said.splitlines()[-1]), said

    return run


Call = Callable[[str], tuple[dict[str, object], str]]


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (AROUND, ["around"]),
        (MODEL_FIRST, ["around"]),
        (BEFORE_AND_AFTER, ["init", "before", "after"]),
    ],
    ids=["around", "around, the model imported first", "before and after"],
)
def test_others_hooks_are_called_where_we_serve(body: str, seen: list[str], call: Call) -> None:
    found, _ = call(body)
    assert found == {"dtype": "float32", "gate": "MoEGate", "seen": seen}


def test_we_serve_a_subclass_that_calls_sglangs_forward(call: Call) -> None:
    found, _ = call(BY_A_SUBCLASS)
    assert found == {"dtype": "float32", "gate": "Gate", "seen": ["subclass"]}


@pytest.mark.parametrize("replaced", [BY_REGISTRY, BY_HAND], ids=["by registry", "by hand"])
def test_a_gate_without_a_weight_loads_and_serves(replaced: str, call: Call) -> None:
    found, said = call(WITHOUT_A_WEIGHT + replaced)
    assert found == {"dtype": "bfloat16", "gate": "Gate", "seen": ["without a weight"]}
    assert "WARNING Router GEMM: the gate cannot" not in said


# The hook itself ---------------------------------------------------------------------------

AGAIN = """
from gates import build_gate
import torch
from sglang_router_gemm.plugin import activate
hidden_states = torch.randn(4, 7168, dtype=torch.bfloat16)

def layers():
    from sglang.srt.models.deepseek_v2 import MoEGate
    count, forward = 0, MoEGate.forward
    while hasattr(forward, "__wrapped__"):
        count, forward = count + 1, forward.__wrapped__
    with torch.no_grad():
        print(count, build_gate()(hidden_states).dtype)

build_gate()
layers()
activate()
layers()
import importlib
from sglang.srt.models import deepseek_v2
importlib.reload(deepseek_v2)
layers()
activate()
layers()
"""


def test_it_is_there_once_and_a_reload_takes_it_off(fork_python: Callable[..., str]) -> None:
    said = fork_python(AGAIN, SGLANG_ROUTER_GEMM_BACKEND="torch")
    assert said.splitlines()[-4:] == [
        "1 torch.float32",
        "1 torch.float32",
        "0 torch.bfloat16",
        "1 torch.float32",
    ]


PLAIN = """
import importlib, inspect, logging, types
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from gates import build_gate
import torch
build_gate()
module = importlib.import_module("sglang.srt.models.{module}")
from sglang.srt.models.deepseek_v2_gate import router_logits
counts = dict.fromkeys(("n_routed_experts", "num_experts", "moe_num_experts"), 32)
given = {{"config": types.SimpleNamespace(**counts, hidden_size=64, topk_method="noaux_tc")}}
if "quant_config" in inspect.signature(module.{name}.__init__).parameters:
    given["quant_config"] = None
torch.set_default_dtype(torch.bfloat16)
gate = module.{name}(**given).requires_grad_(False)
torch.set_default_dtype(torch.float32)
torch.nn.init.normal_(gate.weight)
hidden_states = torch.randn(5, 64, dtype=torch.bfloat16)
with torch.no_grad():
    logits, ours = gate(hidden_states), router_logits(gate, hidden_states)
    own = type(gate).forward.__wrapped__(gate, hidden_states)
assert logits.dtype == own.dtype
print(gate.weight.dtype, logits.dtype, ours is not None)
assert torch.equal(logits, own if ours is None else ours)
torch.testing.assert_close(logits, own)
"""


@pytest.mark.parametrize(("backend", "served"), [("torch", True), ("auto", False)])
@pytest.mark.parametrize(
    "gate", [each for each in GATES if each.linear is None], ids=lambda gate: gate.module
)
def test_gates_of_other_models(
    gate: Gate, backend: str, served: bool, fork_python: Callable[..., str]
) -> None:
    code = PLAIN.format(module=gate.module, name=gate.name)
    said = fork_python(code, SGLANG_ROUTER_GEMM_BACKEND=backend)
    assert said.count(f"sglang.srt.models.{gate.module}.{gate.name} is hooked.") == 1
    assert "WARNING Router" not in said
    weight, logits, ours = said.splitlines()[-1].split()
    assert logits == str(gate.logits_dtype or weight)
    assert ours == str(served)


LINEAR = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import sglang_router_gemm
from sglang.srt.plugins import load_plugins
load_plugins()
import blocks
from sglang.srt.layers.moe_router.models import GATES
gate = next(each for each in GATES if each.module == "{module}")
torch.manual_seed(0)
class Stop(Exception): pass
def record(linear, given):
    print("GIVEN", given[0].dtype)
    raise Stop
def record_wrapped(linear, given):
    print("WRAPPED", given[0].dtype)
    raise Stop
with blocks.one_rank("cpu"), torch.no_grad():
    block, linear = blocks.build(gate, 32, 128)
    hidden_states = torch.randn(5, 128, dtype=torch.bfloat16)
    served = linear.router_plan.decision.backend is not None
    logits, _ = linear(hidden_states if served else hidden_states.to(linear.weight.dtype))
    own_class = next(each for each in type(linear).__mro__ if "own_logits" not in vars(each))
    own, _ = own_class.forward(linear, hidden_states.to(linear.weight.dtype))
    assert torch.equal(logits, own) and logits.dtype == own.dtype
    linear.register_forward_pre_hook(record)
    for method in gate.casting:
        arguments = [hidden_states, None][: 2 if method == "forward_deepep" else 1]
        if method == "_forward_dual_stream":
            continue  # it needs a GPU
        for wrapped in (False, True):  # as LoRA wraps a layer, which calls its quant_method
            if wrapped:
                setattr(block, gate.linear, torch.nn.Sequential(linear))
                getattr(block, gate.linear).register_forward_pre_hook(record_wrapped)
            try:
                getattr(block, method)(*arguments)
            except Stop:
                pass
            setattr(block, gate.linear, linear)
print(linear.weight.dtype, logits.dtype, linear.bias is not None, served)
"""


@pytest.mark.parametrize(("backend", "served"), [("torch", True), ("auto", False)])
@pytest.mark.parametrize(
    "gate",
    [each for each in GATES if each.linear is not None and each.method is None],
    ids=lambda gate: gate.module,
)
def test_gates_that_are_linear_layers(
    gate: Gate, backend: str, served: bool, fork_python: Callable[..., str]
) -> None:
    code = LINEAR.format(module=gate.module)
    said = fork_python(code, SGLANG_ROUTER_GEMM_BACKEND=backend)
    assert said.count(f"sglang.srt.models.{gate.module}.{gate.name} is hooked.") == 1
    assert "WARNING Router" not in said
    dtype = "torch.float32" if gate.casting else "torch.bfloat16"
    bias = gate.module == "gpt_oss"
    assert said.splitlines()[-1] == f"{dtype} {dtype} {bias} {served}"
    given = "GIVEN torch.bfloat16" if served else "GIVEN torch.float32"
    seen = {line for line in said.splitlines() if line.startswith(("GIVEN", "WRAPPED"))}
    assert seen == ({given, "WRAPPED torch.float32"} if gate.casting else set())


WIDE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import sglang_router_gemm
from sglang.srt.plugins import load_plugins
load_plugins()
import blocks
from sglang.srt.layers.moe_router.models import GATES
gate = next(each for each in GATES if each.module == "{module}")
with blocks.one_rank("cpu"), torch.no_grad():
    block, linear = blocks.build(gate, 32, 128)
    for num_tokens in (5, 200):
        hidden_states = torch.randn(num_tokens, 128, dtype=torch.bfloat16)
        logits, _ = linear(hidden_states)
        expected = hidden_states.float() @ linear.weight.float().t()
        right = logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=1e-4)
        print("WIDE" if right else "AS SGLANG'S", logits.dtype)
    block.topk(hidden_states, logits)
"""


@pytest.mark.parametrize(
    ("module", "setting", "wide"),
    [
        ("qwen3_moe", "auto,fp32", True),
        ("qwen2_moe", "torch,fp32", True),
        ("kimi_linear", "auto,fp32", True),
        ("hunyuan", "auto,fp32", True),
        ("gpt_oss", "auto,fp32", False),  # it adds a bias
        ("qwen3_moe", "auto", False),
        ("qwen3_moe", "cluster,fp32", True),  # which cannot serve here: a matmul does
    ],
)
def test_fp32_logits_for_whoever_asks(
    module: str, setting: str, wide: bool, fork_python: Callable[..., str]
) -> None:
    said = fork_python(WIDE.format(module=module), SGLANG_ROUTER_GEMM_BACKEND=setting)
    expected = "WIDE torch.float32" if wide else "AS SGLANG'S torch.bfloat16"
    assert said.splitlines().count(expected) == 2, said


METHOD = """
import copy, dataclasses, functools, logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import sglang_router_gemm
from sglang.srt.plugins import load_plugins
load_plugins()
import blocks
from sglang.srt.layers.moe_router.models import GATES
gate = next(each for each in GATES if each.module == "{module}")
def ones(hidden_states, weight, logits, pdl, bias):
    return logits.fill_(1)
with blocks.one_rank("cpu"), torch.no_grad():
    block, linear = blocks.build(gate, 32, 128)
    plan = linear.router_plan
    served = plan.decision.backend is not None
    if served:
        hidden_states = torch.randn(5, 128, dtype=torch.bfloat16)
        for each in (block, copy.deepcopy(block)):
            linear = getattr(each, gate.linear)
            torch.nn.init.normal_(linear.weight)
            method = getattr(type(each), gate.method)
            logits, own = method(each, hidden_states), method.__wrapped__(each, hidden_states)
            assert torch.equal(logits, own) and logits.dtype == own.dtype
            assert torch.equal(logits, plan.logits(hidden_states, linear.weight))
            linear.router_plan = dataclasses.replace(plan, run=ones)
            assert (method(each, hidden_states) == 1).all()
            linear.router_plan = plan
    assert not hasattr(linear, "router_block")
    layer = type(linear)
    layer.forward = functools.wraps(layer.forward)(lambda self, x: None)
    assert not hasattr(blocks.build(gate, 32, 128)[1], "router_plan")
    layer.forward = layer.forward.__wrapped__
    another, other = blocks.build(gate, 32, 128)
    assert other.router_plan is plan
print(linear.weight.dtype, plan.target.logits_dtype, served)
"""


@pytest.mark.parametrize(
    "gate", [each for each in GATES if each.method is not None], ids=lambda gate: gate.module
)
def test_gates_whose_block_multiplies(gate: Gate, fork_python: Callable[..., str]) -> None:
    code = METHOD.format(module=gate.module)
    said = fork_python(code, SGLANG_ROUTER_GEMM_BACKEND="torch")
    assert said.count(f"sglang.srt.models.{gate.module}.{gate.name} is hooked.") == 1
    assert said.count("SGLang's own serves: another plugin has hooked its forward.") == 1
    if gate.module == "minimax_m3":  # SGLang's own needs CUDA, so nobody knows what it gives
        assert said.count("SGLang's own gate cannot be compared (NotImplementedError") == 1
        assert said.splitlines()[-1] == "torch.bfloat16 torch.float32 False"
    else:
        assert "WARNING Router" not in said
        assert said.splitlines()[-1] == "torch.float32 torch.float32 True"


MULTIPLIES = """
import copy, dataclasses, importlib, logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import sglang_router_gemm
from sglang.srt.plugins import load_plugins
load_plugins()
import blocks
from sglang.srt.layers.moe_router.models import GATES
from sglang.srt.lora.layers import BaseLayerWithLoRA
gate = next(each for each in GATES if each.module == "{module}")
torch.manual_seed(0)
few, many = (torch.randn(count, 128, dtype=torch.bfloat16) for count in (5, 129))
def build(in_fp32, gate=gate):
    block, linear = blocks.build(gate, 32, 128, **{{gate.fp32_if: in_fp32}})
    ours = [method for method in gate.multiplying if method in vars(block)]
    return block, linear, ours
def calls(block, hidden_states):
    return list(blocks.call_methods(gate, block, hidden_states))
def ones(hidden_states, weight, logits, pdl, bias):
    return logits.fill_(1)
with blocks.one_rank("cpu"), torch.no_grad():
    block, linear, ours = build(True)
    plan = linear.router_plan
    served = plan.decision.backend is not None
    assert ours == (list(gate.multiplying) if served else [])
    for each in (block, copy.deepcopy(block)):
        torch.nn.init.normal_(each.gate.weight)
        for logits, own in calls(each, few):
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, own)
    if served:
        decision = plan.decision._replace(num_tokens=range(129))
        linear.router_plan = dataclasses.replace(plan, run=ones, decision=decision)
        assert all((logits == 1).all() for logits, _ in calls(block, few))
        assert all(torch.equal(logits, own) for logits, own in calls(block, many))
        assert linear(few)[0].dtype == torch.bfloat16  # older releases call it for DeepEP
        block.gate = BaseLayerWithLoRA(linear, None)
        assert all(torch.equal(logits, own) for logits, own in calls(block, few))
        block.gate = linear
        for dynamic in (False, True):
            method = block.forward_normal
            traced = torch.compile(method, backend="eager", fullgraph=True, dynamic=dynamic)
            for hidden_states in (few, many):  # in a trace of M = 129 SGLang's own is seen
                linear.router_plan = dataclasses.replace(plan, decision=decision)
                torch.testing.assert_close(traced(hidden_states), method(hidden_states))
        module = importlib.import_module("sglang.srt.models.{module}")
        own = dict(forward_normal=lambda block, hidden_states: "another")
        module.Sub = type("Sub", (type(block),), own)
        sub, _, ours = build(True, gate._replace(name="Sub"))
        assert sub.forward_normal(few) == "another" and ours == ["forward_deepep"]
        block, linear, ours = build(False)
        assert not ours
        linear.router_plan = dataclasses.replace(linear.router_plan, run=ones)
        for logits, _ in calls(block, few):
            assert (logits == 1).all() and logits.dtype == torch.bfloat16
print(linear.weight.dtype, plan.target.logits_dtype, served)
"""


@pytest.mark.parametrize(("backend", "served"), [("torch", True), ("auto", False)])
@pytest.mark.parametrize(
    "gate", [each for each in GATES if each.multiplying], ids=lambda gate: gate.module
)
def test_gates_whose_block_multiplies_in_its_midst(
    gate: Gate, backend: str, served: bool, fork_python: Callable[..., str]
) -> None:
    code = MULTIPLIES.format(module=gate.module)
    said = fork_python(code, SGLANG_ROUTER_GEMM_BACKEND=backend)
    assert said.count(f"sglang.srt.models.{gate.module}.{gate.name} is hooked.") == 1
    warnings = [line for line in said.splitlines() if line.startswith("WARNING Router")]
    assert ["M is 129, must be" in line for line in warnings] == [True] * served
    assert said.splitlines()[-1] == f"torch.bfloat16 torch.float32 {served}"


OTHER_PRODUCT = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import sglang_router_gemm
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang_router_gemm import narrow
product = narrow._PRODUCT
narrow._PRODUCT = product.replace("matmul", "mm")
import sglang.srt.models.step3p5 as step
print(hasattr(step.Step3p5MoEMLP.__init__, "__wrapped__"))
narrow._PRODUCT = product
own = step.Step3p5MoEMLP.forward_normal
own.__kwdefaults__ = dict(another=1)
methods, _ = narrow.asking(step, "Step3p5MoEMLP", ("forward", "forward_normal"), "gate")
same = methods["forward_normal"]
first = [each.__code__.co_firstlineno for each in (own, same)]
print(list(methods), first[0] == first[1], same.__kwdefaults__ == dict(another=1))
for method in ("forward", "nothing"):
    try:
        narrow.asking(step, "Step3p5MoEMLP", (method,), "gate")
    except ValueError as error:
        print("REFUSED", error)
"""


def test_a_block_that_multiplies_in_another_way_is_left_alone(
    fork_python: Callable[..., str],
) -> None:
    said = fork_python(OTHER_PRODUCT, SGLANG_ROUTER_GEMM_BACKEND="torch")
    where = "sglang.srt.models.step3p5"
    assert said.count("WARNING Router") == 1
    assert f"WARNING Router GEMM: {where} cannot be hooked, SGLang's own serves instead." in said
    assert (
        f"ValueError: {where}.Step3p5MoEMLP.forward_normal has router_logits = torch.matmul("
        "hidden_states.to(torch.float32), self.gate.weight.t().to(torch.float32)), must use "
        "self.gate.weight in torch.mm("
    ) in said
    assert said.splitlines()[-4:] == [
        "False",
        "['forward_normal'] True True",
        f"REFUSED {where}.Step3p5MoEMLP multiplies by self.gate.weight in none of its methods "
        "forward, must in one",
        f"REFUSED {where}.Step3p5MoEMLP.nothing must be a plain function of SGLang's",
    ]


NOT_PLAIN = """
import functools, logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import sglang_router_gemm
from sglang.srt.plugins import load_plugins
load_plugins()
import blocks
import sglang.srt.models.deepseek_v2_gate as planned
from sglang.srt.layers.moe_router.models import GATES
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
class Packed(UnquantizedLinearMethod):
    pass
gate = next(each for each in GATES if each.module == "qwen3_moe")
def build():
    block, linear = blocks.build(gate, 32, 128)
    return hasattr(linear, "own_logits")
with blocks.one_rank("cpu"), torch.no_grad():
    print(build())
    import sglang.srt.models.qwen3_moe as qwen
    from sglang_router_gemm import hooks
    qwen.Sub = type("Sub", (qwen.Qwen3MoeSparseMoeBlock,), {"__module__": qwen.__name__})
    sub = gate._replace(name="Sub")
    hooks.patch_linear_gate(sub, qwen)
    _, linear = blocks.build(sub, 32, 128)  # hooked twice, planned once
    print(type(linear).__mro__[1] is qwen.ReplicatedLinear)
    planned.is_cpu = lambda: True  # SGLang's engine on a CPU
    print(build())
    planned.is_cpu = lambda: False
    from sglang.srt.layers.linear import LinearBase
    own_init = LinearBase.__init__
    def init(layer, *args, **kwargs):
        own_init(layer, *args, **kwargs)
        layer.quant_method.__class__ = Packed
    LinearBase.__init__ = init
    print(build())
    LinearBase.__init__ = own_init
    own_forward = qwen.ReplicatedLinear.forward
    for forward in (lambda self, x, scale=1: None, functools.wraps(own_forward)(lambda *_: None)):
        qwen.ReplicatedLinear.forward = forward
        print(build())
    qwen.ReplicatedLinear.forward = own_forward
    qwen.ReplicatedLinear = lambda *args, **kwargs: torch.nn.Linear(128, 32, bias=False)
    print(build())
"""


def test_a_linear_layer_that_is_not_plain_is_left_alone(fork_python: Callable[..., str]) -> None:
    """Its weight may be packed or quantised, or it is somebody else's."""
    said = fork_python(NOT_PLAIN, SGLANG_ROUTER_GEMM_BACKEND="torch")
    lines = said.splitlines()
    found = [line for line in lines if line in ("True", "False")]
    assert found == ["True", "True", "False", "False", "False", "False", "False"]
    where = "INFO Router GEMM: sglang.srt.models.qwen3_moe.Qwen3MoeSparseMoeBlock.gate: SGLang's"
    packed = "INFO Router GEMM: ReplicatedLinear: SGLang's own serves"
    for line in (
        f"{packed}: UnquantizedLinearMethod may pack its weight.",
        f"{packed}: Packed may pack its weight.",
        f"{where} own serves: its forward takes (self, x, scale), must take (self, x).",
        f"{where} own serves: another plugin has hooked its forward.",
        f"{where} own serves: it is a Linear, must be a ReplicatedLinear.",
    ):
        assert lines.count(line) == 1, said


OTHER_METHOD = """
import sys, types
import torch
from sglang_router_gemm.narrow import narrowed
import sglang.srt.models.minimax_m2 as minimax
for method, gate in (("forward_normal", "topk"), ("forward_normal", "router"), ("nothing", "gate")):
    try:
        narrowed(minimax, "MiniMaxM2MoE", method, gate)
    except ValueError as error:
        print("REFUSED", error)
own = minimax.MiniMaxM2MoE.forward_normal
same = narrowed(minimax, "MiniMaxM2MoE", "forward_normal", "gate")
first = [each.__code__.co_firstlineno for each in (own, same)]
print(first[0] == first[1], same.__globals__ is vars(minimax))
minimax.MiniMaxM2MoE.forward_normal = lambda self, hidden_states: None
try:
    narrowed(minimax, "MiniMaxM2MoE", "forward_normal", "gate")
except ValueError as error:
    print("REFUSED", error)
"""


def test_a_method_that_is_not_as_expected_is_refused(fork_python: Callable[..., str]) -> None:
    said = fork_python(OTHER_METHOD).splitlines()
    where = "REFUSED sglang.srt.models.minimax_m2.MiniMaxM2MoE"
    assert said[-5].startswith(f"{where}.forward_normal calls self.topk(hidden_states, router_log")
    assert said[-4] == f"{where}.forward_normal does not call self.router"
    assert said[-3] == f"{where}.nothing must be a plain function of SGLang's"
    assert said[-2] == "True True"
    assert said[-1] == f"{where}.forward_normal must be a plain function of SGLang's"


OTHER_FORWARD = """
import sys
import sglang.srt.models.glm4_moe as glm
sys.modules.pop(glm.__name__)
glm.Glm4MoeGate.forward = lambda self, hidden_states, scale: None
from sglang_router_gemm import hooks
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from sglang.srt.layers.moe_router.models import Gate
hooks.patch_plain_gate(Gate("glm4_moe", "Glm4MoeGate"), glm)
hooks.patch_plain_gate(Gate("glm4_moe", "NotThere"), glm)
hooks.patch_linear_gate(Gate("glm4_moe", "NotThere", "gate"), glm)
print(hasattr(glm.Glm4MoeGate, "router_plan"))
"""


def test_a_gate_with_another_forward_is_left_alone(fork_python: Callable[..., str]) -> None:
    said = fork_python(OTHER_FORWARD)
    assert "forward takes (self, hidden_states, scale), must take (self, hidden_states)" in said
    assert said.splitlines()[-1] == "False"


BROKEN = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
sys.modules["sglang.srt.models.deepseek_v2_gate"] = None
from gates import build_gate
import torch
with torch.no_grad():
    print(build_gate()(torch.randn(4, 7168, dtype=torch.bfloat16)).dtype)
"""


def test_a_hook_that_fails_leaves_sglangs_gate_and_one_warning(
    fork_python: Callable[..., str],
) -> None:
    said = fork_python(BROKEN, SGLANG_ROUTER_GEMM_BACKEND="torch")
    warning = (
        "WARNING Router GEMM: sglang.srt.models.deepseek_v2 cannot be hooked, SGLang's own serves"
        " instead."
    )
    assert said.count(warning) == 1
    assert said.splitlines()[-1] == "torch.bfloat16"
