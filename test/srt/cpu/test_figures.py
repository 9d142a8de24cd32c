"""README.md and docs/upstream_pr.md show the committed results, and no others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README, PR = ROOT / "README.md", ROOT / "docs" / "upstream_pr.md"
SERVERS, BENCHMARKS = ROOT / "test/srt/results", ROOT / "benchmark/kernels/deepseek/results"


def _fill(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "docs" / "fill_figures.py"
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_texts_are_up_to_date() -> None:
    assert _fill("--check").returncode == 0, "run docs/fill_figures.py"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (README, "| ours: cluster | 1.", "| ours: cluster | 2."),
        (PR, "Measured on: ", "Measured on: NVIDIA B200, "),
    ],
)
def test_a_wrong_figure_is_stale_and_mended(
    text: Path, right: str, wrong: str, tmp_path: Path
) -> None:
    stale = tmp_path / text.name
    assert right in text.read_text()
    stale.write_text(text.read_text().replace(right, wrong))
    checked = _fill("--check", "--texts", stale)
    assert checked.returncode == 1
    assert "is stale" in checked.stderr
    assert _fill("--texts", stale).returncode == 0
    assert stale.read_text() == text.read_text()


def test_a_result_changes_the_texts(tmp_path: Path) -> None:
    servers, benchmarks = tmp_path / "servers", tmp_path / "benchmarks"
    for folder in (servers, benchmarks / "cluster"):
        folder.mkdir(parents=True)
    server = json.loads((SERVERS / "dsv3_server_h100.json").read_text())
    server["environment"]["GPU"] = "NVIDIA B200"
    server["layers"][0]["relative_difference"] = 0.00123
    (servers / "dsv3_server_b200.json").write_text(json.dumps(server))
    run = json.loads((BENCHMARKS / "h100.json").read_text()) | {"gpu": "NVIDIA B200"}
    (benchmarks / "b200.json").write_text(json.dumps(run))
    other_shape = run | {"num_experts": 384}
    (benchmarks / "b200_n384_k7168.json").write_text(json.dumps(other_shape))
    for each in benchmarks.glob("*.json"):
        shutil.copy(each, benchmarks / "cluster")
    for text in (README, PR):
        shutil.copy(text, tmp_path)
    texts = [tmp_path / README.name, tmp_path / PR.name]
    done = _fill("--texts", *texts, "--servers", servers, "--benchmarks", benchmarks)
    assert done.returncode == 0, done.stderr
    readme, pr = (text.read_text() for text in texts)
    assert readme.count("### NVIDIA B200") == 1  # DeepSeek-V3's shape alone
    assert "(benchmark/kernels/deepseek/results/cluster/b200_chain.png)" in readme
    assert "### NVIDIA H200" not in readme
    assert "| 1.2e-03" in pr
    assert "Measured on: NVIDIA B200." in pr
    assert "No Blackwell GPU" not in pr


def test_no_results(tmp_path: Path) -> None:
    shutil.copy(PR, tmp_path)
    done = _fill("--texts", tmp_path / PR.name, "--servers", tmp_path, "--benchmarks", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No results of the benchmark" in (tmp_path / PR.name).read_text()


SPEED = "<!-- speed:begin -->\n<!-- speed:end -->\n"


@pytest.mark.parametrize("text", ["none", SPEED.replace("speed", "nonsense"), SPEED + SPEED])
def test_a_text_with_other_blocks_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "text.md"
    path.write_text(text)
    done = _fill("--texts", path)
    assert done.returncode == 2
    assert "must be some of" in done.stderr
    assert path.read_text() == text
