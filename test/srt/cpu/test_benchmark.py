"""The benchmark without a GPU: its arguments, its arithmetic, its judgement, its reports."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import assert_refused

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmark" / "kernels" / "deepseek"
sys.path.insert(0, str(FOLDER))  # as where the script is run as a file

import benchmark_deepgemm_dsv3_router_gemm_blackwell as benchmark  # noqa: E402
from router_gemm_benchmark import accuracy, providers, report, timing  # noqa: E402
from router_gemm_benchmark.providers import (  # noqa: E402
    BF16_LOGITS,
    CAST_MATMUL,
    CUBLAS,
    FP32_LINEAR,
    FP32_WEIGHT,
    LINEAR,
    PLAIN,
    TF32_LINEAR,
    WITH_BIAS,
    Gemm,
    Provider,
    Skip,
    all_providers,
    environment,
    matmul_precision,
)

from sglang.srt.layers.moe_router.backends import BACKENDS, Backend  # noqa: E402
from sglang.srt.layers.moe_router.kernel import Form  # noqa: E402
from sglang.srt.layers.moe_router.models import MODELS  # noqa: E402
from sglang.srt.layers.moe_router.plan import Plan, make_plan  # noqa: E402
from sglang_router_gemm.routing import relative_error  # noqa: E402

CPU = torch.device("cpu")
N, K = 64, 512
FORMS = {"plain": PLAIN, "fp32": FP32_WEIGHT, "bf16": BF16_LOGITS, "bias": WITH_BIAS}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# What runs on a CPU, too.
ON_A_CPU = {
    PLAIN: {CAST_MATMUL, "F.linear (bf16 out)", "ours: torch"},
    FP32_WEIGHT: {FP32_LINEAR, TF32_LINEAR, "ours: torch"},
    BF16_LOGITS: {LINEAR, "ours: torch"},
    WITH_BIAS: {LINEAR, "ours: torch"},
}


def exact(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    return out.copy_(hidden_states.double() @ weight.double().t())


def provider(name: str, gemm: Gemm = exact, **fields: Any) -> Provider:
    return Provider(name, lambda: gemm, **fields)


# Arguments


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--num-tokens", "0"], "'0', must be 1 to 128"),
        (["--num-tokens", "1", "129"], "'129', must be 1 to 128"),
        (["--num-tokens", "many"], "'many'"),
        (["--num-experts", "100"], "N is '100', must be a multiple of 16 up to 1024"),
        (["--num-experts", "1040"], "N is '1040', must be a multiple of 16 up to 1024"),
        (["--hidden-dim", "2900"], "K is '2900', must be a multiple of 64 up to 8192"),
        (["--hidden-dim", "0"], "K is '0', must be a multiple of 64 up to 8192"),
        (["--hidden-dim", "wide"], "K is 'wide', must be"),
        (["--weight", "fp16"], "'fp16'"),
        (["--logits", "fp64"], "'fp64'"),
        (["--bias"], "--bias: it needs --logits bf16"),
        (["--bias", "--weight", "fp32"], "--bias: it needs --logits bf16"),
        (["--tp-sizes", "0"], "'0', must be 1 to 8"),
        (["--rounds", "-1"], "'-1'"),
        (["--providers", "nobody"], "'nobody'"),
        (["--weight", "fp32", "--providers", "vLLM"], "'vllm'"),  # it has bf16 ones alone
        (["--csv"], "--csv: it needs --save-path"),
        (["--svg"], "--svg: it needs --save-path"),
        (["--from-json", "no_such_file.json"], "no_such_file.json"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(benchmark.main, argv, named, capsys)


def test_the_help_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [benchmark.__file__])  # its name is in the usage
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    output = capsys.readouterr().out
    assert "a multiple of 16 up to 1024 (default: 256)" in " ".join(output.split())
    assert max(map(len, output.splitlines())) <= 80


def test_a_save_path_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        benchmark.main(["--save-path", str(tmp_path / "file")])
    assert "must be a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_gate_is_checked_and_nothing_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_router_gemm import check

    monkeypatch.setattr(check, "NUM_TOKENS", range(1, 3))
    assert benchmark.main(["--quick", "--tp-sizes", "2", "--num-experts", "256"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("No CUDA device: --tp-sizes, --quick are ignored.\n")
    assert "SGLang's MoEGate with the plugin" in output
    assert "Nothing was timed" in output
    monkeypatch.setattr(check, "run", lambda: 1)
    assert benchmark.main(["--check-only"]) == 1
    assert "ignored" not in capsys.readouterr().out
    benchmark.main(["--rounds", "3"])
    assert "No CUDA device: --rounds is ignored.\n" in capsys.readouterr().out


def test_a_python_that_lacks_a_module_is_told_in_one_line() -> None:
    # -S: without site-packages, as the Python of a machine where nothing is installed.
    done = subprocess.run(
        [sys.executable, "-S", benchmark.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No module named" in done.stderr
    assert ".venv/bin/python" in done.stderr


def test_the_provider_filter_takes_words() -> None:
    found = benchmark.filter_providers(all_providers(256, 7168, CPU), ["VLLM", "cublas"])
    assert [each.name for each in found] == ["vLLM ll_bf16", CUBLAS]


# Providers


def _names(form: Form, num_experts: int = N, hidden_size: int = K) -> list[str]:
    return [each.name for each in all_providers(num_experts, hidden_size, CPU, form)]


@every_form
def test_without_a_gpu_every_kernel_is_skipped_with_a_reason(form: Form) -> None:
    for each in all_providers(256, 7168, CPU, form):
        if each.name in ON_A_CPU[form]:
            each.build()
        else:
            with pytest.raises(Skip, match=r"no CUDA device|device is cpu"):
                each.build()


OURS = [f"ours: {name}" for name in BACKENDS]


def test_each_form_has_the_peers_that_serve_it() -> None:
    assert _names(PLAIN, 128, 7168) == [
        *("FlashInfer (bf16 out)", "FlashInfer tinygemm (bf16 out)", "sgl_kernel", "SGLang dsv3"),
        *("SGLang tiny_gemm", "SGLang MoEGate", "vLLM ll_bf16", CUBLAS, CAST_MATMUL),
        "F.linear (bf16 out)",
        *OURS,
    ]
    assert _names(FP32_WEIGHT, 128, 7168) == [
        *("SGLang tiny_gemm", "SGLang MoEGate", "SGLang router_gemv", "SGLang router_gate_matvec"),
        *("SGLang bf16x3", FP32_LINEAR, TF32_LINEAR, *OURS),
    ]
    linear = ["FlashInfer tinygemm", "SGLang tiny_gemm", LINEAR, *OURS]
    assert _names(BF16_LOGITS) == linear
    assert _names(BF16_LOGITS, 128, 7168) == ["FlashInfer", *linear]
    assert _names(WITH_BIAS, 128, 7168) == ["FlashInfer tinygemm", LINEAR, *OURS]


@every_form
def test_a_provider_has_the_form_it_was_asked_for(form: Form) -> None:
    for each in all_providers(N, K, CPU, form):
        assert each.dtype == form.dtype
        assert (each.bias is not None) == form.bias
        assert each.output == form.logits_dtype or (form == PLAIN and "bf16 out" in each.name)
        assert each.tf32 == (each.name == TF32_LINEAR)


def _tiny_gemm(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, max_m: int
) -> torch.Tensor:
    """As SGLang's."""
    return exact(hidden_states, weight, out, True)


def _tinygemm(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    use_pdl: bool = False,
) -> None:
    """As FlashInfer's: all in bf16, and it returns nothing."""
    assert weight.dtype == out.dtype == torch.bfloat16
    out.copy_(accuracy.reference(hidden_states, weight, bias))


def _fp32_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return accuracy.reference(hidden_states, weight).float()


KERNELS: dict[str, Callable[..., Any]] = {
    "tinygemm_bf16": _tinygemm,
    "tiny_gemm_bf16": _tiny_gemm,
    "router_gemv": _fp32_logits,
    "router_gate_matvec": _fp32_logits,
    "router_gemm_bf16x3_cublas": _fp32_logits,
}


@pytest.mark.parametrize(
    "form", [FP32_WEIGHT, BF16_LOGITS, WITH_BIAS], ids=["fp32", "bf16", "bias"]
)
def test_a_peer_is_called_as_its_library_wants_it(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_kernel", lambda device, *places: KERNELS[places[0][1]])
    monkeypatch.setattr(providers, "_declared", lambda kernel, device: None)
    torch.manual_seed(0)  # F.linear's bf16 logits are nearly off on a CPU
    for each in all_providers(N, K, CPU, form):
        if each.name == "SGLang MoEGate" or (each.ours and each.name != "ours: torch"):
            continue
        with torch.no_grad():
            found = accuracy.check(each, each.build(), 3, N, K, CPU)
        assert found.failure is None, each.name


@pytest.mark.parametrize(
    ("module", "name", "named"),
    [
        ("flashinfer.gemm", "tinygemm_bf16", ["use_pdl"]),
        ("sglang.kernels.ops.gemm.tiny_gemm", "tiny_gemm_bf16", ["max_m"]),
        ("sglang.kernels.ops.gemm.router_gemv", "router_gemv", []),
        ("sglang.kernels.ops.gemm.router_gemv", "router_gemm_bf16x3_cublas", []),
        ("sglang.kernels.ops.gemm.router_gate_matvec", "router_gate_matvec", []),
    ],
)
def test_a_stand_in_has_its_librarys_signature(module: str, name: str, named: list[str]) -> None:
    theirs = inspect.signature(getattr(importlib.import_module(module), name))
    taken = len(inspect.signature(KERNELS[name]).parameters) - len(named)
    theirs.bind(*range(taken), **dict.fromkeys(named))


def test_what_a_peer_does_not_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_kernel", lambda device, *places: KERNELS[places[0][1]])

    def find(name: str, num_experts: int, hidden_size: int) -> Provider:
        found = all_providers(num_experts, hidden_size, CPU, FP32_WEIGHT)
        return next(each for each in found if each.name == f"SGLang {name}")

    with pytest.raises(Skip, match="K % 128 = 0"):
        find("router_gemv", 128, 2880).build()
    with pytest.raises(Skip, match="N < K only"):
        find("tiny_gemm", 512, 512).build()
    for name in ("router_gemv", "router_gate_matvec"):
        assert find(name, N, K).supports(8) is None
        assert find(name, N, K).supports(9) == "M is 9, must be 1 to 8"


def test_moegate_is_built_with_the_weights_that_it_is_timed_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_router_gemm import check

    monkeypatch.setattr(providers, "_need_cuda", lambda device: None)
    gate = next(each for each in all_providers(N, K, CPU, FP32_WEIGHT) if "MoEGate" in each.name)
    with torch.no_grad():
        assert accuracy.check(gate, gate.build(), 3, N, K, CPU).failure is None
    older = check.sglang_gate(CPU, N, K)
    monkeypatch.setattr(check, "sglang_gate", lambda *args: older)
    with pytest.raises(Skip, match=r"this release keeps the weight in torch\.bfloat16"):
        gate.build()


def test_a_product_of_casts_is_right() -> None:
    (cast_matmul,) = (each for each in all_providers(N, K, CPU) if each.name == CAST_MATMUL)
    with torch.no_grad():
        found = accuracy.check(cast_matmul, cast_matmul.build(), 3, N, K, CPU)
    assert found.failure is None


@pytest.mark.parametrize(("name", "precision"), [(FP32_LINEAR, "highest"), (TF32_LINEAR, "high")])
def test_the_precision_is_set_around_a_call_alone(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((torch.get_float32_matmul_precision(), hidden_states.dtype, weight.dtype))
        raise ZeroDivisionError

    peers = {each.name: each for each in all_providers(N, K, CPU, FP32_WEIGHT)}
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    hidden_states, weight = accuracy.make_inputs("random", 1, N, K, CPU, torch.float32)
    gemm = peers[name].build()
    for before in ("highest", "medium"):
        with matmul_precision(before):
            with pytest.raises(ZeroDivisionError):
                gemm(hidden_states, weight, torch.zeros(1, N), True)
            assert torch.get_float32_matmul_precision() == before
    assert seen == [(precision, torch.float32, torch.float32)] * 2
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_later_backend_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    later = replace(BACKENDS["torch"], name="later", measured_sms=(120,))
    monkeypatch.setitem(cast("dict[str, Backend]", BACKENDS), "later", later)
    found = {each.name: each for each in all_providers(256, 7168, CPU)}
    assert found["ours: later"].own_kernel
    assert found["ours: later"].build() is not None
    own = {name for name, each in found.items() if each.own_kernel}
    assert own == {"ours: cluster", "ours: later"}


@every_form
def test_names_are_told_apart_at_every_shape(form: Form) -> None:
    for model in MODELS:
        names = _names(form, model.num_experts, model.hidden_size)
        assert len(names) == len(set(names))


def test_every_model_of_the_table_can_be_asked_for() -> None:
    for model in MODELS:
        shape = ["--num-experts", str(model.num_experts), "--hidden-dim", str(model.hidden_size)]
        arguments = benchmark.build_parser().parse_args(shape)
        assert (arguments.num_experts, arguments.hidden_dim) == model[1:3]


def _spied_plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, bool]]:
    """What each plan of ours is made for from now on: the backend, and whether with PDL."""
    made = []

    def make(weight: torch.Tensor, requested: str | None = None, **gate: Any) -> Plan:
        plan = make_plan(weight, requested, **gate)
        made.append((requested, plan.pdl))
        return plan

    monkeypatch.setattr(providers, "make_plan", make)
    return made


def _ours(name: str, form: Form = PLAIN) -> Provider:
    return next(each for each in all_providers(N, K, CPU, form) if each.name == f"ours: {name}")


def test_our_backend_is_planned_with_pdl_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _spied_plans(monkeypatch)
    used = []

    def logits(plan: Plan, *args: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        used.append((plan.requested, plan.pdl))
        return torch.zeros(1, N)

    gemm = _ours("torch").build()
    assert made == [("torch", True), ("torch", False)]
    monkeypatch.setattr(Plan, "logits", logits)
    for pdl in (True, False, True):
        gemm(torch.zeros(1, K), torch.zeros(N, K), torch.zeros(1, N), pdl)
    assert used == [("torch", True), ("torch", False), ("torch", True)]


def test_a_call_of_ours_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = _ours("torch").build()
    hidden_states, weight = accuracy.make_inputs("random", 3, N, K, CPU)
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(os, "environ", None)  # whoever reads it now raises
        logits = gemm(hidden_states, weight, torch.zeros(3, N), True)
    expected = accuracy.reference(hidden_states, weight)
    assert relative_error(logits, expected) < 1e-6


def test_a_call_that_our_plan_leaves_to_sglang_is_an_error() -> None:
    gemm = _ours("torch").build()
    with pytest.raises(RuntimeError, match=r"did not take torch: hidden_states is torch\.float32"):
        gemm(torch.zeros(1, K), torch.zeros(N, K, dtype=torch.bfloat16), torch.zeros(1, N), True)


@every_form
def test_our_plan_is_of_the_form(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _ours("torch", form)
    made = []

    def make(weight: torch.Tensor, requested: str, **gate: Any) -> Plan:
        made.append(gate)
        return make_plan(weight, requested, **gate)

    monkeypatch.setattr(providers, "make_plan", make)
    with torch.no_grad():
        assert accuracy.check(ours, ours.build(), 3, N, K, CPU).failure is None
    assert made == [{"own_logits_dtype": form.logits_dtype, "bias": ours.bias}] * 2


def test_what_cannot_be_served_says_so() -> None:
    cluster = _ours("cluster")
    assert "device is cpu" in str(cluster.supports(1))
    assert _ours("torch").supports(100_000) is None


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_ENABLE_PDL", "1")
    with (
        pytest.raises(ZeroDivisionError),
        environment(TRTLLM_ENABLE_PDL="0", SGLANG_ROUTER_GEMM_PDL="0"),
    ):
        raise ZeroDivisionError
    assert os.environ["TRTLLM_ENABLE_PDL"] == "1"
    assert "SGLANG_ROUTER_GEMM_PDL" not in os.environ


# Accuracy


def off_by_one_expert(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    return exact(hidden_states, weight.roll(1, 0), out, pdl)


def last_row_unwritten(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    exact(hidden_states[:-1], weight, out[:-1], pdl)
    return out


def last_expert_unwritten(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    exact(hidden_states, weight[:-1], out[:, :-1], pdl)
    return out


def smallest_rows_lost(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    """What an fp16 accumulator does to rows of very different scale."""
    tiny = hidden_states.abs().amax(dim=1, keepdim=True) < 2.0**-14
    return exact(hidden_states.masked_fill(tiny, 0), weight, out, pdl)


def summed_in_bf16(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    halves = [
        (h.double() @ w.double().t()).bfloat16().double()
        for h, w in zip(hidden_states.chunk(2, 1), weight.chunk(2, 1), strict=True)
    ]
    return out.copy_(halves[0] + halves[1])


def wrong_without_pdl(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    return exact(hidden_states if pdl else hidden_states * 2, weight, out, pdl)


def raises(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    raise RuntimeError("nvcc not found\nand much more")


def wrong_dtype(
    hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
) -> torch.Tensor:
    return exact(hidden_states, weight, out, pdl).bfloat16()


def test_a_right_provider_passes_everything() -> None:
    found = accuracy.check(provider("exact"), exact, 4, N, K, CPU)
    assert found.failure is None
    assert list(found.relative) == list(accuracy.KINDS)
    assert found.top8_agreement == 1.0
    assert max(found.scaled.values()) < 1e-6


@pytest.mark.parametrize(
    ("gemm", "reason"),
    [
        (off_by_one_expert, "on random inputs"),
        (last_row_unwritten, "error inf on random"),
        (last_expert_unwritten, "error inf on random"),
        (smallest_rows_lost, "on scale inputs"),
        (summed_in_bf16, "on random inputs"),
        (wrong_without_pdl, "on random inputs"),
        (wrong_dtype, "logits are torch.bfloat16"),
        (raises, "RuntimeError: nvcc not found"),
    ],
)
def test_a_wrong_provider_is_caught(gemm: Gemm, reason: str) -> None:
    found = accuracy.check(provider("wrong"), gemm, 4, N, K, CPU)
    assert found.failure is not None
    assert reason in found.failure
    assert "\n" not in found.failure


def test_bf16_logits_pass_as_bf16_only() -> None:
    bf16 = provider("bf16", output=torch.bfloat16)
    found = accuracy.check(bf16, exact, 4, N, K, CPU)
    assert found.failure is None
    assert 1e-4 < found.relative["random"] < 2**-8
    assert found.top8_agreement is not None
    assert 0.5 < found.top8_agreement < 1.0


def rounded_to(bits: int) -> Gemm:
    """A GEMM that keeps so many bits of a weight's mantissa, and cuts the rest off."""

    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        kept = weight.view(torch.int32) >> (23 - bits) << (23 - bits)
        return exact(hidden_states, kept.view(torch.float32), out, pdl)

    return gemm


@pytest.mark.parametrize(
    ("bits", "tf32", "right"), [(23, False, True), (10, False, False), (10, True, True)]
)
def test_tf32_passes_as_tf32_only(bits: int, tf32: bool, right: bool) -> None:
    it = provider("it", dtype=torch.float32, tf32=tf32)
    assert (accuracy.check(it, rounded_to(bits), 4, N, K, CPU).failure is None) == right


def test_a_weight_that_was_rounded_to_bf16_is_caught() -> None:
    for tf32 in (False, True):
        it = provider("it", dtype=torch.float32, tf32=tf32)
        found = accuracy.check(it, rounded_to(7), 4, N, K, CPU)
        assert "on random inputs" in str(found.failure)


def with_bias(bias: torch.Tensor, scale: float = 1.0) -> Gemm:
    def gemm(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        return out.copy_(accuracy.reference(hidden_states, weight, scale * bias))

    return gemm


def test_a_bias_must_be_added() -> None:
    bias = torch.randn(N, dtype=torch.bfloat16)
    it = provider("it", bias=bias, output=torch.bfloat16)
    found = accuracy.check(it, with_bias(bias), 4, N, K, CPU)
    assert found.failure is None
    assert max(found.scaled.values()) < 2**-8
    assert found.top8_agreement is not None
    assert found.top8_agreement > 0.5
    for wrong in (exact, with_bias(bias, 0.9), with_bias(bias.roll(1))):
        assert "on random inputs" in str(accuracy.check(it, wrong, 4, N, K, CPU).failure)
    assert accuracy.check(provider("it"), with_bias(bias), 4, N, K, CPU).failure is not None


@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_fp32_weights_are_not_bf16_ones_in_fp32(kind: str) -> None:
    hidden_states, weight = accuracy.make_inputs(kind, 4, N, K, CPU, torch.float32)
    assert (hidden_states.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    assert (weight != weight.bfloat16()).double().mean() > 0.9


def test_the_hard_inputs_are_hard() -> None:
    rows, _ = accuracy.make_inputs("scale", 16, N, K, CPU)
    assert rows.double().norm(dim=1).max() / rows.double().norm(dim=1).min() > 2**50
    rows, weight = accuracy.make_inputs("cancel", 16, N, K, CPU)
    terms = rows.double().abs() @ weight.double().abs().t()
    assert (accuracy.reference(rows, weight).abs() / terms).median() < 0.02
    rows, weight = accuracy.make_inputs("hot", 16, N, K, CPU)
    assert weight.double().norm(dim=1).max() / weight.double().norm(dim=1).median() > 50


def test_bits_that_depend_on_m_are_seen() -> None:
    rows, weight = accuracy.make_inputs("random", 8, N, K, CPU)

    def regime(
        hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        exact(hidden_states, weight, out, pdl)
        return out.nextafter(out + 1) if len(hidden_states) > 4 else out

    num_tokens = [1, 2, 4, 5, 8]
    for gemm, changes in ((exact, []), (regime, [5])):
        bits = accuracy.bits_by_num_tokens(provider("it"), gemm, num_tokens, rows, weight)
        assert accuracy.bits_change_at(bits) == changes


# Timing


def test_bytes_and_floor() -> None:
    weight, tokens, logits = 256 * 7168 * 2, 16 * 7168 * 2, 16 * 256 * 4
    moved = timing.bytes_moved(provider("it"), 16, 256, 7168)
    assert moved == weight + tokens + logits == 3_915_776
    bf16 = provider("it", output=torch.bfloat16)
    assert timing.bytes_moved(bf16, 16, 256, 7168) == moved - logits // 2
    biased = replace(bf16, bias=torch.zeros(256, dtype=torch.bfloat16))
    assert timing.bytes_moved(biased, 16, 256, 7168) == moved - logits // 2 + 512
    fp32 = provider("it", dtype=torch.float32)
    assert timing.bytes_moved(fp32, 16, 256, 7168) == moved + weight
    found = timing.make_timing(provider("it"), "cold", 16, 256, 7168, (2.0, 2.5, 3.0), 3000.0)
    assert found.floor_us == pytest.approx(1.3053, abs=1e-4)
    assert found.gb_s == pytest.approx(1566.3, abs=0.1)
    assert found.times_floor == pytest.approx(2.5 / 1.3053, abs=1e-3)


def test_no_graph_always_follows_the_same_other() -> None:
    names = ["", "a", "b", "c", "d"]
    orders = timing.replay_orders(names, 50, seed=8)
    assert all(sorted(order) == names for order in orders)
    ahead_of_c = {order[order.index("c") - 1] for order in orders if order[0] != "c"}
    assert ahead_of_c == set(names) - {"c"}
    assert timing.replay_orders(names, 50, seed=8) == orders


@pytest.mark.parametrize("mode", timing.MODES)
def test_no_weight_is_in_l2_when_a_sample_starts_but_in_warm(
    mode: timing.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Event:
        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 1.0

    class Logged:
        def replay(self) -> None:
            done.append("replay")

        def empty_l2(self) -> None:
            done.append("empty L2")

    run = object.__new__(timing._ModeRun)
    run.__dict__ |= {"bench": Logged(), "num_tokens": 1, "mode": mode, "host_us": 0.0}
    run.graphs = {"a": Logged(), "b": Logged()}
    monkeypatch.setattr(timing, "_event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run.replay(rounds=2, cycles_per_us=1.0)
    sample = ["wait", "event", "replay", "event"]
    assert done == 4 * (sample if mode.name == "warm" else ["empty L2", *sample])


def test_quartiles() -> None:
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)


def test_a_link_is_the_chain_less_the_median_producer() -> None:
    chain, producer = [58 * 4.0, 58 * 5.0, 58 * 9.0], [58 * 1.0, 58 * 2.0, 58 * 50.0]
    assert timing.per_link(chain, producer) == [2.0, 3.0, 7.0]
    assert timing.per_link(chain, None) == [4.0, 5.0, 9.0]


def _timing(name: str, num_tokens: int, us: float, mode: str = "chain") -> timing.Timing:
    quartiles = (us - 0.1, us, us + 0.1)
    return timing.make_timing(provider(name), mode, num_tokens, 256, 7168, quartiles, 3000.0)


def test_the_slowest_rank_counts_and_only_where_all_ranks_have_it() -> None:
    ranks = [[_timing("a", 1, 2.0), _timing("b", 1, 9.0)], [_timing("a", 1, 3.0)]]
    (found,) = timing.slowest(ranks)
    assert (found.provider, found.median_us, found.q25_us, found.tp_size) == ("a", 3.0, 2.9, 2)


# The whole run, on a stand-in for the GPU


class _Graph:
    def __init__(self, calls: Callable[[], object]) -> None:
        self.replay = calls


class _Event:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


def _capture(calls: Callable[[], object]) -> _Graph:
    calls()
    return _Graph(calls)


def _norm(
    rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, enable_pdl: bool
) -> None:
    residual += rows
    rows.copy_(torch.nn.functional.rms_norm(residual, weight.shape, weight, eps))


@pytest.fixture
def on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs that call again, and the host's clock: the flow of a run, not its numbers."""
    monkeypatch.setattr(timing, "LINKS", 3)
    monkeypatch.setattr(timing, "_capture", _capture)
    monkeypatch.setattr(timing, "_event", _Event)
    monkeypatch.setattr(timing, "_cycles_per_us", lambda: 1.0)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 3000.0)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1024)
    monkeypatch.setattr(timing, "load_producer", lambda hidden_size: (_norm, "a stand-in"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        timing.Bench,
        "do_bench",
        lambda self, candidate, m: _timing(candidate[0].name, m, 9.0, timing.DO_BENCH),
    )
    with torch.no_grad():
        yield


def _run(
    providers: list[Provider], save_path: Path | None = None, argv: Sequence[str] = ()
) -> tuple[int, dict[str, Any]]:
    arguments = benchmark.build_parser().parse_args(argv)
    arguments.num_experts, arguments.hidden_dim = N, K
    results = benchmark.empty_results(arguments, [1, 3], 4, "a test")
    results["gpu"] = "NVIDIA H100 80GB HBM3"
    status = benchmark.run(results, providers, [1, 2], CPU, save_path, check_only=False)
    benchmark.show(results, save_path, csv=False, svg=False)
    return status, results


class _WrongInTheGraph:
    """Right when it is called by hand; once captured, it reads the tokens of before."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        captured = sys._getframe(1).f_code.co_name == "calls"
        tokens = self.tokens if captured and self.tokens is not None else hidden_states
        self.tokens = hidden_states.clone()
        return exact(tokens, weight, out, pdl)


class _RaisesInTheGraph:
    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        if sys._getframe(1).f_code.co_name == "calls":
            raise RuntimeError("operation not permitted when stream is capturing")
        return exact(hidden_states, weight, out, pdl)


@pytest.mark.usefixtures("on_a_stand_in")
def test_a_run_marks_what_fails_and_times_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Gemm:
        raise ImportError("No module named 'vllm'")

    status, results = _run(
        [
            provider("good"),
            provider("small", supports=lambda m: None if m < 2 else "M is too large"),
            provider("wrong", off_by_one_expert),
            provider("stale", _WrongInTheGraph()),
            provider("broken", _RaisesInTheGraph()),
            Provider("absent", absent),
            provider(CUBLAS, pdl="never"),
        ],
        tmp_path,
    )
    assert status == 0
    assert results["error"] is None
    for mode in timing.MODE_NAMES:
        timed = {
            (each["provider"], each["num_tokens"])
            for each in results["timings"]
            if each["mode"] == mode
        }
        assert {("good", 1), ("good", 3), ("small", 1), (CUBLAS, 3)} <= timed
        assert not timed & {("small", 3), ("wrong", 1), ("absent", 1)}
        assert not timed & {("broken", 1), ("stale", 1)}
    reasons = {each["provider"]: each["reason"] for each in results["failures"]}
    assert "stream is capturing" in reasons["broken"]
    assert "off by" in reasons["stale"]
    assert results["not_run"] == [{"tp_size": 2, "reason": "1 GPU here"}]
    output = capsys.readouterr().out
    assert "not run: 1 GPU here" in output
    assert "skipped: ImportError: No module named 'vllm'" in output
    assert "FAILED at M = 1" in output
    stem = f"h100_n{N}_k{K}"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{stem}{end}" for end in (".json", "_chain.png", "_speedup.png")}
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == results


def in_place(one: Provider) -> Provider:
    """The same, but that its logits are where they were before: a stand-in's replay calls again."""

    def make() -> Gemm:
        gemm = one.build()
        return lambda h, weight, out, pdl: out.copy_(gemm(h, weight, out, pdl))

    return replace(one, make=make)


class _NoBiasInTheGraph:
    """It adds its bias when it is called by hand."""

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        captured = sys._getframe(1).f_code.co_name == "calls"
        bias = None if captured else self.bias
        return out.copy_(accuracy.reference(hidden_states, weight, bias))


ARGUMENTS = {
    FP32_WEIGHT: ("_fp32", ["--weight", "fp32"]),
    BF16_LOGITS: ("_bf16_logits", ["--logits", "bf16"]),
    WITH_BIAS: ("_bf16_logits_bias", ["--logits", "bf16", "--bias"]),
}


@pytest.mark.usefixtures("on_a_stand_in")
@pytest.mark.parametrize("form", ARGUMENTS, ids=["fp32", "bf16", "bias"])
def test_a_run_of_another_form(form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    real = timing.Bench.measure

    def measure(self: timing.Bench, *rest: Any) -> Any:
        used.add(self.weights.dtype)
        return real(self, *rest)

    monkeypatch.setattr(timing.Bench, "measure", measure)
    torch.manual_seed(0)  # F.linear's bf16 logits are nearly off on a CPU
    suffix, argv = ARGUMENTS[form]
    found = [in_place(each) for each in all_providers(N, K, CPU, form)]
    if form.bias:
        gemm = _NoBiasInTheGraph(found[0].bias)
        found.append(replace(found[0], name="forgets", make=lambda: gemm))
    status, results = _run(found, tmp_path, argv)
    assert (status, results["error"]) == (0, None)
    assert used == {form.dtype}
    timed = {each["provider"] for each in results["timings"] if each["mode"] == "chain"}
    assert timed == ON_A_CPU[form]
    assert {each["mode"] for each in results["timings"]} == set(timing.MODE_NAMES)
    failed = {each["provider"] for each in results["failures"]}
    assert failed == ({"forgets"} if form.bias else set())
    assert report.form_of(results) == form
    tf32 = [each["name"] for each in results["providers"] if "tf32" in each]
    assert tf32 == ([TF32_LINEAR] if form == FP32_WEIGHT else [])
    stem = f"h100_n{N}_k{K}{suffix}"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{stem}{end}" for end in (".json", "_chain.png", "_speedup.png")}
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == results


def test_every_rank_measures_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    class Bench:
        producer = None

        def __init__(self, *given: Any) -> None:
            self.dtype = given[-1]

        def measure(self, ready: Any, *rest: Any) -> Any:
            used.append(({each.provider.name for each in ready}, self.dtype))
            return [], []

    monkeypatch.setattr(timing, "Bench", Bench)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    work = timing.Work({1: [TF32_LINEAR]}, N, K, 3, FP32_WEIGHT)
    timing._time_rank(cast("Any", threading.Barrier(1)), 0, work)
    assert used == [({TF32_LINEAR}, torch.float32)] * 3
    used.clear()
    timing._time_rank(cast("Any", threading.Barrier(1)), 0, work._replace(modes=["warm"]))
    assert len(used) == 1


@pytest.mark.usefixtures("on_a_stand_in")
def test_only_the_modes_that_were_asked_for() -> None:
    for mode in ("warm", timing.DO_BENCH):
        _, results = _run([provider("good")], argv=["--modes", mode])
        assert results["modes"] == [mode]
        assert {each["mode"] for each in results["timings"]} == {mode}


@pytest.mark.usefixtures("on_a_stand_in")
def test_a_failure_of_ours_is_exit_1() -> None:
    status, _ = _run([provider("good"), provider("ours: it", off_by_one_expert, ours=True)])
    assert status == 1


@pytest.mark.usefixtures("on_a_stand_in")
def test_what_was_found_is_written_though_the_run_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = timing.Bench.measure

    def dies(self: timing.Bench, candidates: Any, num_tokens: int, *rest: Any) -> Any:
        if num_tokens == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, candidates, num_tokens, *rest)

    monkeypatch.setattr(timing.Bench, "measure", dies)
    status, _ = _run([provider("good")], tmp_path)
    assert status == 1
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    assert "illegal memory access" in saved["error"]
    assert {each["num_tokens"] for each in saved["timings"]} == {1}
    assert "The run ended early" in capsys.readouterr().err


@pytest.mark.usefixtures("on_a_stand_in")
def test_no_producer_no_chain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "load_producer", lambda hidden_size: (None, "no nvcc"))
    status, results = _run([provider("good")])
    assert status == 0
    assert {each["mode"] for each in results["timings"]} == set(timing.MODE_NAMES) - {"chain"}
    assert results["producer"] == "no nvcc"
    assert "'chain' is not measured" in capsys.readouterr().out


# Reports


@pytest.fixture
def results() -> dict[str, Any]:
    arguments = benchmark.build_parser().parse_args([])
    found = benchmark.empty_results(arguments, [1, 16], 50, "a test")
    found["gpu"] = "NVIDIA H100 80GB HBM3"
    fields = {"output": "float32", "note": "", "skipped": None}
    found["providers"] = [
        fields | {"name": name, "pdl": pdl, "ours": own, "own_kernel": own}
        for name, pdl, own in (
            ("FlashInfer", "switch", False),
            (CUBLAS, "never", False),
            ("vLLM", "always", False),
            ("ours: cluster", "switch", True),
        )
    ]
    for mode, offset in (("chain", 0.0), ("warm", -0.5)):
        for num_tokens, us in ((1, (2.6, 7.0, 2.7, 2.5)), (16, (6.2, 7.2, 4.2, 3.0))):
            for each, median in zip(found["providers"], us, strict=True):
                one = _timing(each["name"], num_tokens, median + offset, mode)
                found["timings"].append(asdict(one))
    found["accuracy"] = [
        asdict(accuracy.Accuracy("FlashInfer", 16, {"random": 2e-7}, {"random": 3e-7}, 1.0))
    ]
    return found


@pytest.mark.parametrize(
    ("gpu", "shape", "stem"),
    [
        ("NVIDIA H100 80GB HBM3", (256, 7168), "h100"),
        ("NVIDIA H200", (256, 7168), "h200"),
        ("NVIDIA GB200", (384, 7168), "gb200_n384_k7168"),
        ("NVIDIA GeForce RTX 5090", (256, 7168), "geforce-rtx-5090"),
    ],
)
def test_files_are_named_after_the_gpu(gpu: str, shape: tuple[int, int], stem: str) -> None:
    assert report.file_stem(gpu, *shape) == stem
    for form, (suffix, _) in ARGUMENTS.items():
        assert report.file_stem(gpu, *shape, form) == stem + suffix


@pytest.fixture
def older(results: dict[str, Any]) -> dict[str, Any]:
    """A file from before there were forms."""
    return {key: each for key, each in results.items() if key not in ("weight", "logits", "bias")}


def test_an_older_file_is_of_the_plain_form(
    results: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    assert len(older) == len(results) - 3
    assert report.form_of(results) == report.form_of(older) == PLAIN
    assert report.summary(older) == report.summary(results)
    assert [path.name for path in report.save_plots(older, tmp_path)] == [
        "h100_chain.png",
        "h100_speedup.png",
    ]


def test_what_is_held_to_tf32_says_so(results: dict[str, Any]) -> None:
    said = "FlashInfer: right to TF32's 10 bits, within 1e-03 of fp64"
    assert said not in report.accuracy_table(results)
    results["providers"][0]["tf32"] = True
    assert said in report.accuracy_table(results)


@pytest.mark.parametrize(
    ("form", "base", "said"),
    [
        ({"weight": "float32"}, FP32_LINEAR, "fp32 weight; lower"),
        ({"logits": "bfloat16"}, LINEAR, "bf16 inputs, bf16 logits; lower"),
        ({"logits": "bfloat16", "bias": True}, LINEAR, "bf16 inputs, bf16 logits, bias; lower"),
    ],
)
def test_a_plot_says_the_form_and_who_is_1(
    results: dict[str, Any], tmp_path: Path, form: dict[str, Any], base: str, said: str
) -> None:
    renamed = json.loads(json.dumps(results).replace(CUBLAS, base)) | form
    plots = [path.with_suffix(".svg") for path in report.save_plots(renamed, tmp_path, svg=True)]
    assert said in plots[0].read_text()
    assert f"times as fast as {base}" in plots[-1].read_text()


def test_csv(results: dict[str, Any], tmp_path: Path) -> None:
    with report.save_csv(results, tmp_path).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["timings"])
    row = next(
        each
        for each in rows
        if each["provider"] == "FlashInfer"
        and each["num_tokens"] == "16"
        and each["mode"] == "chain"
    )
    assert row["median_us"] == "6.2"
    assert row["relative_error"] == "2e-07"
    assert row["output"] == "float32"
    assert float(row["floor_us"]) == pytest.approx(1.305, abs=1e-3)


def test_plots_show_providers_floor_gpu_and_mode(results: dict[str, Any], tmp_path: Path) -> None:
    saved = report.save_plots(results, tmp_path)
    assert [path.name for path in saved] == ["h100_chain.png", "h100_speedup.png"]
    assert all(path.stat().st_size > 10_000 for path in saved)
    assert saved[0].read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_svg_is_the_same_each_time_and_names_what_is_in_it(
    results: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        saved = report.save_plots(results, folder, svg=True)
        assert [path.suffix for path in saved] == [".png", ".svg"] * 2
        found.append(saved[1].read_text())
    assert found[0] == found[1]
    for text in ("NVIDIA H100 80GB HBM3", "ours: cluster", CUBLAS, "floor", "lower is better"):
        assert f"<!-- {text}" in found[0] or text in found[0]


def test_a_json_gives_tables_plots_csv_and_svg_again(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = report.save_json(results, tmp_path / "run")
    argv = ["--from-json", str(written), "--save-path", str(tmp_path / "again")]
    assert benchmark.main(argv) == 0
    plots = {"h100_chain.png", "h100_speedup.png"}
    assert {path.name for path in (tmp_path / "again").iterdir()} == plots
    assert report.summary(results) in capsys.readouterr().out
    assert benchmark.main([*argv, "--csv", "--svg"]) == 0
    more = {"h100.csv", "h100_chain.svg", "h100_speedup.svg"}
    assert {path.name for path in (tmp_path / "again").iterdir()} == plots | more


def test_the_table_names_the_fastest_and_the_ratio(results: dict[str, Any]) -> None:
    lines = report.mode_table(results, "chain", tablefmt="github").splitlines()
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["16", "6.20", "7.20", "4.20", "3.00", "ours: cluster", "1.40"]
    # bf16 logits are not the same result: they neither win nor count as the best peer.
    results["providers"][2]["output"] = "bfloat16"
    assert report.mode_table(results, "chain", tablefmt="github").endswith("| 2.07               |")
    for each in results["providers"]:
        each["own_kernel"] = False
    assert "best peer" not in report.mode_table(results, "chain")


def test_where_bf16_logits_are_asked_for_they_are_the_result(results: dict[str, Any]) -> None:
    for each in results["providers"]:
        each["output"] = "bfloat16"
    results["logits"] = "bfloat16"
    lines = report.mode_table(results, "chain", tablefmt="github").splitlines()
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["16", "6.20", "7.20", "4.20", "3.00", "ours: cluster", "1.40"]


def test_a_star_where_pdl_stays_on(results: dict[str, Any]) -> None:
    assert "vLLM *" in report.mode_table(results, "warm", tablefmt="github")
    assert "vLLM *" not in report.mode_table(results, "chain", tablefmt="github")


def test_the_summary_fits_and_ends_with_the_headline(results: dict[str, Any]) -> None:
    lines = report.summary(results).splitlines()
    assert lines[-1].split()[0] == "16"
    assert "chain, µs:" in lines
    assert "warm, µs:" not in lines


RESULTS = FOLDER / "results"
RUNS = [file for file in sorted(RESULTS.rglob("*.json")) if "timings" in file.read_text()]


@pytest.mark.parametrize("file", RUNS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_table_fits_a_terminal(file: Path) -> None:
    found = json.loads(file.read_text())
    lines = (report.summary(found) + "\n" + report.detail_table(found)).splitlines()
    assert [line for line in lines if len(line) > report.WIDTH] == []


def test_a_wide_table_is_folded_and_nothing_is_lost() -> None:
    found = json.loads((RESULTS / "h200.json").read_text())
    wide = report.mode_table(found, "chain", tablefmt="github").splitlines()
    parts = report.mode_table(found, "chain").split("\n\n")
    assert len(parts) > 1
    assert {part.splitlines()[-1].split()[0] for part in parts} == {"16"}
    shown = [cell for part in parts for cell in part.splitlines()[-1].split()[1:]]
    assert " ".join(shown) == " ".join(wide[-1].replace("|", " ").split()[1:])


def test_results_are_json_and_the_pictures_that_a_page_shows() -> None:
    pages = [ROOT / "README.md", RESULTS / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "\n".join(page.read_text() for page in pages)
    for file in RESULTS.rglob("*"):
        if file.is_file() and file.name != "README.md":
            assert file.suffix in (".json", ".png"), file
            place = file.relative_to(RESULTS).as_posix()
            assert file.suffix != ".png" or f"results/{place})" in shown, file
