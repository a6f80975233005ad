"""Grades of a batch: a completion that kills or hangs its grader costs no other its grade, and shuffled ones lose their owners."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from fakes import Scripted
from helpers import a_rollout

from rlhub.config.schema import Recipe
from rlhub.noise import Noise
from rlhub.phases import Phase
from rlhub.tasks import load_task, task_tokenizer
from rlhub.training.grading import grade, shuffle_grades
from rlhub.training.rollouts import issue
from rlhub.types import RewardResult, Rollout
from workers.crew import GraderPool
from workers.reward import RewardWorker
from workers.runtimes.runtime import LocalRuntime, Resources


def test_grades_of_a_batch_survive_the_completion_that_kills_its_grader(tiny: Callable[..., Recipe]) -> None:
    tokenizer = task_tokenizer("sort", {})
    recipe = tiny()
    issued = issue(load_task("sort", recipe.task.train, "train", 0), tokenizer, Phase.ONLINE, 1, 0, 10, 1)
    runtime, calls = LocalRuntime(), []
    graders = GraderPool(runtime, [runtime.spawn("reward-0", Scripted, Resources(), label="reward-0", calls=calls, script=[])], attempts=2)
    poisonous = SimpleNamespace(
        eos_token_id=tokenizer.eos_token_id, decode=lambda ids, skip_special_tokens: "poison" if ids[0] == 5 else "1 2"[: ids[0] % 3 + 1]
    )
    rollouts = [a_rollout(number) for number in range(10)]
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


def test_shuffled_grades_are_the_same_grades_of_other_owners() -> None:
    rollouts = [a_rollout(number).graded(RewardResult(float(number))) for number in range(64)]
    moved = shuffle_grades(rollouts, Noise(0), 3)
    values = [one.reward.value for one in moved]
    assert sorted(values) == list(range(64)) and values != sorted(values) and [one.uid for one in moved] == list(range(64))
    assert values == [one.reward.value for one in shuffle_grades(rollouts, Noise(0), 3)]
    assert values != [one.reward.value for one in shuffle_grades(rollouts, Noise(0), 4)]
