"""The benchmark of the routing without a GPU: its judgement, its arithmetic, its table."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import assert_refused

FOLDER = Path(__file__).resolve().parents[3] / "benchmark" / "kernels" / "deepseek"
sys.path.insert(0, str(FOLDER))  # as where the script is run as a file

import benchmark_route as benchmark  # noqa: E402
from benchmark_route import (  # noqa: E402
    GATE,
    MODEL,
    NAMES,
    OURS,
    OURS_ALIGN,
    SCALE_FUSED,
    SGLANG,
    SGLANG_ALIGN,
    TRITON,
    Call,
    Layers,
    Microseconds,
    Report,
    Route,
    make_route,
    why_plan_wrong,
    why_wrong,
)
from router_gemm_benchmark import timing  # noqa: E402
from router_gemm_benchmark.providers import Provider, Skip  # noqa: E402

from cpu.test_benchmark import exact, on_a_stand_in  # noqa: E402, F401
from sglang.srt.layers.moe_router.models import MODELS  # noqa: E402
from sglang_router_gemm.routing import agreement, grouped_topk  # noqa: E402

CPU = torch.device("cpu")
# SGLang looks for a GPU when it is imported, and then routes on it alone.
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# The table, and what it is made from


@pytest.fixture
def report() -> Report:
    """All of M and all providers, with numbers that nobody measured."""
    found = Report(
        gpu="NVIDIA H100 80GB HBM3",
        driver="1.2.3",
        versions={"sglang": "0.5.23", "vllm": None},
        date="2026-01-01T00:00:00+00:00",
        command="a test",
        num_tokens=list(benchmark.NUM_TOKENS),
        rounds=7,
        links=58,
        model="Kimi-K2",
        skipped={"nobody": "because " * 30},
    )
    for m in found.num_tokens:
        for place, name in enumerate((GATE, *NAMES)):
            median = m + place / 10
            found.us.append(Microseconds(name, m, median - 1, median, median + 1000))
    found.failures.append(timing.Failure(OURS, "chain", 128, "made up"))
    return found


def test_a_json_gives_the_same_report_and_the_same_table(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "route.json"
    file.write_text(json.dumps(asdict(report)))
    assert benchmark.load(file) == report
    assert benchmark.main(["--from-json", str(file)]) == 0
    assert capsys.readouterr().out == benchmark.table(report) + "\n"
    older = {name: value for name, value in asdict(report).items() if name != "model"}
    file.write_text(json.dumps(older))
    assert benchmark.load(file) == replace(report, model="DeepSeek-V3")


def test_the_table_has_every_median_in_its_place(report: Report) -> None:
    report.us = [each for each in report.us if (each.provider, each.num_tokens) != (TRITON, 24)]
    lines = benchmark.table(report).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line[:1].isdigit()}
    assert list(cells) == [str(m) for m in report.num_tokens]
    assert cells["1"] == ["1.00", "1.10", "1.20", "1.30", "1.40", "1.50", "1.60", "1.70"]
    assert cells["24"] == ["24.00", "24.10", "24.30", "24.40", "24.50", "24.60", "24.70"]
    assert " ".join(lines[0].split()) == "M gate FlashInfer SGLang vLLM SGLang SGLang ours: ours:"
    header = " ".join(lines[:4])
    for name in (GATE, *NAMES):
        assert all(word in header for word in re.split(r"topk_|moe_| ", name)), name


def test_the_table_names_all_in_100_columns(report: Report) -> None:
    for each in report.us:
        each.median_us = -123.456
    text = benchmark.table(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "nobody is skipped: because because" in text
    assert "ours: route FAILED, chain, M 128: made up" in text
    assert "NVIDIA H100 80GB HBM3, Kimi-K2, SGLang 0.5.23, µs, 7 rounds" in text


@pytest.mark.parametrize("text", ["{", "[1]", '{"gpu": "it"}', '{"no_such_field": 1}'])
def test_a_json_that_is_none_of_ours(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "it.json").write_text(text)
    assert_refused(
        benchmark.main, ["--from-json", str(tmp_path / "it.json")], "argument --from-json", capsys
    )


# Arguments


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "DeepSeek-V2"], "'DeepSeek-V2'"),
        (["--num-tokens", "0"], "'0', must be 1 to 128"),
        (["--num-tokens", "1", "129"], "'129', must be 1 to 128"),
        (["--rounds", "none"], "'none'"),
        (["--save-path", __file__], "must be a folder"),
        (["--from-json", "no_such_file.json"], "no_such_file.json"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(benchmark.main, argv, named, capsys)


def _script(*argv: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, benchmark.__file__, *argv],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path: Path) -> None:
    done = _script("--save-path", str(tmp_path / "results"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Nothing was timed: this machine has no CUDA device.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_python_that_lacks_a_module_is_told_in_one_line() -> None:
    done = _script(python=("-S",))  # as that of a machine where nothing is installed
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No module named" in done.stderr


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch, report: Report) -> list[tuple[Any, ...]]:
    """What `run` was called with; it returns `report`."""
    given: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> Report:
        given.append(arguments)
        return report

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "run", run)
    return given


def test_the_options_and_their_defaults(
    with_a_gpu: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_route.py"])
    benchmark.main([])
    options = ["--model", "GLM-5", "--num-tokens", "8", "1", "--rounds", "3"]
    benchmark.main([*options, "--save-path", str(tmp_path)])
    command = f"benchmark_route.py {' '.join(options)} --save-path {tmp_path}"
    num_tokens = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    assert with_a_gpu == [
        ("DeepSeek-V3", num_tokens, 30, "benchmark_route.py", None),
        ("GLM-5", [8, 1], 3, command, tmp_path),
    ]


@pytest.mark.usefixtures("with_a_gpu")
def test_a_failure_of_ours_or_no_number_is_exit_1(report: Report) -> None:
    assert benchmark.main([]) == 1
    report.failures = [timing.Failure(SGLANG_ALIGN, "check", 1, "made up")]
    assert benchmark.main([]) == 0
    report.us = []
    assert benchmark.main([]) == 1


# Who is there


def test_every_model_with_a_routing_can_be_measured() -> None:
    assert list(SCALE_FUSED) == [each.name for each in MODELS if each.route is not None]


@pytest.fixture
def layers(
    publish_server_args: Callable[..., None], request: pytest.FixtureRequest
) -> Iterator[Layers]:
    """Three links of a model, with SGLang's own functions."""
    model = getattr(request, "param", MODEL)
    num_experts = benchmark.find_row(model).num_experts
    # SGLang compiles its routing on a CPU, which takes a while and changes nothing here.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield Layers(torch.zeros(3, num_experts, 8), model)


@no_gpu
@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ("DeepSeek-V3", "SGLang has not found FlashInfer's fused_topk_deepseek"),
        ("Kimi-K2", "with one group SGLang's own is its Triton router"),
    ],
    indirect=["layers"],
)
def test_who_needs_a_gpu_is_skipped_with_a_reason(layers: Layers, why: str) -> None:
    reasons = {}
    for name in NAMES:
        try:
            make_route(name, layers)
        except Skip as reason:
            reasons[name] = str(reason)
    assert reasons == {
        "FlashInfer fused_topk_deepseek": why,
        "SGLang Triton moe_fused_gate": "no CUDA device",
        "vLLM grouped_topk": "no CUDA device",
        "ours: route": "SM is None, must be 90 or newer",
        "ours: route + align": "SM is None, must be 90 or newer",
    }


def test_a_provider_that_is_not_installed_is_named(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers.device = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(Skip, match=r"ModuleNotFoundError: .*vllm"):
        make_route("vLLM grouped_topk", layers)


def test_sglangs_functions_are_its_own_though_the_plugin_is_there(
    fork_python: Callable[..., str],
) -> None:
    code = f"""
import functools, importlib, sys
sys.path.insert(0, {str(FOLDER)!r})
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang_router_gemm.hooks import ALIGN, TOPK
from benchmark_route import Layers
select = importlib.import_module(TOPK).select_experts
align = importlib.import_module(ALIGN).moe_align_block_size
layers = Layers(torch.zeros(1, 256, 8), "DeepSeek-V3")
for hooked, own in ((select, layers.select), (align, layers.align.func)):
    assert isinstance(hooked, functools.partial), hooked
    print(own.__module__, own.__qualname__, own is hooked.__wrapped__)
"""
    lines = fork_python(code).splitlines()[-2:]
    assert [line.split()[1:] for line in lines] == [
        ["select_experts", "True"],
        ["moe_align_block_size", "True"],
    ]
    assert all(line.startswith("sglang.srt.layers.moe.") for line in lines)


# Whether they are right


def _calls(layers: Layers, fused: int = 1) -> list[Call]:
    """SGLang's own ids and weights of 50 rows, on every link."""
    calls: list[Call] = []
    for link, configs in enumerate(zip(*layers.configs, strict=True)):
        hidden_states, logits = torch.zeros(50, 8), torch.randn(50, len(layers.biases[0]))
        weights, ids, _ = layers.select(hidden_states, logits, configs[fused])
        calls.append((link, hidden_states, logits, (weights, ids, None)))
    return calls


@no_gpu
@pytest.mark.parametrize(
    ("layers", "scale", "num_experts", "columns"),
    [("DeepSeek-V3", 2.5, 257, 9), ("Kimi-K2", 2.827, 384, 8), ("GLM-5", 2.5, 257, 9)],
    indirect=["layers"],
)
def test_sglangs_own_is_right_and_has_its_columns(
    layers: Layers, scale: float, num_experts: int, columns: int
) -> None:
    assert layers.align.keywords["num_experts"] == num_experts
    for fused in (0, 1):
        calls = _calls(layers, fused)
        assert why_wrong(layers, calls, exact=True) is None
        shared = [num_experts - 1] * 50 * (columns - 8) * fused
        for link, _, logits, (weights, ids, _) in calls:
            logits, bias = logits.double(), layers.biases[link].double()
            expected = (logits.sigmoid() + bias).topk(8).indices.sort().values
            if layers.is_grouped:
                expected = grouped_topk(logits, bias)
            assert agreement(ids[:, :8].sort().values, expected) > 0.95
            assert weights[:, :8].sum(1).tolist() == pytest.approx([1.0] * 50)
            assert layers.configs[fused][link].routed_scaling_factor == scale
            assert ids[:, 8:].flatten().tolist() == shared
            assert weights[:, 8:].flatten().tolist() == pytest.approx([1 / scale] * len(shared))


@no_gpu
def test_one_bit_one_expert_and_the_bias_of_another_link_are_seen(layers: Layers) -> None:
    calls = _calls(layers)
    weights, ids, _ = calls[1][3]
    kept = ids[7, 3].item(), weights[49, 0].item()
    ids[7, 3] = (kept[0] + 1) % 256
    found = why_wrong(layers, calls, exact=True)
    assert found == "other experts than SGLang's in link 2"
    ids[7, 3] = kept[0]
    weights[49, 0] = weights[49, 0].nextafter(weights[49, 1])
    found = why_wrong(layers, calls, exact=True)
    assert found == "other weights than SGLang's in link 2"
    weights[49, 0] = kept[1]
    assert why_wrong(layers, calls, exact=True) is None
    layers.configs[1].reverse()  # that of the second link stays
    assert why_wrong(layers, calls, exact=True) == "other experts than SGLang's in link 1"


@no_gpu
def test_who_rounds_otherwise_may_choose_otherwise_in_few_rows(layers: Layers) -> None:
    calls = _calls(layers, fused=0)
    for _, _, _, (weights, ids, _) in calls:
        weights.zero_()
        ids.copy_(ids.flip(1))  # in any order
        ids[:2] = 0
    assert why_wrong(layers, calls, exact=False) is None
    calls[0][3][1][:5] = 0
    assert why_wrong(layers, calls, exact=False) == "SGLang's experts in 94% of the rows only"


def _plan(ids: list[int], reverse: bool = False) -> list[torch.Tensor]:
    """Of flattened ids, in blocks of 16, with what is behind the padded size made up."""
    tokens: list[int] = []
    experts: list[int] = []
    for expert in sorted(set(ids)):
        here = [place for place, each in enumerate(ids) if each == expert]
        here += [len(ids)] * (-len(here) % 16)
        tokens += here[::-1] if reverse else here
        experts += [expert] * (len(here) // 16)
    return [
        torch.tensor(each, dtype=torch.int32)
        for each in ([*tokens, -7, -7], [*experts, 99], [len(tokens)])
    ]


IDS = [5, 2, 256, 5, 3, 256] + [2] * 20


def test_a_plan_may_differ_from_sglangs_in_the_order_alone() -> None:
    ours, own = _plan(IDS), _plan(IDS, reverse=True)
    assert [each.tolist() for each in ours] != [each.tolist() for each in own]
    assert why_plan_wrong(ours, own) is None
    assert why_plan_wrong(own, own) == "other tokens or order in the plan"
    ours[0][-1], ours[1][-1] = 12, 12  # nobody reads that
    assert why_plan_wrong(ours, own) is None


@pytest.mark.parametrize(
    ("part", "place", "value", "reason"),
    [
        (0, 0, 3, "other tokens"),  # for the second time
        (0, 15, 26, "other tokens"),  # padding amid the tokens
        (1, 1, 3, "other blocks"),
        (2, 0, 96, "other blocks"),
    ],
)
def test_a_wrong_plan_is_seen(part: int, place: int, value: int, reason: str) -> None:
    ours, own = _plan(IDS), _plan(IDS, reverse=True)
    assert ours[part][place] != value
    ours[part][place] = value
    found = why_plan_wrong(ours, own)
    assert found is not None
    assert reason in found


@no_gpu
def test_a_wrong_plan_of_right_ids_is_wrong(layers: Layers) -> None:
    def align(ids: torch.Tensor) -> list[torch.Tensor]:
        return _plan(ids.flatten().tolist(), reverse=True)

    layers.align = functools.partial(align)  # SGLang's needs a GPU
    (link, hidden_states, logits, (weights, ids, _)), *_ = _calls(layers)
    plan = _plan(ids.flatten().tolist())
    call: Call = (link, hidden_states, logits, (weights, ids, plan))
    assert why_wrong(layers, [call], exact=True) is None
    plan[0][0] += 1
    found = why_wrong(layers, [call], exact=True)
    assert found == "other tokens or order in the plan than SGLang's in link 1"


# The whole run, on a stand-in for the GPU


@pytest.fixture
def bench(
    on_a_stand_in: None,  # noqa: F811
    publish_server_args: Callable[..., None],
) -> Iterator[timing.Bench]:
    with torch.compiler.set_stance("force_eager"):
        yield timing.Bench(256, 7168, 4, CPU)


def _measured(bench: timing.Bench, model: str = MODEL) -> tuple[Report, list[int]]:
    """The report, and how many numbers were there whenever it was saved."""
    report, saved = Report("it", None, {}, "today", "a test", [1, 3], 4, 3, model), list[int]()
    benchmark.measure(report, bench, exact, lambda: saved.append(len(report.us)))
    return report, saved


@no_gpu
def test_a_run_skips_and_fails_with_a_reason_and_times_the_rest(bench: timing.Bench) -> None:
    report, saved = _measured(bench)
    timed = [(each.provider, each.num_tokens) for each in report.us]
    assert timed == [(GATE, 1), (SGLANG, 1), (GATE, 3), (SGLANG, 3)]
    assert saved == [2, 4]
    assert set(report.skipped) == set(NAMES) - {SGLANG, SGLANG_ALIGN}
    # SGLang aligns on a GPU alone.
    failed = [(each.provider, each.mode, each.num_tokens) for each in report.failures]
    assert failed == [(SGLANG_ALIGN, "check", 1), (SGLANG_ALIGN, "check", 3)]
    assert "sgl_moe_align_block_size" in report.failures[0].reason


class _FromATable(SimpleNamespace):
    """A `Bench` of which `measure` returns known numbers."""

    def measure(
        self, candidates: list[timing.Candidate], num_tokens: int, mode: timing.Mode
    ) -> tuple[list[timing.Timing], list[timing.Failure]]:
        assert mode == timing.CHAIN
        names = [each.provider.name for each in candidates]
        us = {GATE: (2.0, 3.0, 5.0), SGLANG: (7.0, 9.0, 12.0)}
        return [
            timing.make_timing(each.provider, mode.name, num_tokens, 256, 7168, us[name], 3000.0)
            for name, each in zip(names, candidates, strict=True)
            if name in us
        ], []


@no_gpu
def test_the_gemm_alone_is_taken_off(bench: timing.Bench) -> None:
    fields = {"weights": bench.weights, "random_tokens": bench.random_tokens}
    known: Any = _FromATable(**fields, empty_logits=bench.empty_logits)
    report, _ = _measured(known)
    assert report.us[:2] == [
        Microseconds(GATE, 1, 2.0, 3.0, 5.0),
        Microseconds(SGLANG, 1, 4.0, 6.0, 9.0),
    ]


def _replaced(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Route], Route]) -> None:
    """Puts something else, made from SGLang's own routing, in a provider's place."""

    def make_other(each: str, layers: Layers) -> Route:
        return make(make_route(SGLANG, layers)) if each == name else make_route(each, layers)

    monkeypatch.setattr(benchmark, "make_route", make_other)


@no_gpu
def test_every_link_has_a_bias_of_its_own_in_the_graph_too(
    bench: timing.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[int] = []

    def noting(own: Route) -> Route:
        def route(h: torch.Tensor, logits: torch.Tensor, link: int, pdl: bool) -> Any:
            links.append(link)
            return own(h, logits, link, pdl)

        return route

    _replaced(monkeypatch, OURS, noting)
    report, _ = _measured(bench)
    assert (OURS, 3) in [(each.provider, each.num_tokens) for each in report.us]
    # The check, two warm-up calls, and then graph after graph.
    assert links[:5] == [0, 1, 2, 0, 0]
    assert links[5:11] == [0, 1, 2] * 2
    biases = Layers(bench.weights, MODEL).biases
    assert not any(biases[0].equal(each) for each in biases[1:])


@no_gpu
@pytest.mark.parametrize(
    ("model", "name", "mode"),
    [
        (MODEL, OURS_ALIGN, "check"),
        (MODEL, OURS_ALIGN, "chain"),
        ("GLM-5", TRITON, "check"),
        (MODEL, TRITON, None),  # its weights may be others
    ],
)
def test_what_is_wrong_is_said_and_has_no_time(
    bench: timing.Bench, monkeypatch: pytest.MonkeyPatch, model: str, name: str, mode: str | None
) -> None:
    def wrong(own: Route) -> Route:
        def route(h: torch.Tensor, logits: torch.Tensor, link: int, pdl: bool) -> Any:
            weights, ids = own(h, logits, link, pdl)
            captured = sys._getframe(2).f_code.co_name == "calls"
            return (weights * 2 if captured or mode != "chain" else weights), ids

        return route

    _replaced(monkeypatch, name, wrong)
    report, _ = _measured(bench, model)
    reasons = {
        (each.mode, each.num_tokens): each.reason
        for each in report.failures
        if each.provider == name
    }
    reason = f"other weights than SGLang's in link {1 if mode == 'check' else 3}"
    assert reasons == ({(mode, 1): reason, (mode, 3): reason} if mode else {})
    assert {each.provider for each in report.us} == {GATE, SGLANG, *([] if mode else [name])}


# What `run` puts around it


@pytest.fixture
def on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a provider in the place of the `cluster` GEMM of one N and K, on a GPU of that name."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    def put(provider: Provider, *shape: int) -> None:
        from router_gemm_benchmark import providers

        found = {shape: [provider]}
        monkeypatch.setattr(providers, "all_providers", lambda n, k, *others: found[n, k])

    return put


@pytest.mark.parametrize(
    ("model", "shape", "name"),
    [
        ("DeepSeek-V3", (256, 7168), "route_h200.json"),
        ("GLM-5", (256, 6144), "route_h200_n256_k6144.json"),
    ],
)
def test_without_the_gemm_nothing_is_timed_and_the_reason_is_saved(
    on_one_gpu: Callable[..., None], tmp_path: Path, model: str, shape: tuple[int, int], name: str
) -> None:
    def absent() -> Any:
        raise Skip("SM is 80, must be 90 or newer")

    on_one_gpu(Provider("ours: cluster", absent), *shape)
    report = benchmark.run(model, [4, 1, 4], 3, "a test", tmp_path / "new")
    assert report.skipped == {GATE: "SM is 80, must be 90 or newer"}
    assert (report.model, report.num_tokens) == (model, [1, 4])
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == name
    assert benchmark.load(file) == report


def test_without_a_producer_there_is_no_chain(
    on_one_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_one_gpu(Provider("ours: cluster", lambda: exact), 384, 7168)
    benches = {(384, 7168): SimpleNamespace(producer=None, producer_note="no nvcc")}
    monkeypatch.setattr(timing, "Bench", lambda n, k, *others: benches[n, k])
    report = benchmark.run("Kimi-K2", [1], 3, "a test", None)
    assert (report.skipped, report.us) == ({GATE: "no nvcc"}, [])
