"""`rlhub eval --grid`: cells against plain evaluations and planted files, combinations that do not fit, and the Pareto front."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from rlhub.commands.main import main
from rlhub.config.schema import Recipe
from rlhub.evals.grid import pareto_front
from rlhub.records.metrics import wilson_interval
from rlhub.training.run import train

GRID = ["sampler.name=random,threshold", "sampler.steps=2,4", "sampler.early_stop=off", "eval_temperatures=[1.0]"]


@pytest.fixture(scope="module")
def run_dir(tiny: Callable[..., Recipe], quick_report: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(tiny(f"run.output_dir={folder}", "run.phases=[sft]", "sft.steps=1", grader="picky"))


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def cells(*arguments: object) -> list[dict]:
    result = evaluate(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["cells"]


def test_a_cell_is_the_plain_evaluation_and_its_forwards_are_counted(run_dir: Path, tmp_path: Path) -> None:
    found = cells(run_dir, "--grid", *GRID, "--out", tmp_path / "a.json")
    assert [cell["values"]["sampler.name"] for cell in found] == ["random"] * 2 + ["threshold"] * 2
    for cell in found[:2]:
        steps = int(cell["values"]["sampler.steps"])
        plain = json.loads(evaluate(run_dir, "--json", "sampler.name=random", f"sampler.steps={steps}", *GRID[2:]).stdout)
        assert (cell["accuracy"], cell["mean_reward"]) == (plain["eval/accuracy_t1"], plain["eval/reward_t1"])
        assert cell["invalid_share"] == plain["eval/invalid_share_t1"]
        assert cell["forwards"] == 16 * steps and cell["forwards_per_token"] == 16 * steps / cell["tokens"]
        assert cell["interval"] == list(wilson_interval(cell["accuracy"], 16))
        assert cell["tokens_per_s"] == pytest.approx(cell["tokens"] / cell["seconds"])


def test_finished_cells_are_kept_and_the_grid_grows(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    cells(run_dir, "--grid", *GRID, "--out", file)
    kept = json.loads(file.read_text())
    kept["cells"][1]["accuracy"] = 0.123  # measured again it would not be
    file.write_text(json.dumps(kept))
    grown = cells(run_dir, "--grid", GRID[0], "sampler.steps=4,2,1", *GRID[2:], "--out", file)
    assert [cell["accuracy"] == 0.123 for cell in grown] == [True, *[False] * 5] and len(json.loads(file.read_text())["cells"]) == 6
    assert cells(run_dir, "--grid", *GRID, "task.eval_rows=8", "--out", file)[1]["num_problems"] == 8
    # A model that was written again is another model.
    weights = next((run_dir / "checkpoints").rglob("model.safetensors"))
    before = weights.stat().st_mtime_ns
    os.utime(weights, ns=(before + 10**9, before + 10**9))
    try:
        assert cells(run_dir, "--grid", *GRID, "--out", file)[1]["accuracy"] != 0.123
    finally:
        os.utime(weights, ns=(before, before))


def test_what_does_not_fit_is_skipped_and_listed_in_table_and_plot(run_dir: Path) -> None:
    axes = ["sampler.name=random,threshold", "sampler.steps=3,4,9", "sampler.options.threshold=0.5,2", "sampler.temperature=0"]
    result = evaluate(run_dir, "--grid", *axes, "sampler.block_length=2")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    table = [words for words in lines if words[:1] in (["random"], ["threshold"]) and words[1].isdigit()]
    # Of an option that only `threshold` has, `random` is measured once; 3 and 9 steps do not fit two blocks, nor does a threshold of 2.
    assert [row[:3] for row in table] == [["random", "4", "-"], ["threshold", "4", "0.5"]]
    skipped = [line for line in result.stdout.splitlines() if line.startswith("skipped (")]
    assert len(skipped) == 3 and "name random, steps 3" in skipped[0] and "3 is not a multiple of the 2 blocks" in result.stdout
    assert "threshold must be in (0, 1], got 2" in result.stdout
    assert (run_dir / "eval_grid.json").exists() and Image.open(run_dir / "eval_grid.png").size[0] > 500


BAD = [
    (["sampler.steps=2"], "a grid needs a sampler setting with several values"),
    (["task.eval_rows=8,16", "sampler.steps=1,2"], "'task.eval_rows=8,16': a grid is over sampler settings"),
    (["sampler.steps=1,2", "sampler.steps=4,2"], "sampler.steps is given twice"),
    (["sampler.stps=1,2"], "none of the 4 combinations fits; the first one: sampler.stps"),
    (["sampler.steps=1,2", "--out", "other.json"], "other.json is not a grid of this version"),
    (["sampler.steps=1,2", "--recipe", "r.yaml"], "--out FILE.json"),
]


@pytest.mark.parametrize(("arguments", "wanted"), BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_grids_end_in_one_line(
    run_dir: Path, tiny: Callable[..., Recipe], arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("[]")
    Path("r.yaml").write_text((tiny.folder / "tiny.yaml").read_text())
    result = evaluate(run_dir, "--grid", *arguments)
    assert result.exit_code == 2 and wanted in result.stderr and result.stderr.count("\n") == 1, result.output


def test_the_front_is_what_nothing_beats() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(cost), float(quality)) for cost, quality in random.integers(0, 5, (8, 2))]
        beaten = [any(a <= c and b >= d and (a, b) != (c, d) for a, b in points) for c, d in points]
        front = [points[index] for index in pareto_front(points)]
        assert front == sorted({point for point, worse in zip(points, beaten, strict=True) if not worse})
