"""Rewards of intermediate denoising states: planted graders, the batch that they become, and MDPO through the loop."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from rewards import Item
from rlhub.algorithm.batching import make_batch
from rlhub.algorithm.compose import Algorithm
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import Recipe
from rlhub.errors import RecipeError
from rlhub.noise import Noise
from rlhub.records.metrics import read_metrics
from rlhub.tasks._vocabulary import word_level
from rlhub.training.grading import grade_states, shuffle_grades
from rlhub.training.rollouts import Issued
from rlhub.training.run import train
from rlhub.types import NEVER, Example, Request, RewardResult, Rollout

MDPO = Path(__file__).parents[2] / "recipes" / "algorithms" / "mdpo.yaml"
TOKENIZER = word_level([str(digit) for digit in range(10)])
MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id
NAN = float("nan")


class Graders:
    """A pool of one reward worker with a planted grader; remembers what it was given."""

    def __init__(self, grader: Callable[[str], RewardResult]) -> None:
        self.grader, self.seen = grader, []

    def grade(self, batches: Sequence[Sequence[Item]]) -> list[list[RewardResult]]:
        self.seen += [item for items in batches for item in items]
        return [[self.grader(text) for _, text, _ in items] for items in batches]


def filled(text: str) -> RewardResult:
    """The share of a canvas of four that shows a digit."""
    return RewardResult(sum(word.isdigit() for word in text.split()) / 4)


def rollout(uid: int, completion: Sequence[int], unmask_step: Sequence[int], group: int = 0, reward: float = 1.0) -> Rollout:
    size = len(completion)
    return Rollout(
        uid=uid,
        group_uid=group,
        prompt_ids=np.array([1], dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        length=size,
        unmask_step=np.array(unmask_step, dtype=np.int16),
        logp_sample=np.zeros(size, dtype=np.float32),
        logp_model=np.zeros(size, dtype=np.float32),
        policy_version=np.zeros(size, dtype=np.int32),
        num_forwards=4,
        reward=RewardResult(reward),
    )


def grade(rollouts: Sequence[Rollout], grader=filled, every: int = 1, steps: int = 4, **options: object) -> tuple[list[Rollout], list[str]]:
    """The rollouts with step rewards, and the texts that were graded."""
    recipe = Recipe()
    recipe.sampler.steps, recipe.reward_pool.batch_size = steps, 2
    recipe.task.state_rewards = replace(recipe.task.state_rewards, every=every, **options)
    issued = Issued(
        [Request(one.uid, one.group_uid, one.prompt_ids) for one in rollouts],
        [Example(row, f"prompt {row}", {"row": row}) for row in range(len(rollouts))],
    )
    graders = Graders(grader)
    graded = grade_states(SimpleNamespace(graders=graders), issued, rollouts, TOKENIZER, recipe)
    assert all(prompt == f"prompt {columns['row']}" for prompt, _, columns in graders.seen)
    return graded, [text for _, text, _ in graders.seen]


def step_values(graded: Rollout) -> list[float]:
    return [result.value for result in graded.step_rewards]


def test_a_planted_grader_sees_every_state() -> None:
    graded, texts = grade([rollout(0, [5, 6, 7, 8], [2, 0, 3, 1]), rollout(1, [1, 2, 3, 4], [0, 0, 1, 2], reward=0.5)])
    assert texts == ["[MASK] 6 [MASK] [MASK]", "[MASK] 6 [MASK] 8", "5 6 [MASK] 8", "1 2 [MASK] [MASK]", "1 2 3 [MASK]"]
    # The last state is the completion: its grade is the rollout's own.
    assert [step_values(one) for one in graded] == [[0.25, 0.5, 0.75, 1.0], [0.5, 0.75, 0.5, 0.5]]
    assert [one.reward for one in graded] == [RewardResult(1.0), RewardResult(0.5)]


@pytest.mark.parametrize(("every", "expected"), [(2, [0.5, 0.5, 1.0, 1.0]), (3, [0.75, 0.75, 0.75, 1.0]), (4, [1.0] * 4), (9, [1.0] * 4)])
def test_steps_between_carry_the_next_grade(every: int, expected: list[float]) -> None:
    (graded,), texts = grade([rollout(0, [5, 6, 7, 8], [2, 0, 3, 1])], every=every)
    assert step_values(graded) == expected and len(texts) == (4 - 1) // every


def test_steps_that_commit_nothing_are_not_graded_again() -> None:
    (graded,), texts = grade([rollout(0, [5, 6, 7, 8], [2, 2, 5, 5])], steps=8)
    assert texts == ["[MASK] [MASK] [MASK] [MASK]", "5 6 [MASK] [MASK]"]
    assert step_values(graded) == [0, 0, 0.5, 0.5, 0.5, 1, 1, 1]


def test_states_end_at_eos_and_an_early_stop_fills_at_its_last_step() -> None:
    stopped = rollout(0, [5, EOS, EOS, EOS], [1, 0, NEVER, NEVER])
    unfilled = rollout(1, [5, MASK, 7, 8], [0, NEVER, 1, 2])
    graded, texts = grade([stopped, unfilled])
    assert texts == ["[MASK]", "5 [MASK] [MASK] [MASK]", "5 [MASK] 7 [MASK]"]
    assert [step_values(one) for one in graded] == [[0.0, 1.0, 1.0, 1.0], [0.25, 0.5, 1.0, 1.0]]


def test_masks_are_shown_as_the_recipe_says() -> None:
    _, texts = grade([rollout(0, [5, 6, 7, 8], [2, 0, 3, 1])], mask_text="_")
    assert texts == ["_ 6 _ _", "_ 6 _ 8", "5 6 _ 8"]


def test_nothing_is_graded_when_it_is_off() -> None:
    given = [rollout(0, [5, 6, 7, 8], [2, 0, 3, 1])]
    assert grade(given, every=0) == (given, [])
    assert make_batch(given, scored_length="canvas").step_rewards is None


# ------------------------------------------------------------------------------------------------------------------- batch


def with_steps(uid: int, group: int, *values: float | None) -> Rollout:
    """A rollout with these step rewards; None is a grader that crashed. The last one is its grade."""
    results = tuple(RewardResult(NAN, "crashed") if value is None else RewardResult(value) for value in values)
    return replace(rollout(uid, [5, 6, 7, 8], [0, 1, 2, 2], group), reward=results[-1], step_rewards=results)


@pytest.mark.parametrize(
    ("on_invalid", "expected"),
    [
        ("drop_sample", [[[1, 2, 3], [NAN] * 3], [[7, 8, 9], [4, 5, 6]]]),
        ("drop_group", [[[NAN] * 3, [NAN] * 3], [[7, 8, 9], [4, 5, 6]]]),
        ("value:-1", [[[1, 2, 3], [0, -1, 0]], [[7, 8, 9], [4, 5, 6]]]),
    ],
)
def test_the_batch_holds_them_by_group_and_member(on_invalid: str, expected: list) -> None:
    rollouts = [with_steps(30, 9, 4, 5, 6), with_steps(10, 3, 1, 2, 3), with_steps(11, 3, 0, None, 0), with_steps(29, 9, 7, 8, 9)]
    batch = make_batch(rollouts, scored_length="canvas", on_invalid=on_invalid)
    np.testing.assert_array_equal(batch.step_rewards, np.array(expected, dtype=float))
    np.testing.assert_array_equal(batch.rewards, np.array(expected, dtype=float)[:, :, -1])
    assert batch.valid.tolist() == (~np.isnan(np.array(expected, dtype=float)[:, :, 0])).ravel().tolist()


def test_rollouts_must_agree_on_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"same number of step rewards, got \[2, 3\]"):
        make_batch([with_steps(0, 0, 1, 2), with_steps(1, 0, 1, 2, 3)], scored_length="canvas")


def test_the_control_moves_them_with_their_grades() -> None:
    rollouts = [with_steps(uid, 0, uid, uid + 0.5) for uid in range(32)]
    moved = shuffle_grades(rollouts, Noise(0), 1)
    assert [one.uid for one in moved] == list(range(32)) and [one.reward for one in moved] != [one.reward for one in rollouts]
    assert all(step_values(one) == [one.reward.value - 0.5, one.reward.value] for one in moved)


def test_mdpo_credits_the_step_that_earned_it() -> None:
    """By hand: gains (1, 0, 0) and (0, 0, 1) plus means of what comes after, standardised over the two samples at each step."""
    batch = make_batch([with_steps(0, 0, 1, 1, 1), with_steps(1, 0, 0, 0, 1)], scored_length="canvas")
    credit = Algorithm.compose(load_recipe(MDPO).algorithm).credit(batch)
    raw = np.array([[1 + 1, 0 + 1, 0 + 1], [0 + 0.5, 0 + 1, 1 + 1]])
    expected = (raw - raw.mean(0)) / (raw.std(0, ddof=1) + 1e-4)
    np.testing.assert_allclose(credit.advantages.numpy(), expected, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------------- runs

PLANTED = '''
def sevens(prompt, completion, row):
    """The share of sevens; states between count half."""
    words = completion.split()
    return words.count("7") / 4 * (0.5 if "[MASK]" in words else 1.0)
'''


@pytest.fixture
def mdpo(tiny: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """The shipped MDPO block on a small sort task."""
    (tmp_path / "grader.py").write_text(PLANTED)
    (tmp_path / "mdpo.yaml").write_text(f"extends: [{tiny.folder}/tiny.yaml, {MDPO}]\n")
    base = [f"run.output_dir={tmp_path}", "run.phases=[online]", f"task.reward.name={tmp_path}/grader.py:sevens"]
    return lambda *overrides: load_recipe(tmp_path / "mdpo.yaml", [*base, *overrides])


def test_mdpo_trains_on_the_sort_task(mdpo) -> None:
    recipe = mdpo("run.steps=25", "run.eval_every=25", "run.checkpoint_every=25", "learner.optimizer.learning_rate=0.01")
    assert recipe.algorithm.advantage["name"] == "step_difference"
    run = train(recipe, Console(file=io.StringIO()))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "reward/mean" in row]
    assert len(rows) == 25 and all(row["step_reward/invalid_share"] == 0 for row in rows)
    assert all(0 <= row["step_reward/mean"] <= row["reward/mean"] for row in rows)
    first, last = (np.mean([row["reward/mean"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2


def test_step_advantages_without_states_are_refused(mdpo) -> None:
    with pytest.raises(RecipeError, match=r"task\.state_rewards\.every.*step_difference needs grades of intermediate states"):
        mdpo("task.state_rewards.every=0")
    with pytest.raises(RecipeError, match=r"task\.state_rewards\.every"):
        mdpo("task.state_rewards.every=-1")
