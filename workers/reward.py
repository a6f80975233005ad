"""The reward worker: grades completions with the graders that a recipe names."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rewards import load_grader
from rlhub.types import RewardResult


class RewardWorker:
    """One reward worker. A grader that raises gives status `crashed`, one that passes the deadline `timeout`.

    Args:
        part: the recipe's `task.reward`.
        deadline_seconds: of one completion. Code that does not return to Python is beyond it; the pool ends its process.
    """

    def __init__(self, part: dict[str, Any], deadline_seconds: float) -> None:
        self.grader, self.deadline_seconds = load_grader(part), deadline_seconds

    def grade(self, items: Sequence[tuple[str, str, dict[str, Any]]]) -> list[RewardResult]:
        """One result per `(prompt, completion, columns)`, in order, for as many as begin within one deadline.

        So a call takes at most two deadlines, and one that takes longer hangs.
        """
        results: list[RewardResult] = []
        until = time.monotonic() + self.deadline_seconds
        while len(results) < len(items) and (not results or time.monotonic() < until):
            results.append(self._grade(*items[len(results)]))
        return results

    def _grade(self, prompt: str, completion: str, columns: dict[str, Any]) -> RewardResult:
        try:
            with _deadline(self.deadline_seconds):
                return self.grader(prompt, completion, columns)
        except _Late:
            return RewardResult(float("nan"), "timeout", f"took longer than {self.deadline_seconds:g} s")
        except Exception:  # a user's grader is a process boundary: its failure is a status, not the end of the run
            return RewardResult(float("nan"), "crashed", traceback.format_exc(limit=2))


class _Late(BaseException):
    """Not an Exception, so that a grader does not catch it by accident."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread only
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
