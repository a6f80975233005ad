"""The reward worker: grades completions with the graders that a recipe names."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from rewards import load_grader
from rlhub.types import RewardResult


class RewardWorker:
    """One reward worker. A grader that raises gives status `crashed`; one that hangs is ended with its process by the pool's deadline."""

    def __init__(self, part: dict[str, Any]) -> None:
        self.grader = load_grader(part)

    def grade(self, items: Sequence[tuple[str, str, dict[str, Any]]]) -> list[RewardResult]:
        """One result per `(prompt, completion, columns)`."""
        return [self._grade(*item) for item in items]

    def _grade(self, prompt: str, completion: str, columns: dict[str, Any]) -> RewardResult:
        try:
            return self.grader(prompt, completion, columns)
        except Exception:  # a user's grader is a process boundary: its failure is a status, not the end of the run
            return RewardResult(float("nan"), "crashed", traceback.format_exc(limit=2))
