"""A step gate for tests: what comes in from another thread comes at a known step, without waiting for time to pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from workers.step_gate import StepGate

PATIENCE = 60  # seconds; a deadlock fails instead of hanging


class Announcing(StepGate):
    """Makes a call in another thread after given steps, and takes no further step before somebody has asked for a pause.

    Attributes:
        calls: step (from 1) -> what is called after it.
        futures: of these calls.
    """

    def __init__(self, calls: dict[int, Callable[[], object]]) -> None:
        super().__init__()
        self.calls, self.steps, self.asked, self.threads = calls, 0, threading.Semaphore(0), ThreadPoolExecutor(4)
        self.futures: list[Future] = []

    def step(self) -> None:
        self.steps += 1
        if self.steps in self.calls:
            self.futures.append(self.threads.submit(self.calls[self.steps]))
            assert self.asked.acquire(timeout=PATIENCE)
        super().step()

    def ask(self) -> None:
        super().ask()
        self.asked.release()
