"""README.md and docs/*.md show the committed results and the code's own tables, and no others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "docs"))  # as where the script is run as a file

import fill_figures  # noqa: E402  makes the benchmark importable
from router_gemm_benchmark.report import form_of  # noqa: E402
from tables import NO_RESULTS  # noqa: E402

from sglang.srt.layers.moe_router.backends import BACKENDS  # noqa: E402
from sglang.srt.layers.moe_router.environ import CHOICES  # noqa: E402
from sglang.srt.layers.moe_router.kernel import dtype_name  # noqa: E402
from sglang.srt.layers.moe_router.models import MODELS, Auto, Model  # noqa: E402

README, SPEED = ROOT / "README.md", ROOT / "docs/speed.md"
PR, OTHER_PR, ROUTING_PR = (
    ROOT / f"docs/upstream/{name}.md" for name in ("gate", "flashinfer", "routing")
)
BENCHMARKS = ROOT / "benchmark/kernels/deepseek/results"


def _fill(*arguments: str | Path) -> int:
    return fill_figures.main([*map(str, arguments)])


def _empty(path: Path, *blocks: str) -> Path:
    path.write_text("\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in blocks))
    return path


def _filled(path: Path, *blocks: str, arguments: tuple[str | Path, ...] = ()) -> str:
    assert _fill("--texts", _empty(path, *blocks), *arguments) == 0
    return path.read_text()


def test_the_texts_are_up_to_date() -> None:
    assert _fill("--check") == 0, "run docs/fill_figures.py"


def test_every_table_of_the_code_is_on_a_page() -> None:
    pages = "\n".join(path.read_text() for path in fill_figures.texts())
    for block in ("headline", "settings", "backends", "auto", "benchmark"):
        assert f"<!-- {block}:begin -->" in pages


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (SPEED, "| ours: cluster | 1.", "| ours: cluster | 2."),
        (PR, "Measured on: ", "Measured on: NVIDIA B200, "),
        (ROUTING_PR, "Timed on: NVIDIA H200", "Timed on: NVIDIA H100"),
    ],
)
def test_a_wrong_figure_is_stale_and_mended(
    text: Path, right: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / text.name
    assert right in text.read_text()
    stale.write_text(text.read_text().replace(right, wrong))
    assert _fill("--check", "--texts", stale) == 1
    assert "is stale" in capsys.readouterr().err
    assert _fill("--texts", stale) == 0
    assert stale.read_text() == text.read_text()


def test_a_result_changes_the_texts(tmp_path: Path) -> None:
    benchmarks = tmp_path / "benchmarks"
    (benchmarks / "cluster").mkdir(parents=True)
    run = json.loads((BENCHMARKS / "cluster/h200.json").read_text()) | {"gpu": "NVIDIA B200"}
    for each in run["timings"]:
        if (each["provider"], each["mode"]) == ("ours: cluster", "chain"):
            each["median_us"] = 0.5
    for each in run["accuracy"]:
        if (each["provider"], each["num_tokens"]) == ("FlashInfer", 3):
            each["relative"]["scale"] = 0.00123
    (benchmarks / "cluster" / "b200.json").write_text(json.dumps(run))
    other_shape = run | {"num_experts": 128}
    (benchmarks / "cluster" / "b200_n128_k7168.json").write_text(json.dumps(other_shape))
    originals = (SPEED, PR, OTHER_PR)
    texts = [Path(shutil.copy(text, tmp_path)) for text in originals]
    assert _fill("--texts", *texts, "--benchmarks", benchmarks) == 0
    speed, pr, other_pr = (text.read_text() for text in texts)
    assert speed.count("### NVIDIA B200") == 1  # DeepSeek-V3's shape alone
    assert "(../benchmark/kernels/deepseek/results/cluster/b200_chain.png)" in speed
    assert "### NVIDIA H200" not in speed
    speeds = {tuple(row[:2]): row[2:] for row in _rows(pr.split("pr_gate_speed:")[1])}
    deepseek_v3 = speeds["NVIDIA B200", "DeepSeek-V3, 256 x 7168"]
    assert (deepseek_v3[0], deepseek_v3[6]) == ("2.32 → 0.50", "7.30 → 0.50")  # M = 1, 64
    mistral = speeds["NVIDIA B200", "Mistral Large 3, 128 x 7168"]
    assert mistral[:3] == ["", "", "2.99 → 0.50"]  # taken from M = 4 on
    assert "- Measured on: NVIDIA B200. " in pr
    assert "- On NVIDIA B200: not the gates of Kimi-K2, GLM-5, " in pr
    assert "- On NVIDIA H100 80GB HBM3, beyond M = 16: not the gates of Kimi-K2, " in PR.read_text()
    assert "| 1e-03" in other_pr
    assert "- On Blackwell, it was timed on: NVIDIA B200." in other_pr
    assert "No Blackwell GPU" not in other_pr


def test_fp32_weights_are_compared_with_what_the_server_runs(tmp_path: Path) -> None:
    text = _filled(tmp_path / "text.md", "pr_fp32_speed")
    rows = {row[1].partition(",")[0]: row[2:] for row in _rows(text)[2:]}
    others = _rows(_filled(tmp_path / "others.md", "pr_fp32_others"))
    for shape, model, provider in (
        ("n160_k5120", "GLM-4.5", "SGLang TF32 F.linear"),
        ("n256_k4096", "MiMo-V2-Flash", "SGLang fp32 F.linear"),
    ):
        run = json.loads((BENCHMARKS / f"gates/h200_{shape}_fp32.json").read_text())
        us = {
            each["provider"]: each["median_us"]
            for each in run["timings"]
            if (each["mode"], each["num_tokens"]) == ("chain", 8)
        }
        assert rows[model][1] == f"{us[provider]:.2f} → {us['ours: cluster']:.2f}"  # M = 8
        (row,) = (row for row in others if row[1].startswith(f"{model}, "))
        assert row[3] == f"{us['SGLang tiny_gemm']:.2f} tiny_gemm"
    assert "" not in rows["LongCat-Flash"][:4]
    assert rows["LongCat-Flash"][4:] == ["", ""]  # M = 64 and 128, which it does not take


def test_a_result_of_the_routing_changes_its_text(tmp_path: Path) -> None:
    benchmarks = tmp_path / "benchmarks"
    (benchmarks / "route").mkdir(parents=True)
    run = json.loads((BENCHMARKS / "route/route_h200.json").read_text()) | {"gpu": "NVIDIA H100"}
    numbers = {"SGLang": 9.0, "FlashInfer fused_topk_deepseek": 3.0, "ours: route": 0.5}
    for each in run["us"]:
        each["median_us"] = numbers.get(each["provider"], 7.0)
    (benchmarks / "route" / "route_h100.json").write_text(json.dumps(run))
    blocks = ("pr_routing_speed", "pr_routing_not_measured")
    text = _filled(tmp_path / "text.md", *blocks, arguments=("--benchmarks", benchmarks))
    names = {"select_experts": "9.00", "its top-k kernel alone": "3.00", "this kernel": "0.50"}
    rows = [["NVIDIA H100", "DeepSeek-V3", name, *[us] * 8] for name, us in names.items()]
    assert _rows(text)[2:] == rows
    assert "- Timed on: NVIDIA H100. " in text
    assert "the routing of Kimi-K2, GLM-5, MiniMax-M2, GLM-4.5, GLM-4.5-Air." in text


def test_the_rank_of_the_pull_requests_is_that_of_its_report(tmp_path: Path) -> None:
    text = _filled(tmp_path / "text.md", "pr_rank")
    assert "with gate, fp32, routing" in text
    rows = _rows(text)[2:]
    assert [row[0] for row in rows] == ["1", "8", "16", "32", "64"]
    assert rows[0] == ["1", "9532", "8984", "5.8 %", "15.9", "6.6"]


def test_the_routings_own_benchmark_is_as_it_was_saved(tmp_path: Path) -> None:
    rows = _rows(_filled(tmp_path / "text.md", "pr_routing_benchmark"))[2:]
    assert len(rows) == 5 * 2  # routings, with a shared expert and without
    (row,) = (row for row in rows if row[:2] == ["DeepSeek-V3", "yes"])
    assert row[5] == "10.79 → 1.65"  # M = 8


def test_the_gates_own_benchmark_is_as_it_was_saved(tmp_path: Path) -> None:
    """Against what the gate runs now: tiny_gemm up to 16, cuBLAS beyond, in TF32 for GLM-4.5."""
    rows = _rows(_filled(tmp_path / "text.md", "pr_gate_benchmark", "pr_fp32_benchmark"))
    by_gate = {row[0]: row[1:] for row in rows}
    assert len(rows) == 8 + 6 + 5 + 2 * 2  # tiny_gemm, which has no Hy4; each table's header
    assert by_gate["tiny_gemm, 160 x 5120"][:3] == ["1.96", "2.12", "2.50"]
    assert by_gate["DeepSeek-V3, 256 x 7168"][4:6] == ["5.21 → 2.67", "6.83 → 3.77"]  # M = 16, 32
    assert by_gate["GLM-4.5, 160 x 5120"][0] == "8.40 → 2.53"
    assert by_gate["MiMo-V2-Flash, 256 x 4096"][0] == "6.89 → 2.82"


def test_no_results(tmp_path: Path) -> None:
    nothing = ("--benchmarks", tmp_path)
    of_prs = ("pr_gate_speed", "pr_flashinfer_accuracy", "pr_routing_speed", "pr_gate_benchmark")
    blocks = ("speed", "headline", "benchmark", *of_prs, "pr_routing_not_measured")
    text = _filled(tmp_path / "text.md", *blocks, arguments=nothing)
    assert text.count("No results of the benchmark") == 6
    assert "- Timed on: no GPU. " in text


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_headline_is_five_rows_of_the_h200(tmp_path: Path) -> None:
    text = _filled(tmp_path / "text.md", "headline")
    header, _, *rows = _rows(text)
    providers = ["FlashInfer", "SGLang tiny_gemm", "vLLM ll_bf16", "cuBLAS fp32", "ours: cluster"]
    assert header == ["M", *providers, "best peer / ours"]
    assert [row[0] for row in rows] == ["1", "4", "8", "16", "64"]
    assert "NVIDIA H200" in text
    run = json.loads((BENCHMARKS / "cluster/h200.json").read_text())
    chain = {
        each["provider"]: each["median_us"]
        for each in run["timings"]
        if (each["mode"], each["num_tokens"]) == ("chain", 16)
    }
    assert rows[3][1:6] == [f"{chain[name]:.2f}" for name in providers]
    best = min(us for name, us in chain.items() if name != "ours: cluster")
    assert rows[3][6] == f"{best / chain['ours: cluster']:.2f}"


def test_the_backends_are_those_of_the_records(tmp_path: Path) -> None:
    _, _, *rows = _rows(_filled(tmp_path / "text.md", "backends"))
    assert [row[0].split("`")[1] for row in rows] == list(BACKENDS)
    cluster, flashinfer, _, matmul = rows
    assert cluster[2:8] == [
        "90 or newer",
        "a multiple of 16 up to 1024",
        "a multiple of 64 up to 8192",
        "0 to 128",
        "bfloat16 or float32",
        "float32 or bfloat16, with a bias or without",
    ]
    assert flashinfer[6:8] == ["bfloat16", "float32"]
    assert cluster[0] == "`cluster` (measured on SM 90)"
    assert flashinfer[3:6] == ["256", "7168", "1 to 16"]
    assert matmul[2:] == [
        *("any, and the CPU", "any", "any", "any"),
        "bfloat16 or float16 or float32",
        "float32 or bfloat16 or float16, with a bias or without",
        "any",
    ]
    wider = replace(BACKENDS["cluster"], rule=BACKENDS["cluster"].rule._replace(min_sm=120))
    assert "120 or newer" in fill_figures.backends_table([wider])


def test_auto_is_that_of_the_models(tmp_path: Path) -> None:
    _, _, *rows = _rows(_filled(tmp_path / "text.md", "auto"))
    assert {row[0] for row in rows} == {model.name for model in MODELS if model.auto}
    assert rows[0] == ["DeepSeek-V3", "[256, 7168]", "90", "1-128", "`cluster`", "2026-11-27"]
    assert rows[1] == ["DeepSeek-V3", "[256, 7168]", "100, 103", "1-16", "`flashinfer`", "no"]
    auto = {90: Auto("cluster", range(2, 9), "2031-01-02"), 120: Auto("torch", range(1, 2))}
    new = Model("New", 64, 512, auto, dtype=torch.float32)
    assert _rows(fill_figures.auto_table([new]))[2:] == [
        ["New", "[64, 512] float32", "90", "2-8", "`cluster`", "2031-01-02"],
        ["New", "[64, 512] float32", "120", "1-1", "`torch`", "no"],
    ]


def _results_of_gates() -> dict[tuple[object, ...], list[dict[str, Any]]]:
    """What was measured on SM 90, by what the gate computes."""
    found: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for folder in ("cluster", "gates"):
        for path in sorted((BENCHMARKS / folder).glob("h?00*.json")):
            run = json.loads(path.read_text())
            gate = run["num_experts"], run["hidden_size"], *form_of(run)
            found.setdefault(gate, []).append(run)
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_auto_takes_what_each_result_shows_to_be_faster(model: Model) -> None:
    """Of fp32 weights than what SGLang's gates run, else than every kernel with such logits."""
    runs, auto = _results_of_gates()[model.gate], model.auto[90]
    assert auto.measured == max(run["date"] for run in runs)[:10]
    measured: dict[str, set[int]] = {}
    for run in runs:
        others = {
            each["name"]
            for each in run["providers"]
            if each["output"] == dtype_name(model.logits_dtype) and not each["ours"]
        }
        if model.dtype == torch.float32:
            others &= {"SGLang fp32 F.linear", "SGLang TF32 F.linear"}
        by_num_tokens: dict[int, dict[str, float]] = {}
        for each in run["timings"]:
            if each["mode"] == "chain":
                us = by_num_tokens.setdefault(each["num_tokens"], {})
                us[each["provider"]] = each["median_us"]
        measured.setdefault(run["gpu"], set()).update(by_num_tokens)
        for num_tokens in by_num_tokens.keys() & set(auto.num_tokens):
            us = by_num_tokens[num_tokens]
            best = min(us[name] for name in others & us.keys())
            assert us["ours: cluster"] < best, (run["gpu"], num_tokens)
    first, last = auto.num_tokens[0], auto.num_tokens[-1]
    assert all(first in seen for seen in measured.values())
    # On one GPU at least: H100 has some gates up to 16 alone (docs/backends.md).
    assert any(last <= max(seen) for seen in measured.values())


def test_the_settings_are_those_of_the_code(tmp_path: Path) -> None:
    _, _, backend, pdl = _rows(_filled(tmp_path / "text.md", "settings"))
    names = ", ".join(f"`{choice}`" for choice in CHOICES)
    assert backend[1] == f"{names}; `,fp32` behind each but `off`"
    assert (backend[0], pdl[0]) == ("`SGLANG_ROUTER_GEMM_BACKEND`", "`SGLANG_ROUTER_GEMM_PDL`")


SPEED_BLOCK = "<!-- speed:begin -->\n<!-- speed:end -->\n"


@pytest.mark.parametrize(
    "text", ["none", SPEED_BLOCK.replace("speed", "nonsense"), SPEED_BLOCK + SPEED_BLOCK]
)
def test_a_text_with_other_blocks_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.md"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        _fill("--texts", path)
    assert stopped.value.code == 2
    assert "must be some of" in capsys.readouterr().err
    assert path.read_text() == text


def test_a_python_that_lacks_a_module_is_told_in_one_line() -> None:
    script = ROOT / "docs" / "fill_figures.py"
    done = subprocess.run(
        [sys.executable, "-S", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "fill_figures.py: No module named" in done.stderr


def test_the_other_gates_are_shown_with_their_peers(tmp_path: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted((BENCHMARKS / "gates").glob("*.json"))]
    _, _, *rows = _rows(_filled(tmp_path / "text.md", "gates"))
    assert len(rows) == sum(len(run["num_tokens"]) for run in runs)
    found = {(row[0], row[1]): row[2:] for row in rows}
    fp32 = found["[160, 5120] float32", "16"]
    assert all(map(float, fp32[:2]))
    assert fp32[2].endswith(" SGLang tiny_gemm")
    bias = found["[128, 2880] with a bias, bfloat16 logits", "128"]
    assert bias[1] == ""  # TF32 is for fp32 weights
    assert bias[2].endswith(" FlashInfer tinygemm")
    assert all(float(row[-1]) < float(row[2]) for row in rows)  # than F.linear
    assert fill_figures.gates([]) == NO_RESULTS
