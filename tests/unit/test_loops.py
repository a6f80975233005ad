"""The loops driven with workers that record their calls: who is asked for what, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fakes import recording_crew, session_of

from rlhub.config.schema import Recipe
from rlhub.phases import Phase
from rlhub.records.trackers import Trackers
from rlhub.training import controller
from rlhub.training.rollouts import issue
from workers.generator import Generator

ONE_PHASE = ("run.phases=[online]", "run.eval_every=9", "eval_temperatures=[0.0]")


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
    crew, calls = recording_crew(recipe)
    with Trackers(tmp_path) as trackers:
        controller.run_online(session_of(recipe, tmp_path, crew, trackers))
    (begun,) = [args for _, method, args in calls if method == "begin"]
    assert begun[:3] == (recipe.algorithm, recipe.learner.optimizer, 3 * 5)
