"""Runs in one process: the run folder, resume after any interruption, failing graders."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import distance, rows, silent, weights
from rich.console import Console
from safetensors.torch import load_file

from rlhub.config.schema import Recipe, SFTConfig
from rlhub.errors import CheckpointError, DataError, RecipeError, UserError
from rlhub.evals.checkpoint import evaluate_checkpoint
from rlhub.records.metrics import read_metrics
from rlhub.records.rollout_log import read_rollouts, rollout_path
from rlhub.reports.page import write_report
from rlhub.training.run import train
from workers.placement import assemble

pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhub.training.run.write_report", write_report)
        return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('finished')}"), silent())


def assert_same_run(run: Path, other: Path) -> None:
    assert rows(run) == rows(other)
    ours, theirs = weights(run), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def killed_after(run: Path, checkpoint: str, target: Path) -> Path:
    """A copy of a run as a kill would have left it some steps after one of its checkpoints."""
    copy = Path(shutil.copytree(run, target / run.name))
    order = ["sft_step_00002", "sft_step_00004", "step_00002", "step_00004"]
    later = order[order.index(checkpoint) + 1 :]
    for name in later:
        (copy / "checkpoints" / name / "manifest.json").unlink()
    for name in later[1:]:
        shutil.rmtree(copy / "checkpoints" / name)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"phase": "onl')
    return copy


def test_run_folder_holds_all_that_a_run_is(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "plan.txt", "plan.json", "metrics.jsonl", "rollouts", "checkpoints", "report.html", "logs"} <= names
    assert json.loads((finished / "plan.json").read_text())["batch"]["sequences"] == 16
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "sft_step_00002",
        "sft_step_00004",
        "step_00002",
        "step_00004",
    ]
    samples = read_rollouts(rollout_path(finished, 1))
    assert len(samples) == 16 and {sample["status"] for sample in samples} == {"ok"}
    assert len({sample["uid"] for sample in samples}) == 16 and len({sample["group_uid"] for sample in samples}) == 4


def test_metrics_have_every_step_and_held_out_accuracy_at_both_ends(finished: Path) -> None:
    written = read_metrics(finished / "metrics.jsonl")
    assert [(row["phase"], row["step"]) for row in written] == [(phase, step) for phase in ("sft", "online") for step in range(5)]
    evaluated = [(row["phase"], row["step"]) for row in written if "eval/accuracy" in row and "eval/accuracy_t1" in row]
    assert evaluated == [(phase, step) for phase in ("sft", "online") for step in (0, 2, 4)]
    online = written[6:]
    assert all(row["num_samples"] == 16 and row["sync/receipt_ok"] == 1.0 for row in online)
    assert [row["sync/version"] for row in online] == [5, 6, 7, 8]
    assert {"reward/mean", "kl", "ess", "time/generate_s", "time/overhead_s", "elbo/standard_error"} <= set(online[0])
    clock = [row["wall_s"] for row in written]
    assert clock == sorted(clock)


def test_schedules_end_with_their_phase(finished: Path) -> None:
    """Linear to a tenth over 4 steps of SFT, with 5 steps of warm-up cut to 3, and over 4 x 2 inner updates of RL."""
    rates = {
        phase: [row["learning_rate"] for row in rows(finished) if row["phase"] == phase and row["step"]] for phase in ("sft", "online")
    }
    assert rates["online"] == pytest.approx([1e-3 * (1 - 0.9 * (2 * step - 1) / 8) for step in range(1, 5)])
    peak = SFTConfig().optimizer.learning_rate
    assert rates["sft"] == pytest.approx([peak * factor for factor in (0.25, 0.5, 0.75, 1)])


def test_training_changes_the_weights_and_sft_ends_where_rl_begins(finished: Path) -> None:
    first, sft, last = (load_file(path / "model.safetensors") for path in (finished / "first_model", *hf(finished, 4)))
    assert any(not torch.equal(first[name], sft[name]) for name in first)
    assert any(not torch.equal(sft[name], last[name]) for name in first)
    written = rows(finished)
    assert written[4]["eval/reward_t1"] == written[5]["eval/reward_t1"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(f"run.output_dir={tmp_path}", "sft.optimizer.learning_rate=1e30", "sft.optimizer.warmup_steps=0", "sft.steps=20")
    with pytest.raises(UserError, match=r"gradient norm is (nan|inf).*lower learning rate"):
        train(recipe, silent())
    for checkpoint in (tmp_path / "tiny" / "checkpoints").glob("*/hf/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint).values())


def hf(run: Path, step: int) -> list[Path]:
    return [run / "checkpoints" / f"{phase}step_{step:05d}" / "hf" for phase in ("sft_", "")]


@pytest.mark.parametrize("checkpoint", ["sft_step_00002", "sft_step_00004", "step_00002"])
def test_a_killed_run_ends_as_if_it_never_was(finished: Path, tiny: Callable[..., Recipe], tmp_path: Path, checkpoint: str) -> None:
    killed = killed_after(finished, checkpoint, tmp_path)
    assert train(tiny(f"run.output_dir={tmp_path}"), silent()) == killed
    assert_same_run(killed, finished)
    for step in range(1, 5):
        assert read_rollouts(rollout_path(killed, step)) == read_rollouts(rollout_path(finished, step))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    finished: Path, tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    killed = Path(shutil.copytree(finished, tmp_path / "tiny"))
    shutil.rmtree(killed / "checkpoints")
    train(tiny(f"run.output_dir={tmp_path}"), silent())
    assert_same_run(killed, finished)


def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    whole, stopped = (
        tiny(f"run.output_dir={tmp_path}/whole", grader="stopping"),
        tiny(f"run.output_dir={tmp_path}/stopped", grader="stopping"),
    )
    for recipe in (whole, stopped):
        recipe.run.phases, recipe.run.checkpoint_every = ["online"], 100
    (tiny.folder / "stop").touch()  # the first grade, before step 1
    with pytest.raises(KeyboardInterrupt):
        train(stopped, silent())
    assert [path.name for path in (tmp_path / "stopped/tiny/checkpoints").iterdir()] == ["step_00001"]
    assert_same_run(train(stopped, silent()), train(whole, silent()))


def test_a_finished_run_says_so_and_trains_no_more(finished: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    before = (tmp_path / "tiny" / "metrics.jsonl").read_bytes()
    console = silent()
    train(tiny(f"run.output_dir={tmp_path}"), console)
    assert "this run is finished (phase online, step 4); nothing to do" in console.file.getvalue()
    assert (tmp_path / "tiny" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=5", r"holds a run with run\.steps=4, the recipe says 5.*nothing was overwritten"),
        ("learner.optimizer.learning_rate=0.5", r"learner\.optimizer\.learning_rate=0\.001, the recipe says 0\.5"),
        ("run.resume=false", r"holds a run already and run\.resume is false.*nothing was overwritten"),
    ],
)
def test_a_folder_with_another_run_is_left_alone(
    finished: Path, tiny: Callable[..., Recipe], tmp_path: Path, override: str, message: str
) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    before = contents(tmp_path)
    with pytest.raises(RecipeError, match=message):
        train(tiny(f"run.output_dir={tmp_path}", override), silent())
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_of_other_things_is_left_alone(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        train(tiny(f"run.output_dir={tmp_path}"), silent())
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["thesis.tex"]


def test_a_start_that_failed_leaves_the_name_free_for_a_mended_recipe(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    mended = tiny(f"run.output_dir={tmp_path}", "run.phases=[online]", "run.steps=1", "model.config.n_layers=1")
    broken = tiny(f"run.output_dir={tmp_path}", "run.phases=[online]", "run.steps=1")
    broken.task.reward = {"name": f"{tmp_path}/nowhere.py:reward"}
    with pytest.raises(ValueError, match=r"nowhere\.py"):
        train(broken, silent())
    assert read_metrics(train(mended, silent()) / "metrics.jsonl")[-1]["step"] == 1


@pytest.mark.parametrize("damaged", ["learner/learner.pt", "hf/model.safetensors", "manifest.json"])
def test_a_corrupt_checkpoint_is_refused_in_one_line(finished: Path, tiny: Callable[..., Recipe], tmp_path: Path, damaged: str) -> None:
    killed = killed_after(finished, "step_00002", tmp_path)
    file = killed / "checkpoints" / "step_00002" / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        train(tiny(f"run.output_dir={tmp_path}"), silent())
    assert "\n" not in str(caught.value) and f"delete {file.parents[damaged.count('/')]} to use an older one" in str(caught.value)
    shutil.rmtree(killed / "checkpoints" / "step_00002")
    train(tiny(f"run.output_dir={tmp_path}"), silent())
    assert_same_run(killed, finished)


def test_unsealed_checkpoints_are_removed(finished: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    killed = killed_after(finished, "step_00002", tmp_path)
    leftover = killed / "checkpoints" / "step_00003"
    leftover.mkdir()
    (leftover / "half.pt").write_bytes(b"torn")
    train(tiny(f"run.output_dir={tmp_path}"), silent())
    assert not leftover.exists() and (killed / "checkpoints" / "step_00004" / "manifest.json").exists()


def test_old_checkpoints_go_and_the_end_of_sft_stays(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = train(tiny(f"run.output_dir={tmp_path}", "run.keep_checkpoints=1", "run.checkpoint_every=1"), silent())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["sft_step_00004", "step_00004"]


def test_a_reference_that_follows_the_policy_resumes_identically(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ("run.phases=[online]", "algorithm.reference=sync_every:1", "run.checkpoint_every=1")
    whole = train(tiny(f"run.output_dir={tmp_path}/whole", *overrides), silent())
    moved, first = (load_file(whole / name / "model.safetensors") for name in ("checkpoints/step_00003/reference", "first_model"))
    assert all(torch.equal(moved[name], weights(whole, "step_00003")[name]) for name in moved)
    assert any(not torch.equal(moved[name], first[name]) for name in moved)
    killed = Path(shutil.copytree(whole, tmp_path / "killed" / "tiny"))
    shutil.rmtree(killed / "checkpoints" / "step_00004")
    train(tiny(f"run.output_dir={tmp_path}/killed", *overrides), silent())
    assert_same_run(killed, whole)


def test_micro_batches_do_not_change_what_is_learned(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    final = []
    for tokens in (16, 4096):  # two rows, and everything at once
        overrides = ("run.phases=[online]", "run.steps=2", f"learner.micro_batch_tokens={tokens}", f"run.output_dir={tmp_path}/{tokens}")
        run = train(tiny(*overrides), silent())
        final.append(weights(run, "step_00002"))
    first = load_file(run / "first_model" / "model.safetensors")
    assert distance(*final) <= 1e-3 * distance(first, final[0])


def test_failing_grades_are_counted_and_not_learned_from(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = train(tiny(f"run.output_dir={tmp_path}", "run.phases=[online]", "run.steps=2", grader="picky"), silent())
    samples = read_rollouts(rollout_path(run, 1))
    crashed = [sample for sample in samples if sample["status"] == "crashed"]
    assert 0 < len(crashed) < 16 and all(sample["reward"] is None for sample in crashed)
    assert rows(run)[1]["reward/invalid_share"] == len(crashed) / 16
    assert all(bool(value.isfinite().all()) for value in weights(run, "step_00002").values())


def test_a_grader_that_always_fails_teaches_nothing(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    """The trial before the first step is left out here, as for a grader that fails from then on."""
    overrides = ("run.phases=[online]", "run.steps=2", "algorithm.kl.coefficient=0", "algorithm.reference=none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhub.training.run.try_grader", lambda *_: None)
        run = train(tiny(f"run.output_dir={tmp_path}", *overrides, grader="broken"), silent())
    assert [row["reward/invalid_share"] for row in rows(run)[1:]] == [1.0, 1.0]
    assert rows(run)[0]["eval/invalid_share"] == 1.0 and rows(run)[0]["eval/reward"] is None
    assert rows(run)[2]["reward/mean"] is None and rows(run)[2]["group/no_signal_share"] == 1.0
    first = load_file(run / "first_model" / "model.safetensors")
    assert distance(weights(run, "step_00002"), first) == 0.0


def test_shuffled_rewards_are_learned_from_and_not_reported(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ("run.phases=[online]", "run.steps=1")
    honest = train(tiny(f"run.output_dir={tmp_path}/honest", *overrides), silent())
    shuffled = train(tiny(f"run.output_dir={tmp_path}/shuffled", *overrides, "task.shuffle_rewards=true"), silent())
    assert read_rollouts(rollout_path(shuffled, 1)) == read_rollouts(rollout_path(honest, 1))
    assert distance(weights(shuffled, "step_00001"), weights(honest, "step_00001")) > 0


def test_eval_repeats_what_the_run_measured_last(finished: Path) -> None:
    last, again = rows(finished)[-1], evaluate_checkpoint(finished)
    assert {key: value for key, value in last.items() if key.startswith("eval/")} == again
    assert evaluate_checkpoint(finished / "checkpoints" / "sft_step_00002", ["task.eval_rows=8"])["eval/num_problems"] == 8


def test_sft_needs_demonstrations_that_fit(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(f"run.output_dir={tmp_path}", "sampler.length=2", "sampler.block_length=2", "sampler.steps=2")
    with pytest.raises(DataError, match=r"demonstration of row 0 has 4 tokens, sampler\.length is 2; raise it"):
        train(recipe, silent())


def test_runs_do_not_need_the_main_thread(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    results: list[Path] = []
    recipe = tiny(f"run.output_dir={tmp_path}", "run.phases=[online]", "run.steps=1")
    thread = threading.Thread(target=lambda: results.append(train(recipe, silent())))
    thread.start()
    thread.join(120)
    assert results == [tmp_path / "tiny"]


def test_a_crew_that_cannot_be_completed_says_why(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        assemble(tiny(), tmp_path / "missing")


def test_held_out_rows_that_are_training_rows_are_refused_or_told(tiny: Callable[..., Recipe], finished: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": text, "completion": text, "answer": text}) for text in ("2 1", "1 2", "3 4", "4 3")]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:3]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[2:]))
    options = [f"run.output_dir={tmp_path}", f"model.path={finished}", "task.name=jsonl", "run.phases=[sft]"]
    task = f"task.train={{path: {tmp_path}/train.jsonl, completion: completion}}"
    with pytest.raises(RecipeError, match="all 3 test prompts are training prompts too"):
        train(tiny(*options, task), silent())
    console = Console(file=io.StringIO(), width=200)
    train(tiny(*options, task, f"task.eval={{path: {tmp_path}/test.jsonl}}", "run.name=other"), console)
    assert "1 of 2 test prompts occur in the training data" in console.file.getvalue()
