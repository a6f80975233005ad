"""The report of synthetic run folders that look like real ones."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from rlhub.config.schema import Recipe
from rlhub.errors import CheckpointError, DataError
from rlhub.records.metrics import MetricsLog, summarize
from rlhub.records.rollout_log import dump_rollouts, read_rollouts, rollout_files, rollout_path
from rlhub.reports.page import Run, differences, dump_view, group_name, save_accuracy_plot, write_report
from rlhub.reports.plots import PANELS, SeedGroup, draw_panel, over_seeds, smoothed
from rlhub.types import NEVER, RewardResult, Rollout

NUM_PROBLEMS = 512


def make_rows(seed: int, steps: int, top: float, sft_steps: int = 800) -> list[dict]:
    """Metrics of an SFT phase that saturates and an RL phase that climbs to `top`."""
    random = np.random.default_rng(seed)
    test = {"eval/test_set": "countdown_small held-out", "eval/num_problems": NUM_PROBLEMS, "eval/test_hash": "sha256:3fa91c0d77"}
    rows: list[dict] = []
    wall = 0.0
    for step in range(0, sft_steps + 1, 20):
        wall += 1.1
        row = {"phase": "sft", "step": step, "wall_s": wall, "learning_rate": 2e-3 * (1 - step / 900), "time/step_s": 0.05}
        if step:
            row |= {"loss": 0.4 + 2 * math.exp(-step / 150) + 0.03 * random.normal(), "grad_norm": 0.8 + 0.2 * random.random()}
        if step % 200 == 0:
            row |= test | {"eval/accuracy": 0.5 * (1 - math.exp(-step / 200)), "eval/accuracy_t1": 0.22 * (1 - math.exp(-step / 200))}
        rows.append(row)
    for step in range(steps + 1):
        wall += 0.9
        climb = 1 - math.exp(-3 * step / max(steps, 1))
        row = {"phase": "online", "step": step, "wall_s": wall}
        if step:
            row |= {
                "reward/mean": 0.25 + (top - 0.28) * climb + 0.04 * random.normal(),
                "loss": 0.01 * random.normal(),
                "learning_rate": 5e-5 * (1 - 0.9 * step / steps),
                "grad_norm": math.exp(0.3 * random.normal()),
                "time/generate_s": 0.31 + 0.02 * random.random(),
                "time/reward_s": 0.02,
                "time/score_s": 0.11 + 0.01 * random.random(),
                "time/learn_s": 0.35 + 0.05 * random.random(),
                "time/sync_s": 0.012 + 0.004 * random.random(),
                "time/overhead_s": 0.02 + 0.01 * random.random(),
                "time/step_s": 0.9,
                "system/idle_share/generator": 0.6 + 0.03 * random.normal(),
                "system/idle_share/learner": 0.45 + 0.03 * random.normal(),
                "system/idle_share/scorer": 0.85 + 0.01 * random.normal(),
                "system/sync_bytes": 1_843_200,
                "sync/receipt_ok": 0.0 if step == 7 else 1.0,
                "ratio/mean": 1 + 0.002 * random.normal(),
                "ratio/min": 0.97 - 0.01 * random.random(),
                "ratio/max": 1.03 + 0.01 * random.random(),
                "clip/fraction": 0.05 + 0.02 * random.random(),
                "clip/flip_share": 0.02 + 0.01 * random.random(),
                "kl": None if step == 3 else 0.05 * climb + 0.003 * random.random(),
                "elbo/per_token": -1.1 + 0.5 * climb + 0.03 * random.normal(),
                "elbo/standard_error": 0.4 + 0.1 * random.random(),
                "ess": 0.95 - 0.05 * random.random(),
                "group/no_signal_share": 0.2 + 0.3 * climb + 0.05 * random.normal(),
                "eos/flood_rate": 0.01 * random.random(),
                "eos/early_rate": 0.02 * random.random(),
                "throughput/samples_per_s": 560 + 20 * random.normal(),
            }
        if step % 10 == 0:
            row |= test | {"eval/accuracy": 0.5 + (top - 0.5) * climb, "eval/accuracy_t1": 0.22 + (top - 0.3) * climb}
        rows.append(row)
    return rows


def make_rollouts(count: int) -> tuple[list[Rollout], list[tuple[str, str]], list[list[str]]]:
    """Countdown completions on a canvas of 16 tokens, the first one unfinished and the second one not gradable."""
    rollouts, texts, strings = [], [], []
    for uid in range(count):
        tokens = [*"(3+4)*2=14", "<eos>", "<eos>", "<eos>", "<eos>", "<eos>", "<eos>"]
        steps = np.random.default_rng(uid).permutation(16).astype(np.int16) // 2
        logp = np.linspace(-0.01, -2, 16).astype(np.float32)
        if uid == 0:
            steps[2], logp[2] = NEVER, np.nan
        rollouts.append(
            Rollout(
                uid=uid,
                group_uid=uid // 4,
                prompt_ids=np.arange(5, dtype=np.int32),
                completion_ids=np.arange(16, dtype=np.int32),
                length=11,
                unmask_step=steps,
                logp_sample=logp,
                logp_model=logp,
                policy_version=np.zeros(16, np.int32),
                num_forwards=8,
                reward=RewardResult(float("nan"), "timeout") if uid == 1 else RewardResult(float(uid % 2)),
            )
        )
        texts.append((f"Numbers: 2 3 4 <{uid}>\nTarget: 14", "(3+4)*2=14"))
        strings.append(tokens)
    return rollouts, texts, strings


def make_run(folder: Path, seed: int = 0, steps: int = 60, top: float = 0.78, planned: int | None = None, **changes: object) -> Path:
    """A run folder: recipe, metrics and three or more dumps of rollouts."""
    folder.mkdir(parents=True)
    recipe = OmegaConf.structured(Recipe)
    recipe.run.name, recipe.run.seed, recipe.run.steps, recipe.run.phases = folder.name, seed, planned or steps, ["sft", "online"]
    for key, value in changes.items():
        OmegaConf.update(recipe, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(recipe))
    log = MetricsLog(folder / "metrics.jsonl")
    log.path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(seed, steps, top)))
    log.close()
    for step in range(10, steps + 1, 10):
        dump_rollouts(rollout_path(folder, step), step, *make_rollouts(12))
    return folder


class Page(HTMLParser):
    """Text, links and balance of a page."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self.open, self.images, self.tips = [], [], [], 0, []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        self.tips += [named["title"]] if "title" in named else []
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    run = make_run(tmp_path_factory.mktemp("runs") / "quick")
    write_report([run])
    return run


def test_report_of_one_run(quick: Path) -> None:
    path = quick / "report.html"
    html = path.read_text()
    page = Page(html)
    assert page.open == [] and page.images >= 15
    assert "http:" not in html and "https:" not in html and all(link.startswith("data:") for link in page.links)
    summary = summarize(make_rows(0, 60, 0.78))
    assert summary.before == 0.5
    assert f"50.0% \u2192 {summary.after:.1%}" in page.words and "+26.6 points" in page.words
    assert "50.0% [45.7, 54.3]" in page.words  # Wilson, 256 of 512
    assert "512 problems" in page.words and "sha256:3fa91c0d77" in page.words and "finished" in page.words
    assert "59 of 60 receipts agree, 1.84 MB each" in page.words
    assert "algorithm.objective.name" in page.words and "sequence_clip" in page.words


def test_samples_carry_steps_rewards_and_status(quick: Path) -> None:
    page = Page((quick / "report.html").read_text())
    assert all(f"Step {step} " in page.words for step in (10, 40, 60)) and "Step 20 " not in page.words
    assert "never filled" in page.tips and any("at step" in tip and "log-prob -0.010" in tip for tip in page.tips)
    view = dump_view(rollout_path(quick, 60))
    assert (view["shown"], view["total"]) == (6, 12)
    kinds = [token["kind"] for token in view["samples"][0]["tokens"]]
    assert kinds[2] == "never" and kinds[11:] == ["tail"] * 5
    rows = read_rollouts(rollout_path(quick, 60))
    assert rows[0]["logp"][2] is None and rows[1]["reward"] is None and rows[1]["status"] == "timeout"
    assert rows[3] | {"tokens": [], "unmask_step": [], "logp": []} == {
        "schema": 1,
        "step": 60,
        "uid": 3,
        "group_uid": 0,
        "prompt": "Numbers: 2 3 4 <3>\nTarget: 14",
        "completion": "(3+4)*2=14",
        "tokens": [],
        "unmask_step": [],
        "logp": [],
        "reward": 1.0,
        "status": "ok",
        "length": 11,
        "forwards": 8,
        "sampler": {},
    }


def test_text_of_a_model_cannot_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "quick", steps=10)
    (run / "metrics.jsonl").unlink()
    rollouts, _, strings = make_rollouts(1)
    strings[0][0] = "<script>"
    dump_rollouts(rollout_path(run, 10), 10, rollouts, [("</div><script>alert(1)</script>", "")], strings)
    html = write_report([run]).read_text()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert html.count("<script") == len(scripts) == 3 and "<" not in scripts[1], "the player, the samples as data, and what opens them"
    assert json.loads(scripts[1])[0]["tokens"][0] == "<script>" and "&lt;script&gt;" in html and Page(html).open == []
    assert len(json.loads(scripts[1])) == html.count('role="button" tabindex="0"') == 1, "each sample opens its timeline"


def test_report_compares_groups_over_seeds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"espo-seed{seed}", seed, 20, 0.7 + 0.02 * seed) for seed in range(3)]
    runs += [make_run(tmp_path / f"shuffled_s{seed}", seed, 20, 0.5, **{"task.shuffle_rewards": True}) for seed in range(2)]
    page = Page(write_report(runs).read_text())
    assert "espo 3 50.0%" in page.words and "shuffled 2 50.0%" in page.words and "mean of 3 seeds" in page.words
    assert "espo-seed2" in page.words and "task.shuffle_rewards False True" in page.words
    assert "+19.0, +20.9, +22.8" in page.words
    assert page.open == []


def test_empty_and_torn_runs_have_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "No metrics yet." in Page(write_report([tmp_path / "empty"]).read_text()).words
    run = make_run(tmp_path / "going", steps=10, planned=500)
    rows = [{"step": 0}, {"phase": "online", "step": 0, "eval/accuracy": 0.5}, {"phase": "online", "step": 1, "kl": None, "reward/mean": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"phase": "online", "step": 2, "rew')
    page = Page(write_report([run]).read_text())
    assert "online step 1 of 500" in page.words and "in progress" in page.words and "50.0% \u2192 50.0%" in page.words
    page = Page(write_report([run, tmp_path / "empty"], output=tmp_path / "both.html").read_text())
    assert page.open == [] and "no evaluation yet" in page.words and (tmp_path / "both.html").exists()


def test_missing_folder_and_broken_dump_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a run folder"):
        write_report([tmp_path / "nowhere"])
    file = tmp_path / "step_00001.jsonl"
    file.write_text('{"schema": 1}\n{"schema"\n')
    with pytest.raises(DataError, match="line 2"):
        read_rollouts(file)
    file.write_text('{"schema": 9}\n')
    with pytest.raises(DataError, match="schema 9"):
        read_rollouts(file)


def test_dumps_come_in_order_of_steps(tmp_path: Path) -> None:
    for step in (5, 100000, 90):
        dump_rollouts(rollout_path(tmp_path, step), step, [], [], [])
    assert [path.name for path in rollout_files(tmp_path)] == ["step_00005.jsonl", "step_00090.jsonl", "step_100000.jsonl"]


@pytest.mark.parametrize(
    ("name", "seed", "group"),
    [("espo-seed12", 12, "espo"), ("espo_s0", None, "espo"), ("espo-3", 3, "espo"), ("llada-8", 0, "llada-8"), ("seed1", 1, "parent")],
)
def test_group_name(name: str, seed: int | None, group: str) -> None:
    assert group_name(Path("parent") / name, seed) == group


def test_differences_leave_out_names_and_seeds() -> None:
    first = {"run.seed": 0, "run.name": "a", "sampler.steps": 8, "task.shuffle_rewards": False}
    second = {"run.seed": 1, "run.name": "b", "sampler.steps": 8, "task.shuffle_rewards": True, "model.path": "x"}
    assert differences({"a": first, "b": second}) == [("task.shuffle_rewards", ["False", "True"]), ("model.path", ["-", "x"])]


def test_over_seeds_uses_the_steps_that_all_runs_have() -> None:
    steps, mean, low, high = over_seeds([([0, 1, 2], [0.0, 1.0, 5.0]), ([0, 1], [2.0, 3.0])])
    assert steps.tolist() == [0, 1] and mean.tolist() == [1.0, 2.0] and low.tolist() == [0.0, 1.0] and high.tolist() == [2.0, 3.0]


def test_smoothing_keeps_lines() -> None:
    line = np.arange(200.0)
    assert np.allclose(smoothed(line)[5:-5], line[5:-5]) and smoothed(line)[0] == np.mean(line[:6])
    assert smoothed([3.0]).tolist() == [3.0] and smoothed([]).tolist() == []


def test_a_panel_can_be_saved_as_png(tmp_path: Path) -> None:
    plot = draw_panel(PANELS[0], [SeedGroup("quick", [make_rows(0, 20, 0.8)])], NUM_PROBLEMS)
    assert plot is not None and plot.wide
    plot.save(tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_recipe_counts_as_finished(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, [{"phase": "online", "step": 1}], None)
    assert run.group == tmp_path.name and run.num_problems is None


def test_accuracy_plot_is_saved_and_a_run_without_evaluation_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    log = MetricsLog(run / "metrics.jsonl")
    with pytest.raises(DataError, match="no evaluation yet"):
        save_accuracy_plot([run], tmp_path / "accuracy.png")
    for step in (0, 10):
        log.write({"phase": "online", "step": step, "eval/accuracy": step / 20, "eval/num_problems": 512})
    assert save_accuracy_plot([run], tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_failed_grades_and_steps_without_signal_stand_in_red(tmp_path: Path) -> None:
    rows = [
        {"phase": "online", "step": 1, "wall_s": 1.0, "reward/invalid_share": 0.25, "reward/first_failure": "crashed, KeyError: 'gold'"},
        {"phase": "online", "step": 2, "wall_s": 2.0, "reward/invalid_share": 0.0, "group/no_signal_share": 1.0},
        {"phase": "online", "step": 3, "wall_s": 3.0, "reward/invalid_share": 0.0, "group/no_signal_share": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([tmp_path]).read_text()
    assert page.count('<p class="alarm"') == 2
    assert "1 steps have completions that could not be graded (25% of theirs), first of step 1: crashed, KeyError" in page
    assert "1 of 3 steps taught nothing" in page
