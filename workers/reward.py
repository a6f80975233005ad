"""The reward worker: grades completions with the reward that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rewards import Item
from rewards.pool import RewardPool, RewardPoolConfig
from rlhub.types import RewardResult


class RewardWorker:
    """One reward worker with its grading processes. A grader that raises or dies gives status `crashed`, one that passes its deadline
    `timeout`.

    Args:
        part: the recipe's `task.reward`.
        options: fields of the recipe's `reward_pool`.

    Raises:
        UserError: the grader cannot be loaded.
    """

    def __init__(self, part: dict[str, Any], **options: Any) -> None:
        self.config = RewardPoolConfig(**options)
        self.pool = RewardPool(part, self.config)

    def grade(self, items: Sequence[Item]) -> list[RewardResult]:
        """One result per `(prompt, completion, columns)`, in order, for the first ones that began within one deadline.

        So a call with many slow items ends soon, and the rest can be given to another worker.
        """
        results = self.pool.grade(items, budget_seconds=self.config.deadline_seconds)
        return list(takewhile(lambda result: result is not None, results))
