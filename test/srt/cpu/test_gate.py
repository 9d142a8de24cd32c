"""The gate in real SGLang on a CPU: what it reads off tensors, what it calls, what it says.

The fast path needs a GPU that this machine may not have. Where a test must see the gate
choose it, the gate is traced over fake CUDA tensors (torch's own FakeTensorMode), with the
SM given and the kernel marked as loaded; nothing is run then.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import random_inputs, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sglang.srt.layers.moe_router import backends, flashinfer_router_gemm, packages, plan
from sglang.srt.layers.moe_router.backends import BACKENDS, find_kernel
from sglang.srt.layers.moe_router.kernel import Run, Target
from sglang.srt.models.deepseek_v2_gate import DeepseekV2Gate, plan_gate, router_logits
from sglang_router_gemm.check import TOLERANCE, check_gate, sglang_gate
from sglang_router_gemm.check import deepseek_v2_gate as build_deepseek_v2_gate

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = SimpleNamespace(n_routed_experts=256, hidden_size=7168, topk_method="noaux_tc")
FLASHINFER_OP = torch.ops.sglang.flashinfer_dsv3_router_gemm_out
CLUSTER_OP = torch.ops.sglang.cluster_router_gemm


@pytest.fixture(scope="module")
def hooked_gate() -> torch.nn.Module:
    return sglang_gate(CPU)


@pytest.fixture(autouse=True)
def _start_afresh(publish_server_args: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan, no warning and no kernel of an earlier test."""
    for name, module, empty in (
        ("_plans", plan, {}),
        ("_warned", plan, set()),
        ("_loaded", backends, {}),
    ):
        monkeypatch.setattr(module, name, empty)


def _not_called(*arguments: object) -> torch.Tensor:
    raise AssertionError("a kernel ran in a trace")


def _mark_loaded(
    backend: str, num_experts: int = 256, hidden_size: int = 7168, kernel: Run | str = _not_called
) -> None:
    key = backends._key(BACKENDS[backend], Target(GPU, None, num_experts, hidden_size))
    backends._loaded[key] = kernel


# What a call may change ------------------------------------------------------------------


def test_a_call_is_looked_at_for_all_that_may_change() -> None:
    rule = BACKENDS["cluster"].rule
    hidden_states, weight = random_inputs(4)
    padded = torch.zeros(4, 7168 + 8, dtype=torch.bfloat16)[:, :7168]
    offset = torch.zeros(4 * 7168 + 1, dtype=torch.bfloat16)[1:].view(4, 7168)
    shifted = torch.zeros(256 * 7168 + 4, dtype=torch.bfloat16)[4:].view(256, 7168)
    assert rule.takes(hidden_states, weight)
    assert rule.takes(hidden_states[:0], weight)
    assert rule.takes(padded[:1], weight)  # one row has no row stride
    assert not rule.takes(padded, weight)
    assert not rule.takes(hidden_states, weight.t().contiguous().t())
    assert not rule.takes(offset, weight)
    assert rule.takes_layout(offset, weight, addresses=False)
    assert not rule.takes(hidden_states, shifted)
    assert not rule.takes(hidden_states.half(), weight)
    assert not rule.takes(hidden_states[:, :6144], weight)
    assert not rule.takes(hidden_states.view(2, 2, 7168), weight)
    assert not rule.takes(hidden_states, weight.to("meta"))
    assert not rule.takes(hidden_states.repeat(40, 1), weight)
    assert BACKENDS["torch"].rule.takes(padded, shifted)


def test_deterministic_inference_is_what_the_published_server_args_say(
    publish_server_args: Callable[..., None],
) -> None:
    assert not plan.deterministic_inference()
    publish_server_args(enable_deterministic_inference=True)
    assert plan.deterministic_inference()


# What is installed -----------------------------------------------------------------------


def test_flashinfer_declares_its_sms() -> None:
    """The real FlashInfer's own word: 0.7.2 serves 90, 100 and 103."""
    missing = flashinfer_router_gemm.missing
    assert [sm for sm in (75, 80, 90, 100, 103, 120) if not missing(sm)] == [90, 100, 103]
    assert "does not declare SM 120" in (missing(120) or "")


def test_an_old_flashinfer_has_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import flashinfer.gemm

    monkeypatch.delattr(flashinfer.gemm, "mm_M1_16_K7168_N256")
    packages.find_function.cache_clear()
    assert "has no mm_M1_16_K7168_N256" in (flashinfer_router_gemm.missing(100) or "")
    monkeypatch.undo()
    packages.find_function.cache_clear()


MISSING = """
import sys
for name in ["{module}", *sys.modules]:
    if name.split(".")[0] == "{module}":
        sys.modules[name] = None
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name == "{distribution}" and {absent}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
from sglang.srt.layers.moe_router.backends import BACKENDS
print(BACKENDS["{backend}"].missing(100))
"""


@pytest.mark.parametrize(
    ("backend", "module", "distribution"),
    [
        ("flashinfer", "flashinfer", "flashinfer-python"),
        ("sgl_kernel", "sgl_kernel", "sglang-kernel"),
        ("cluster", "tvm_ffi", "apache-tvm-ffi"),
    ],
)
@pytest.mark.parametrize(
    ("absent", "reason"), [(True, "is not installed"), (False, "cannot be imported")]
)
def test_a_package_that_is_absent_or_broken(
    backend: str,
    module: str,
    distribution: str,
    absent: bool,
    reason: str,
    fork_python: Callable[..., str],
) -> None:
    code = MISSING.format(module=module, distribution=distribution, absent=absent, backend=backend)
    said = fork_python(code)
    assert distribution in said
    assert reason in said


def test_a_kernel_that_was_not_loaded_is_unavailable() -> None:
    for name in ("cluster", "flashinfer", "sgl_kernel"):
        reason = find_kernel(BACKENDS[name], Target(torch.device("cuda", 7), 90, 256, 7168))
        assert reason == "its kernel was not loaded with the model"


# What the gate computes on a CPU ---------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "flashinfer", "sgl_kernel", "torch"])
def test_numbers_of_sglangs_gate(
    backend: str, hooked_gate: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", backend)
    plan_gate(hooked_gate)
    check = check_gate("MoEGate", hooked_gate)
    assert check.logits_dtype == (torch.float32 if backend == "torch" else torch.bfloat16)
    assert check.relative_error <= TOLERANCE[check.logits_dtype]


def test_sglangs_own_forward_is_untouched(hooked_gate: torch.nn.Module) -> None:
    """Where no fast path applies, the bits are those of SGLang's own forward."""
    from sglang.srt.models.deepseek_v2 import MoEGate

    # Exported into SGLang's tree, this runs without the hook.
    own_forward = getattr(MoEGate.forward, "__wrapped__", MoEGate.forward)
    plan_gate(hooked_gate)
    for num_tokens in (0, 1, 16, 17, 64):
        hidden_states, _ = random_inputs(num_tokens)
        expected = own_forward(hooked_gate, hidden_states)
        assert torch.equal(hooked_gate(hidden_states), expected)
        assert torch.equal(hooked_gate(hidden_states, None, None), expected)
        named = hooked_gate(
            hidden_states=hidden_states, gemm_output_zero_allocator=None, forward_batch=None
        )
        assert torch.equal(named, expected)


def test_weights_of_a_dtype_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate = build_deepseek_v2_gate(CPU)
    hidden_states, _ = random_inputs(1)
    assert router_logits(gate, hidden_states) is not None
    gate.weight = torch.nn.Parameter(torch.ones(256, 7168, dtype=torch.float64))
    assert router_logits(gate, hidden_states.double()) is None


def test_fp32_weights_of_a_bf16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate = build_deepseek_v2_gate(CPU)
    gate.weight = torch.nn.Parameter(torch.randn(256, 7168))
    hidden_states, _ = random_inputs(5)
    logits = router_logits(gate, hidden_states)
    assert logits is not None
    assert relative_error(logits, hidden_states, gate.weight) < 1e-6
    assert router_logits(gate, hidden_states.half()) is None


@pytest.mark.parametrize("replace", ["data", "parameter", "shape"])
def test_a_weight_that_is_replaced_is_noticed(
    replace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call has a plan of its own, and the right logits."""
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate = build_deepseek_v2_gate(CPU)
    first = gate.router_plan
    other = random_inputs(1, num_experts=384 if replace == "shape" else 256)[1]
    if replace == "data":
        gate.weight.data = other.half()
    else:
        gate.weight = torch.nn.Parameter(other.half())
    hidden_states = random_inputs(3)[0].half()
    logits = router_logits(gate, hidden_states)
    assert logits is not None
    assert relative_error(logits, hidden_states, other.half()) < 1e-6
    assert gate.router_plan is not first
    assert gate.router_plan.is_for(gate.weight)


def test_a_gate_that_was_never_planned_is_left_to_sglang(
    hooked_gate: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose __init__ did not run: unpickled, say. Nobody has compared it with ours."""
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    hooked_gate.router_plan = None
    assert hooked_gate(random_inputs(2)[0]).dtype == torch.bfloat16


# A gate that is not what it seems --------------------------------------------------------


class _WithBias(torch.nn.Module):
    """A fork's gate: SGLang's signature and weight, and one thing more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(random_inputs(1)[1], requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(256), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.float() @ self.weight.float().t() + self.bias


class _Plain(_WithBias):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.float() @ self.weight.float().t()


class _Raises(_WithBias):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not now")


class _OtherShape(_WithBias):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)[:, :8]


@pytest.mark.parametrize(
    ("gate_class", "said"),
    [
        (_Plain, None),
        (_WithBias, r"does not give hidden_states @ weight.T: the logits differ by [0-9.]+e"),
        (_Raises, "cannot be compared .RuntimeError: not now"),
        (_OtherShape, r"gives \[32, 8\], must give \[32, 256\]"),
    ],
)
def test_a_kernel_is_held_against_the_forward_that_it_replaces(
    gate_class: type[_WithBias],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate = gate_class()
    kept = gate.weight.clone()
    with caplog.at_level(logging.WARNING):
        plan_gate(gate, gate_class.forward)
        logits = router_logits(gate, random_inputs(3)[0])
        assert torch.equal(gate.weight, kept)
        gate.weight.data = gate.weight.data.half()  # nor with a weight that comes later
        later = router_logits(gate, random_inputs(3)[0].half())
    assert bool(gate.bias.eq(0).all())
    assert (logits is None) == (later is None) == (said is not None)
    assert [record for record in caplog.records if "Router GEMM" in record.message] == (
        [record for record in caplog.records if re.search(said, record.message)] if said else []
    )
    assert len(caplog.records) == (said is not None)


def test_sglangs_own_gate_is_the_kernels_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    assert sglang_gate(CPU).router_plan.decision.backend is BACKENDS["torch"]


class _WithCache(torch.nn.Module):
    """Keeps an fp32 copy of its weight from the first call on, as SGLang 0.5.17's GLM-4.5 gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 64, dtype=torch.bfloat16))
        self.copy: torch.Tensor | None
        self.register_buffer("copy", None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.copy is None:
            self.copy = self.weight.float()
        return hidden_states.float() @ self.copy.t()


def test_what_a_twins_forward_keeps_is_not_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate = _WithCache()
    plan_gate(gate, _WithCache.forward)
    assert gate.router_plan.decision.backend is BACKENDS["torch"]
    assert gate.copy is None


def test_a_weight_that_sglang_packs_is_left_to_it(
    hooked_gate: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AMX, where the weight is no longer what its shape says."""
    from sglang.srt.layers.amx_utils import PackWeightMethod

    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    monkeypatch.setattr(
        hooked_gate, "quant_method", PackWeightMethod(weight_names=["weight"]), raising=False
    )
    plan_gate(hooked_gate)
    assert router_logits(hooked_gate, random_inputs(2)[0]) is None


def test_vmap_over_the_gate(hooked_gate: torch.nn.Module) -> None:
    plan_gate(hooked_gate)
    batches = torch.randn(3, 2, 7168).bfloat16()
    with torch.no_grad():
        mapped = torch.vmap(hooked_gate)(batches)
        one_by_one = torch.stack([hooked_gate(batch) for batch in batches])
    torch.testing.assert_close(mapped, one_by_one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("num_experts", [256, 384])
def test_numbers_of_the_standalone_gate(num_experts: int) -> None:
    gate = build_deepseek_v2_gate(CPU)
    gate.weight = torch.nn.Parameter(random_inputs(1, num_experts=num_experts)[1])
    for num_tokens in (1, 16, 17):
        hidden_states, _ = random_inputs(num_tokens)
        logits = gate(hidden_states)
        assert logits.dtype == torch.float32
        assert relative_error(logits, hidden_states, gate.weight) < 1e-6
    assert gate(hidden_states[:0]).shape == (0, num_experts)


def test_the_standalone_gate_has_what_deepseek_v2_asks_of_it() -> None:
    gate = DeepseekV2Gate(CONFIG)
    assert gate.weight.shape == (256, 7168)
    assert gate.e_score_correction_bias.dtype == torch.float32
    plain = SimpleNamespace(n_routed_experts=64, hidden_size=2048, topk_method="greedy")
    assert DeepseekV2Gate(plain).e_score_correction_bias is None


# What it says ----------------------------------------------------------------------------


def test_a_forced_backend_that_cannot_serve_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "flashinfer")
    with caplog.at_level(logging.WARNING):
        for num_experts in (256, 384):
            gate = DeepseekV2Gate(
                SimpleNamespace(**(vars(CONFIG) | {"n_routed_experts": num_experts}))
            )
            for num_tokens in (1, 2, 17):
                assert router_logits(gate, random_inputs(num_tokens)[0]) is None
    assert [record.message for record in caplog.records] == [
        "Router GEMM (backend flashinfer): SGLang's own path serves instead: "
        "device is cpu, must be cuda."
    ]


def test_a_forced_backend_says_once_which_calls_it_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "torch")
    gate = build_deepseek_v2_gate(CPU)
    with caplog.at_level(logging.WARNING):
        for num_tokens in (1, 2):
            hidden_states, _ = random_inputs(num_tokens)
            assert router_logits(gate, hidden_states) is not None
            assert router_logits(gate, hidden_states.half()) is None
    assert [record.message for record in caplog.records] == [
        "Router GEMM (backend torch): SGLang's own path serves instead: "
        "hidden_states is torch.float16, must be torch.bfloat16."
    ]


def _plan_on_gpu(requested: str, monkeypatch: pytest.MonkeyPatch) -> plan.Plan:
    """A plan for DeepSeek-V3's gate on the GPU that `device_sm` names."""
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", requested)
    with FakeTensorMode():
        weight = torch.empty(256, 7168, dtype=torch.bfloat16, device="cuda")
    return plan.make_plan(weight)


@pytest.mark.parametrize("requested", ["auto", "flashinfer"])
def test_a_missing_flashinfer_warns_once_at_load(
    requested: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plan, "device_sm", lambda device: 100)
    monkeypatch.setattr(
        flashinfer_router_gemm, "find_function", lambda *names: (None, f"{names[2]} is not there")
    )
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            _plan_on_gpu(requested, monkeypatch)
    assert [record.message for record in caplog.records] == [
        f"Router GEMM (backend {requested}): SGLang's own path serves instead: "
        "flashinfer-python is not there.",
        f"Router GEMM [256, 7168] on SM 100: M 1+ SGLang (backend {requested}, PDL on)",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the failure is that there is no GPU")
def test_a_kernel_that_does_not_load_warns_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real `load_kernel`, which fails here for want of a GPU; on one see gpu/test_gate.py."""
    monkeypatch.setattr(plan, "device_sm", lambda device: 100)
    for _ in range(2):
        assert _plan_on_gpu("auto", monkeypatch).run is None
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "install the CUDA toolkit" in said
    assert isinstance(find_kernel(BACKENDS["flashinfer"], Target(GPU, 100, 256, 7168)), str)


def test_the_log_says_what_serves_which_m(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plan, "device_sm", lambda device: 103)
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_PDL", "0")
    _mark_loaded("flashinfer")
    with caplog.at_level(logging.INFO):
        for _ in range(58):
            _plan_on_gpu("auto", monkeypatch)
    assert [record.message for record in caplog.records] == [
        "Router GEMM [256, 7168] on SM 103: M 1-16 flashinfer, M 17+ SGLang (backend auto, PDL off)"
    ]


def test_under_deterministic_inference_nothing_is_loaded_and_the_log_says_why(
    publish_server_args: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(plan, "device_sm", lambda device: 90)
    publish_server_args(enable_deterministic_inference=True)
    with caplog.at_level(logging.INFO):
        _plan_on_gpu("auto", monkeypatch)
    assert backends._loaded == {}
    assert [record.message for record in caplog.records] == [
        "Router GEMM [256, 7168] on SM 90: M 1+ SGLang: deterministic inference is on "
        "(backend auto, PDL on)"
    ]


def test_auto_and_off_do_not_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for backend in ("auto", "off"):
        monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", backend)
        assert router_logits(build_deepseek_v2_gate(CPU), random_inputs(1)[0]) is None
    assert [record for record in caplog.records if "Router GEMM" in record.message] == []


# The fast path, traced -------------------------------------------------------------------


class Tracer:
    """Compiles a module over fake CUDA tensors and keeps the graphs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.graphs: list[torch.fx.Graph] = []
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        torch._dynamo.reset()

        def keep(graph_module: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
            self.graphs.append(graph_module.graph)
            return graph_module

        self._compiled = torch.compile(module, fullgraph=True, backend=keep)

    def __call__(self, num_tokens: int, **forward: object) -> torch.Tensor:
        with self._mode, torch.no_grad():
            hidden_states = torch.empty(num_tokens, 7168, dtype=torch.bfloat16, device="cuda")
            logits: torch.Tensor = self._compiled(hidden_states, **forward)
        return logits

    @property
    def takes_the_op(self) -> bool:
        return self.takes(FLASHINFER_OP)

    @property
    def takes_a_kernel(self) -> bool:
        return self.takes(FLASHINFER_OP) or self.takes(CLUSTER_OP)

    def takes(self, op: object) -> bool:
        return any(node.target is op for node in self.graphs[-1].nodes)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretends that fake CUDA tensors lie on a GPU of this SM with the kernel loaded."""

    def be(sm: int) -> None:
        monkeypatch.setattr(plan, "device_sm", lambda device: sm)
        _mark_loaded("flashinfer")

    return be


def _on_fake_cuda(gate: torch.nn.Module, **change: object) -> torch.nn.Module:
    """The gate with a fake CUDA weight, `change` being its dtype or shape."""
    with FakeTensorMode():
        shape, dtype = change.get("shape", (256, 7168)), change.get("dtype", torch.bfloat16)
        gate.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=dtype, device="cuda"), requires_grad=False
        )
    plan_gate(gate)
    return gate


@pytest.mark.parametrize("build", [sglang_gate, build_deepseek_v2_gate])
@pytest.mark.parametrize("sm", [100, 103])
def test_one_graph_serves_every_m(
    build: Callable[[torch.device], torch.nn.Module], sm: int, on_gpu: Callable[[int], None]
) -> None:
    """M = 1 is a graph of its own (PyTorch specialises sizes 0 and 1), all other M share one."""
    on_gpu(sm)
    traced = Tracer(_on_fake_cuda(build(CPU)))
    for num_tokens in range(1, 65):
        logits = traced(num_tokens)
        assert (logits.shape, logits.dtype) == ((num_tokens, 256), torch.float32)
        assert traced.takes_the_op
    assert len(traced.graphs) <= 2


def test_auto_on_hopper_takes_cluster(
    on_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(90)
    _mark_loaded("cluster")
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU)))
    traced(8)
    assert traced.takes(CLUSTER_OP)


def test_auto_on_hopper_without_the_kernel_is_sglangs_own_forward(
    on_gpu: Callable[[int], None],
) -> None:
    on_gpu(90)
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU)))
    traced(8)
    assert not traced.takes_a_kernel


@pytest.mark.parametrize("build", [sglang_gate, build_deepseek_v2_gate])
def test_a_forced_cluster_serves_every_m_in_one_graph(
    build: Callable[[torch.device], torch.nn.Module],
    on_gpu: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu(90)
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "cluster")
    _mark_loaded("cluster")
    traced = Tracer(_on_fake_cuda(build(CPU)))
    for num_tokens in (1, 2, 16, 17, 64, 128, 129, 300):
        logits = traced(num_tokens)
        assert (logits.shape, logits.dtype) == ((num_tokens, 256), torch.float32)
        assert traced.takes(CLUSTER_OP)
    assert len(traced.graphs) <= 2


def test_a_forced_flashinfer_is_taken_on_hopper(
    on_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(90)
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", "flashinfer")
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU)))
    traced(8)
    assert traced.takes_the_op


@pytest.mark.parametrize(
    "change", [{"shape": (384, 7168)}, {"shape": (128, 7168)}, {"dtype": torch.float32}]
)
def test_another_weight_is_sglangs_own_forward(
    change: dict[str, object], on_gpu: Callable[[int], None]
) -> None:
    on_gpu(100)
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU), **change))
    traced(8)
    assert not traced.takes_the_op


@pytest.mark.parametrize(("sm", "requested"), [(90, "auto"), (90, "cluster"), (100, "auto")])
def test_deterministic_inference_is_sglangs_own_forward(
    sm: int,
    requested: str,
    on_gpu: Callable[[int], None],
    publish_server_args: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu(sm)
    _mark_loaded("cluster")
    monkeypatch.setenv("SGLANG_ROUTER_GEMM_BACKEND", requested)
    gate = sglang_gate(CPU)
    traced = Tracer(_on_fake_cuda(gate))
    traced(8)
    assert traced.takes_a_kernel
    publish_server_args(enable_deterministic_inference=True)
    traced = Tracer(_on_fake_cuda(gate))
    traced(8)
    assert not traced.takes_a_kernel


@pytest.mark.parametrize("sm", [80, 89, 121, 130])
def test_auto_on_a_gpu_that_nobody_measured_is_sglangs_own_forward(
    sm: int, on_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(sm)
    _mark_loaded("cluster")
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU)))
    traced(8)
    assert not traced.takes_a_kernel


def test_a_context_parallel_prefill_is_sglangs_own_forward(on_gpu: Callable[[int], None]) -> None:
    on_gpu(100)
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU)))
    traced(8, forward_batch=SimpleNamespace(attn_cp_metadata=1))
    assert not traced.takes_the_op


def test_a_kernel_that_did_not_load_is_sglangs_own_forward(
    on_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(100)
    _mark_loaded("flashinfer", kernel="nvcc is missing")
    traced = Tracer(_on_fake_cuda(sglang_gate(CPU)))
    traced(8)
    assert not traced.takes_the_op


def test_a_static_m_beyond_the_kernel_is_sglangs_own_forward(
    on_gpu: Callable[[int], None],
) -> None:
    """As in `--enable-torch-compile`, which compiles each batch size by itself."""
    on_gpu(100)
    gate = _on_fake_cuda(sglang_gate(CPU))
    traced = Tracer(gate)
    traced(17)
    assert not traced.takes_the_op
    traced = Tracer(gate)
    traced(16)
    assert traced.takes_the_op
