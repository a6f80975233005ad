"""Loud failures of grading: rewards that cannot grade the task's rows, steps without a valid grade, steps without any signal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhub.algorithm.batching import grade_of
from rlhub.config.schema import Recipe
from rlhub.errors import UserError
from rlhub.records.step_record import Metrics
from rlhub.tasks import Task
from rlhub.training.grading import grade_items, reason_of
from rlhub.types import Rollout
from workers.crew import Crew

NUM_TRIED = 4  # rows that are graded before anything else
SILENT_STEPS = 5  # in a row that are told once
PLACEHOLDER = "0"  # the completion of a row without a demonstration


def try_grader(crew: Crew, recipe: Recipe, task: Task) -> None:
    """Grade a few rows of a task, with their demonstration where they have one, before anything is generated.

    Raises:
        UserError: none of them gets a valid grade; the message has the grader's own.
    """
    if not crew.graders.handles:
        return
    count = NUM_TRIED if task.size is None else min(NUM_TRIED, task.size)
    examples = [task.example(index) for index in range(count)]
    facts = {"rollout": {"num_tokens": 1, "num_forwards": 1, "length": recipe.sampler.length}}
    items = [(example.prompt, example.demonstration or PLACEHOLDER, example.columns | facts) for example in examples]
    results = grade_items(crew, items, recipe.reward_pool.batch_size)
    if results and not any(result.valid for result in results):
        raise UserError(
            f"the reward {recipe.task.reward['name']} grades none of the first {len(items)} {task.split} rows: {reason_of(results[0])}"
        )


@dataclass
class GradeWatch:
    """Counts steps in a row that taught nothing.

    Attributes:
        limit: steps in a row without a valid grade after which the run stops; see `reward_pool.failed_steps`.
    """

    limit: int
    num_failed: int = 0
    num_silent: int = 0

    def statuses(self, rollouts: Sequence[Rollout]) -> Metrics:
        """`reward/status/<status>`, how many completions have each that is no valid grade, and `reward/first_failure`, why the first has.

        Raises:
            UserError: this is the last of `limit` steps without any valid grade.
        """
        failures = [grade for grade in map(grade_of, rollouts) if not grade.valid]
        metrics: dict[str, float | int | str] = {
            f"reward/status/{status}": count for status, count in Counter(grade.status for grade in failures).items()
        }
        if failures:
            metrics["reward/first_failure"] = reason_of(failures[0])
        self.num_failed = self.num_failed + 1 if len(failures) == len(rollouts) else 0
        if failures and self.num_failed >= self.limit:
            raise UserError(
                f"{self.num_failed} steps in a row without a valid grade (reward_pool.failed_steps), the last one: {reason_of(failures[0])}"
            )
        return metrics

    def silence(self, metrics: Metrics) -> str | None:
        """One line when `SILENT_STEPS` steps in a row had no prompt whose completions differ in reward; None else."""
        self.num_silent = self.num_silent + 1 if metrics.get("group/no_signal_share") == 1.0 else 0
        if self.num_silent != SILENT_STEPS:
            return None
        return (
            f"{SILENT_STEPS} steps in a row taught nothing: all completions of each prompt have the same reward; "
            "see `rlhub report`, and try easier prompts, a higher sampler.temperature or more completions_per_prompt"
        )
