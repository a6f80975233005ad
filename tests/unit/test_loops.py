"""The loops driven with workers that record their calls: who is asked for what, and in which order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import recording_crew, session_of

from rlhub.config.schema import Recipe
from rlhub.phases import Phase
from rlhub.records.metrics import read_metrics
from rlhub.records.progress import RunProgress
from rlhub.records.trackers import Trackers
from rlhub.training import controller
from rlhub.training.rollouts import issue
from rlhub.training.session import StopRequest
from workers.generator import Generator

ONE_PHASE = ("run.phases=[online]", "run.eval_every=9", "eval_temperatures=[0.0]")


def driven(recipe: Recipe, folder: Path, **fields: Any) -> tuple[list, list[dict]]:
    """The calls and the metrics of an online phase."""
    crew, calls = recording_crew(recipe)
    with Trackers(folder) as trackers:
        controller.run_online(session_of(recipe, folder, crew, trackers, **fields))
    return calls, read_metrics(folder / "metrics.jsonl")


def test_a_step_asks_every_role_in_turn(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*ONE_PHASE, "run.steps=2", "roles.scorers=2", "roles.generators=2")
    crew, calls = recording_crew(recipe, num_learners=2)
    with Trackers(tmp_path) as trackers:
        session = session_of(recipe, tmp_path, crew, trackers)
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
    issued = issue(session.train_task, session.tokenizer, Phase.ONLINE, 3, 0, 4, 4)
    assert len(crew.generators.map(Generator.generate, [(issued.requests, recipe.sampler, crew.version)])[0]) == 16
    assert crew.generators.handles[0].worker.version == crew.version == 2


def test_the_schedule_of_a_phase_counts_every_update(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny("run.steps=3", "algorithm.updates=5", "sft.steps=7", "run.eval_every=99", "sft.eval_every=99")
    calls, _ = driven(recipe, tmp_path)
    (begun,) = [args for _, method, args in calls if method == "begin"]
    assert begun[:3] == (recipe.algorithm, recipe.learner.optimizer, 3 * 5)


@pytest.mark.parametrize(("every", "synced"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (9, [])])
def test_a_reference_follows_the_policy_every_so_many_steps(
    tiny: Callable[..., Recipe], tmp_path: Path, every: int, synced: list[int]
) -> None:
    recipe = tiny(*ONE_PHASE, "run.steps=5", "roles.scorers=1", f"algorithm.reference=sync_every:{every}")
    calls, _ = driven(recipe, tmp_path)
    assert [args[0] for role, method, args in calls if (role, method) == ("scorer", "receive")] == synced, "each the version of its step"
    saved = [args for role, method, args in calls if (role, method) == ("scorer", "save")]
    assert saved == [(str(tmp_path / "checkpoints" / f"step_{step:05d}" / "reference"),) for step in (2, 4, 5)]


def test_a_phase_without_a_reference_asks_no_scorer(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*ONE_PHASE, "run.steps=2", "roles.scorers=1", "algorithm.kl.coefficient=0")
    calls, _ = driven(recipe, tmp_path)
    assert not [method for role, method, _ in calls if role == "scorer"]
    (step, *_) = [args for _, method, args in calls if method == "step"]
    assert step[1:] == (None,), "no views are made ahead and nothing is scored"


def test_checkpoints_rollouts_and_evaluations_come_at_their_pace(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    pace = ("run.steps=7", "run.checkpoint_every=3", "run.rollouts_every=4", "run.eval_every=5", "run.keep_checkpoints=9")
    _, written = driven(tiny("run.phases=[online]", *pace, "algorithm.kl.coefficient=0"), tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00003", "step_00006", "step_00007"]
    assert [path.name for path in sorted((tmp_path / "rollouts").iterdir())] == [f"step_{step:05d}.jsonl" for step in (1, 4, 7)]
    assert [row["step"] for row in written] == list(range(8))
    assert [row["step"] for row in written if "eval/accuracy" in row] == [0, 5, 7]
    assert [row.get("sync/version") for row in written] == [None, 1, 2, 3, 4, 5, 6, 7], "the first is published before the clock of step 0"
    assert all(row["num_samples"] == 16 and row["throughput/samples_per_s"] > 0 for row in written[1:])


def test_versions_go_on_from_the_phase_before(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny("run.phases=[sft, online]", "sft.steps=6", "run.steps=2", "run.eval_every=9", "algorithm.kl.coefficient=0")
    calls, _ = driven(recipe, tmp_path)
    assert [args[0] for role, method, args in calls if (role, method) == ("generator", "receive")] == [6, 7, 8]
    (begun,) = [args for _, method, args in calls if method == "begin"]
    assert begun[3] == str(tmp_path / "checkpoints" / "sft_step_00006" / "hf"), "and from its weights"


def test_a_resumed_phase_makes_the_steps_that_are_missing(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*ONE_PHASE, "run.steps=4", "algorithm.kl.coefficient=0")
    calls, written = driven(recipe, tmp_path, position=("online", 2), wall_before=1000.0)
    assert [row["step"] for row in written] == [3, 4] and all(1000 < row["wall_s"] < 1100 for row in written)
    methods = [method for role, method, _ in calls if role == "learner"]
    assert methods[:2] == ["begin", "load"] and calls[1][2] == (str(tmp_path / "checkpoints" / "step_00002"),)
    assert [args[0] for role, method, args in calls if (role, method) == ("generator", "receive")] == [2, 3, 4]


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest(RunProgress(enabled=False)) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_request_to_stop_ends_after_its_step_with_a_checkpoint(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*ONE_PHASE, "run.steps=4", "run.checkpoint_every=9", "algorithm.kl.coefficient=0")
    stop = StopRequest(RunProgress(enabled=False))
    stop.requested = True
    with pytest.raises(KeyboardInterrupt):
        driven(recipe, tmp_path, stop=stop)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00001"]
