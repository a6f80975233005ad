"""Runs in one process: the run folder, resume after any interruption, failing graders, and the loop driven with fake workers."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlhub.config.schema import Recipe
from rlhub.config.tasks import evaluation_task
from rlhub.errors import CheckpointError, DataError, RecipeError, UserError, WorkerHung, WorkerLost
from rlhub.evals.checkpoint import evaluate_checkpoint
from rlhub.noise import Noise
from rlhub.phases import Phase
from rlhub.records.metrics import read_metrics, without_clocks
from rlhub.records.progress import RunProgress
from rlhub.records.rollout_log import read_rollouts, rollout_path
from rlhub.records.trackers import Trackers
from rlhub.tasks import load_task, task_tokenizer
from rlhub.training import controller
from rlhub.training.grading import grade, shuffle_grades
from rlhub.training.rollouts import issue
from rlhub.training.run import train
from rlhub.training.session import Session, StopRequest
from rlhub.types import Receipt, RewardResult, Rollout
from workers.crew import GeneratorPool, GraderPool, LearnerGroup, ScorerGroup
from workers.generator import Generator, StaleWeights
from workers.placement import Crew, assemble, gather
from workers.reward import RewardWorker
from workers.runtimes.runtime import LocalRuntime, Resources
from workers.supervisor import Pool
from workers.transports.object_store import Transport


@pytest.fixture(autouse=True)
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own, and plots take longer than these runs; `finished` writes a real one."""
    monkeypatch.setattr("rlhub.training.run.write_report", lambda folders: folders[0] / "report.html")


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('finished')}"), silent())


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def rows(run: Path) -> list[dict]:
    return [without_clocks(row) for row in read_metrics(run / "metrics.jsonl")]


def weights(run: Path, checkpoint: str = "step_00004") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / "hf" / "model.safetensors")


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


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def test_failing_grades_are_counted_and_not_learned_from(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = train(tiny(f"run.output_dir={tmp_path}", "run.phases=[online]", "run.steps=2", grader="picky"), silent())
    samples = read_rollouts(rollout_path(run, 1))
    crashed = [sample for sample in samples if sample["status"] == "crashed"]
    assert 0 < len(crashed) < 16 and all(sample["reward"] is None for sample in crashed)
    assert rows(run)[1]["reward/invalid_share"] == len(crashed) / 16
    assert all(bool(value.isfinite().all()) for value in weights(run, "step_00002").values())


def test_a_grader_that_always_fails_teaches_nothing(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ("run.phases=[online]", "run.steps=2", "algorithm.kl.coefficient=0", "algorithm.reference=none")
    run = train(tiny(f"run.output_dir={tmp_path}", *overrides, grader="broken"), silent())
    assert [row["reward/invalid_share"] for row in rows(run)[1:]] == [1.0, 1.0]
    assert rows(run)[0]["eval/invalid_share"] == 1.0 and rows(run)[0]["eval/reward"] is None
    assert rows(run)[2]["reward/mean"] is None and rows(run)[2]["group/no_signal_share"] == 1.0
    first = load_file(run / "first_model" / "model.safetensors")
    assert distance(weights(run, "step_00002"), first) == 0.0


def test_shuffled_rewards_keep_the_grades_and_lose_their_owners(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ("run.phases=[online]", "run.steps=1")
    honest = train(tiny(f"run.output_dir={tmp_path}/honest", *overrides), silent())
    shuffled = train(tiny(f"run.output_dir={tmp_path}/shuffled", *overrides, "task.shuffle_rewards=true"), silent())
    # What is reported is what the grader said; what is learned from differs.
    assert read_rollouts(rollout_path(shuffled, 1)) == read_rollouts(rollout_path(honest, 1))
    assert distance(weights(shuffled, "step_00001"), weights(honest, "step_00001")) > 0
    rollouts = [rollout(number).graded(RewardResult(float(number))) for number in range(64)]
    moved = shuffle_grades(rollouts, Noise(0), 3)
    values = [one.reward.value for one in moved]
    assert sorted(values) == list(range(64)) and values != sorted(values) and [one.uid for one in moved] == list(range(64))
    assert values == [one.reward.value for one in shuffle_grades(rollouts, Noise(0), 3)]
    assert values != [one.reward.value for one in shuffle_grades(rollouts, Noise(0), 4)]


def rollout(uid: int) -> Rollout:
    logp = np.zeros(4, np.float32)
    return Rollout(uid, uid // 4, np.arange(4), np.arange(4, dtype=np.int32), 4, np.arange(4), logp, logp, np.zeros(4, np.int32), 4)


def test_eval_repeats_what_the_run_measured_last(finished: Path) -> None:
    last, again = rows(finished)[-1], evaluate_checkpoint(finished)
    assert {key: value for key, value in last.items() if key.startswith("eval/")} == again
    assert evaluate_checkpoint(finished / "checkpoints" / "sft_step_00002", ["task.eval_rows=8"])["eval/num_problems"] == 8


def test_sft_needs_demonstrations_that_fit(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(f"run.output_dir={tmp_path}", "sampler.length=2", "sampler.block_length=2", "sampler.steps=2")
    with pytest.raises(DataError, match=r"demonstration of row 0 has 4 tokens, sampler\.length is 2; raise it"):
        train(recipe, silent())


# ------------------------------------------------------------------------------------------------------------- fake workers


class Scripted:
    """A worker that answers, or fails as its script says; the calls of all are in one list."""

    def __init__(self, label: str, calls: list, script: list) -> None:
        self.label, self.calls, self.script = label, calls, script

    def work(self, piece: object) -> str:
        self.calls.append((self.label, piece))
        failure = self.script.pop(0) if self.script else None
        if failure is not None:
            raise failure
        return f"done {piece}"

    def grade(self, items: list) -> list[RewardResult]:
        self.calls.append(items)
        if any("poison" in completion for _, completion, _ in items):
            raise WorkerLost("reward-0 died")
        return [RewardResult(float(len(completion))) for _, completion, _ in items[:3]]


class Late(LocalRuntime):
    """Futures are done in the reverse order of submission, one at a time."""

    def wait(self, futures: list, timeout: float | None) -> list:
        return futures[-1:]


def scripted_pool(runtime: LocalRuntime, *scripts: list, **options: object) -> tuple[Pool, list]:
    calls: list = []
    handles = [
        runtime.spawn(f"worker-{index}", Scripted, Resources(), label=f"worker-{index}", calls=calls, script=list(script))
        for index, script in enumerate(scripts)
    ]
    return Pool(runtime, handles, **options), calls


@pytest.mark.parametrize("runtime", [LocalRuntime, Late])
def test_results_come_in_order_whoever_finishes_first(runtime: type) -> None:
    pool, calls = scripted_pool(runtime(), [], [], [])
    assert pool.map(Scripted.work, [(number,) for number in range(7)]) == [f"done {number}" for number in range(7)]
    assert sorted(piece for _, piece in calls) == list(range(7)) and {name for name, _ in calls} == {"worker-0", "worker-1", "worker-2"}
    assert pool.map(Scripted.work, []) == []


def test_a_lost_piece_is_done_again() -> None:
    pool, calls = scripted_pool(LocalRuntime(), [WorkerLost("killed")], [])
    assert pool.map(Scripted.work, [("a",), ("b",), ("c",)]) == ["done a", "done b", "done c"]
    assert sorted(piece for _, piece in calls) == ["a", "a", "b", "c"] and pool.num_lost == 1


def test_a_piece_that_kills_its_workers_is_given_up_or_raised() -> None:
    failures = [WorkerLost("killed")] * 3
    pool, calls = scripted_pool(LocalRuntime(), failures)
    assert pool.map(Scripted.work, [("a",), ("b",)], give_up=lambda index, error: f"gave up {index}: {error}")[1] in (
        "done b",
        "gave up 1: killed",
    )
    assert len(calls) <= 6
    pool, calls = scripted_pool(LocalRuntime(), [WorkerLost("one"), WorkerLost("two"), WorkerLost("three")])
    with pytest.raises(WorkerLost, match="three"):
        pool.map(Scripted.work, [("a",)])
    assert len(calls) == 3


def test_an_error_of_the_work_itself_is_raised_at_once() -> None:
    pool, calls = scripted_pool(LocalRuntime(), [DataError("row 7 is bad")])
    with pytest.raises(DataError, match="row 7"):
        pool.map(Scripted.work, [("a",)])
    assert len(calls) == 1


def test_stale_workers_are_brought_up_to_date_and_keep_their_piece() -> None:
    refreshed: list[str] = []
    pool, _ = scripted_pool(LocalRuntime(), [StaleWeights("old")] * 4)
    pool.refresh = lambda handle: refreshed.append(handle.name)
    assert pool.map(Scripted.work, [("a",)]) == ["done a"] and refreshed == ["worker-0"] * 4 and pool.num_lost == 0


def test_a_worker_that_dies_while_it_is_brought_up_to_date_is_tried_again() -> None:
    attempts: list[str] = []

    def refresh(handle: object) -> None:
        attempts.append("refresh")
        if len(attempts) == 1:
            raise WorkerLost("killed again")

    pool, _ = scripted_pool(LocalRuntime(), [StaleWeights("old"), StaleWeights("old")], refresh=refresh)
    assert pool.map(Scripted.work, [("a",)]) == ["done a"] and len(attempts) == 2 and pool.num_lost == 1


class Rebuilding(LocalRuntime):
    """A lost worker does not answer pings until it was asked a number of times."""

    silent_for = 3
    pings = 0

    def ping(self, handle: object) -> object:
        self.pings += 1
        return super().submit(SimpleNamespace(name="ping", worker=self), Rebuilding._answer)

    def _answer(self) -> int:
        if self.pings <= self.silent_for:
            raise WorkerLost("still being rebuilt")
        return 1


def test_a_worker_gets_no_work_while_it_is_rebuilt() -> None:
    runtime = Rebuilding()
    pool, calls = scripted_pool(runtime, [WorkerLost("killed")])
    assert pool.map(Scripted.work, [("a",)]) == ["done a"]
    assert len(calls) == 2 and runtime.pings == 4


def test_a_pool_whose_workers_stay_away_gives_up() -> None:
    runtime = Rebuilding()
    runtime.silent_for = 10**9
    pool, _ = scripted_pool(runtime, [WorkerLost("killed")], patience=0.2)
    with pytest.raises(WorkerLost, match=r"none of worker-0 came back within 0\.2 s"):
        pool.map(Scripted.work, [("a",)])


def test_a_hanging_worker_is_ended_and_its_piece_done_elsewhere() -> None:
    ended: list[str] = []

    class Hanging(LocalRuntime):
        def wait(self, futures: list, timeout: float | None) -> list:
            return [future for future in futures if future.value != "done hang" or ended]

        def restart(self, handle: object) -> None:
            ended.append(handle.name)

    pool, _ = scripted_pool(Hanging(), [], [], deadline=0.05)
    assert pool.map(Scripted.work, [("hang",), ("b",)]) == ["done hang", "done b"] and ended == ["worker-0"]
    ended.clear()
    pool, _ = scripted_pool(Hanging(), [], deadline=0.05, attempts=1)
    assert isinstance(pool.map(Scripted.work, [("hang",)], give_up=lambda index, error: error)[0], WorkerHung)


def test_grades_of_a_batch_survive_the_completion_that_kills_its_grader(tiny: Callable[..., Recipe]) -> None:
    tokenizer = task_tokenizer("sort", {})
    recipe = tiny()
    issued = issue(load_task("sort", recipe.task.train, "train", 0), tokenizer, Phase.ONLINE, 1, 0, 10, 1)
    runtime, calls = LocalRuntime(), []
    graders = GraderPool(runtime, [runtime.spawn("reward-0", Scripted, Resources(), label="reward-0", calls=calls, script=[])], attempts=2)
    poisonous = SimpleNamespace(
        eos_token_id=tokenizer.eos_token_id, decode=lambda ids, skip_special_tokens: "poison" if ids[0] == 5 else "1 2"[: ids[0] % 3 + 1]
    )
    rollouts = [rollout(number) for number in range(10)]
    rollouts = [Rollout(**{**vars(one), "completion_ids": np.full(4, number, np.int32)}) for number, one in enumerate(rollouts)]
    graded, texts = grade(SimpleNamespace(graders=graders), issued, rollouts, poisonous, batch_size=5)
    assert [one.reward.status for one in graded] == ["ok"] * 5 + ["crashed"] + ["ok"] * 4
    assert [one.reward.value for one in graded if one.reward.valid] == [float(len(text)) for text in texts if text != "poison"]
    assert max(len(batch) for batch in calls) == 5


def test_a_grader_that_hangs_times_out_alone(tiny: Callable[..., Recipe]) -> None:
    worker = RewardWorker({"name": f"{tiny.folder}/graders.py:hanging"}, deadline_seconds=0.2)
    results = worker.grade([("", "1 2 3 4", {}), ("", "7 1 2 3", {})])
    assert [result.status for result in results] == ["ok", "timeout"] and np.isnan(results[1].value) and results[0].value == 1.0
    slow = RewardWorker({"name": f"{tiny.folder}/graders.py:slow"}, deadline_seconds=0.2)
    assert 1 <= len(slow.grade([("", "1 2 3 4", {})] * 100)) <= 8, "a call ends soon after one deadline, the rest is asked for again"


def test_the_first_failure_of_several_is_raised_and_a_death_explains_the_others() -> None:
    runtime = LocalRuntime()
    died = runtime.spawn("learner-1", Scripted, Resources(), label="b", calls=[], script=[WorkerLost("learner-1 died")])
    peer = runtime.spawn("learner-0", Scripted, Resources(), label="a", calls=[], script=[RuntimeError("connection closed by peer")])
    with pytest.raises(WorkerLost, match="learner-1"):
        gather(runtime, [runtime.submit(peer, Scripted.work, 0), runtime.submit(died, Scripted.work, 0)])
    assert gather(runtime, [runtime.submit(peer, Scripted.work, number) for number in range(3)]) == ["done 0", "done 1", "done 2"]


class Recording:
    """Every role at once: remembers its calls and answers with the least that the loop needs."""

    def __init__(self, role: str, calls: list) -> None:
        self.role, self.calls, self.version = role, calls, -1

    def __getattr__(self, method: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.calls.append((self.role, method, args))
            return None

        return call

    def make_views(self, batch: object) -> list[str]:
        self.calls.append((self.role, "make_views", (batch,)))
        return ["views"]

    def score(self, views: list, first: int, stride: int) -> dict:
        self.calls.append((self.role, "score", (views, first, stride)))
        return {0: f"scores of {views}"}

    def step(self, *args: object) -> dict:
        self.calls.append((self.role, "step", args))
        return {"loss": 1.0}

    def replay_check(self, rollouts: list) -> dict:
        self.calls.append((self.role, "replay_check", (len(rollouts),)))
        return {"replay/max_gap": 0.0}

    def publish(self, bucket_bytes: int):
        self.calls.append((self.role, "publish", ()))
        yield np.zeros(1)

    def receipt(self, version: int, bucket_bytes: int) -> Receipt:
        return Receipt(version, 1, 1, ("hash",), (0.0,))

    def receive(self, version: int, bucket_bytes: int, *buckets: object) -> Receipt:
        self.calls.append((self.role, "receive", (version,)))
        self.version = version
        return self.receipt(version, bucket_bytes)

    def generate(self, requests: list, settings: object, version: int) -> list[Rollout]:
        self.calls.append((self.role, "generate", (len(requests), version)))
        if version != self.version:
            raise StaleWeights("old")
        fields = vars(rollout(0)) | {"policy_version": np.full(4, version, np.int32)}
        return [Rollout(**{**fields, "uid": request.uid, "group_uid": request.group_uid}) for request in requests]

    def grade(self, items: list) -> list[RewardResult]:
        self.calls.append((self.role, "grade", (len(items),)))
        return [RewardResult(1.0)] * len(items)


def test_a_step_asks_every_role_in_turn(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(
        "run.phases=[online]", "run.steps=2", "run.eval_every=9", "roles.scorers=2", "roles.generators=2", "eval_temperatures=[0.0]"
    )
    calls: list = []
    runtime = LocalRuntime()

    def spawn(role: str, count: int = 1) -> list:
        return [runtime.spawn(f"{role}-{index}", Recording, Resources(), role=role, calls=calls) for index in range(count)]

    learners, config = spawn("learner", 2), recipe.weights
    crew = Crew(
        runtime,
        LearnerGroup(runtime, learners),
        ScorerGroup(runtime, spawn("scorer", 2)),
        GeneratorPool(runtime, spawn("generator", 2)),
        GraderPool(runtime, spawn("reward")),
        Transport(runtime, learners, config),
        2**20,
    )
    tokenizer, progress = task_tokenizer("sort", {}), RunProgress(enabled=False)
    task = load_task("sort", recipe.task.train, "train", 0)
    with Trackers(tmp_path) as trackers:
        session = Session(
            recipe, tmp_path, tmp_path, tokenizer, task, evaluation_task(recipe), crew, trackers, progress, None, StopRequest(progress)
        )
        controller.run_online(session)

    steps = [index for index, (role, method, _) in enumerate(calls) if (role, method) == ("learner", "step")]
    second = calls[steps[1] + 1 : steps[3] + 1]  # from the end of step 1 to the end of step 2's learning
    order = [f"{role}.{method}" for role, method, _ in second if method != "gather_only"]
    assert order == [
        "learner.publish",
        *["generator.receive"] * 2,
        *["generator.generate"] * 2,
        "reward.grade",
        "learner.make_views",
        *["scorer.score"] * 2,
        *["learner.replay_check"] * 2,
        *["learner.step"] * 2,
    ]
    assert [args for role, method, args in second if method == "generate"] == [(8, 1)] * 2, "half of 16 requests each, by weights 1"
    assert [args[1:] for role, method, args in second if method == "score"] == [(0, 2), (1, 2)]
    batch, views, *reference = second[-1][2]
    assert len(batch) == 16 and views == ["views"] and len(reference) == 2
    received = [args[0] for _, method, args in second if method in ("make_views", "step")]
    assert all(one is batch for one in received) and batch.credit.advantages.shape == (16,), "the credit is computed once, with the batch"
    # A generator that lost its weights between two steps is served the last version.
    crew.generators.handles[0].worker.version = -1
    issued = issue(task, tokenizer, Phase.ONLINE, 3, 0, 4, 4)
    assert len(crew.generators.map(Generator.generate, [(issued.requests, recipe.sampler, crew.version)])[0]) == 16
    assert crew.generators.handles[0].worker.version == crew.version == 2


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
