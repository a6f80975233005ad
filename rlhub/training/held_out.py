"""Held-out accuracy: the share of test problems whose grade is exactly 1."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhub.algorithm.batching import grade_of
from rlhub.config.schema import Recipe, SamplerConfig
from rlhub.phases import Phase
from rlhub.records.step_record import Metric
from rlhub.tasks import Task
from rlhub.training.grading import grade, reason_of
from rlhub.training.rollouts import evaluation_settings, issue
from workers.crew import Crew

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECE = 512  # problems issued at once


def accuracy_key(temperature: float) -> str:
    """`eval/accuracy` for greedy decoding, `eval/accuracy_t1` for temperature 1, and so on."""
    return "eval/accuracy" if temperature == 0 else f"eval/accuracy_t{temperature:g}"


def shared_prompts(train_task: Task, test_task: Task) -> int:
    """How many of the test prompts occur in a finite training split; 0 for an infinite one, whose module keeps the two apart."""
    if train_task.size is None or test_task.size is None:
        return 0
    trained = {repr(train_task.example(index).prompt) for index in range(train_task.size)}
    return sum(repr(test_task.example(index).prompt) in trained for index in range(test_task.size))


@dataclass(frozen=True)
class Measurement:
    """What one sampler setting did on the test problems.

    Attributes:
        values: float64 [problems], grades; NaN where the grader failed.
        accurate: bool [problems].
        forwards, tokens: sums over the completions; tokens through the first EOS.
        seconds: of generation, grading apart.
        first_failure: why the first completion without a valid grade has none.
    """

    values: np.ndarray
    accurate: np.ndarray
    forwards: int
    tokens: int
    seconds: float
    first_failure: str = ""

    @property
    def accuracy(self) -> float:
        return float(self.accurate.mean())

    @property
    def mean_reward(self) -> float:
        return float("nan") if np.isnan(self.values).all() else float(np.nanmean(self.values))

    @property
    def invalid_share(self) -> float:
        return float(np.isnan(self.values).mean())


def num_test_problems(recipe: Recipe, task: Task) -> int:
    """Problems of an evaluation: the first `task.eval_rows`, as far as there are that many."""
    return recipe.task.eval_rows if task.size is None else min(recipe.task.eval_rows, task.size)


def measure(crew: Crew, recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerFast, settings: SamplerConfig) -> Measurement:
    """One completion for each test problem, generated with `settings` and graded."""
    num_problems = num_test_problems(recipe, task)
    graded, seconds = [], 0.0
    for first in range(0, num_problems, PIECE):
        issued = issue(task, tokenizer, Phase.EVAL, first // PIECE, first, min(PIECE, num_problems - first), 1)
        started = time.perf_counter()
        rollouts = crew.generators.generate(issued.requests, settings, crew.version)
        seconds += time.perf_counter() - started
        graded += grade(crew, issued, rollouts, tokenizer, recipe.reward_pool.batch_size)[0]
    grades = [grade_of(rollout) for rollout in graded]
    return Measurement(
        values=np.array([grade.value if grade.valid else np.nan for grade in grades]),
        accurate=np.array([grade.accurate for grade in grades]),
        first_failure=next((reason_of(grade) for grade in grades if not grade.valid), ""),
        forwards=sum(rollout.num_forwards for rollout in graded),
        tokens=sum(rollout.length for rollout in graded),
        seconds=seconds,
    )


def evaluate(crew: Crew, recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerFast) -> dict[str, Metric]:
    """Accuracy, mean reward and share of failed grades on the first `task.eval_rows` problems at each of `eval_temperatures`.

    The noise is the same at every evaluation of a run, so that its curve is not blurred by it.
    """
    metrics: dict[str, Metric] = {}
    for temperature in recipe.eval_temperatures:
        measured = measure(crew, recipe, task, tokenizer, evaluation_settings(recipe.sampler, temperature))
        key = accuracy_key(temperature)
        metrics[key] = measured.accuracy
        metrics[key.replace("accuracy", "reward")] = measured.mean_reward
        metrics[key.replace("accuracy", "invalid_share")] = measured.invalid_share
        if measured.first_failure:
            metrics["eval/first_failure"] = measured.first_failure
    return metrics | {
        "eval/num_problems": num_test_problems(recipe, task),
        "eval/test_set": task.description,
        "eval/test_hash": task.fingerprint()[:16],
    }
