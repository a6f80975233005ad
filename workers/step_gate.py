"""Letting other threads in between two steps of a loop, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """A loop in one thread that others can pause at its next step boundary.

    Whoever asks for a pause has its turn at the next boundary, however short the steps are, and at once where no loop runs. The loop goes
    on when the last pause that was asked for is over, also where what was done in it failed. A loop never takes a step during a pause.

    Example:
        >>> gate = StepGate()
        >>> with gate.loop():                     # one thread
        ...     for _ in range(3):
        ...         gate.step()                   # between two steps
        >>> with gate.paused():                   # any other thread
        ...     pass                              # the loop stands still
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._taken = False  # by the loop, or by a pause
        self._asked = 0  # pauses that wait for their turn

    @contextmanager
    def loop(self) -> Iterator[None]:
        """The time in which steps are taken. One loop at a time; pauses that are asked for come first."""
        self._take_for_loop()
        try:
            yield
        finally:
            self._give()

    def step(self) -> None:
        """Called by the loop between two steps: waits until all pauses that are asked for are over."""
        if self._asked:  # read without the lock, which would cost more than the rest; what is missed is seen at the next boundary
            self._give()
            self._take_for_loop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time in which no step is taken. Not to be called by the loop's own thread."""
        self.ask()
        with self._free:
            self._free.wait_for(lambda: not self._taken)
            self._taken, self._asked = True, self._asked - 1
        try:
            yield
        finally:
            self._give()

    def ask(self) -> None:
        """Ask for a pause; from now on the loop stops at its next boundary."""
        with self._free:
            self._asked += 1

    def _take_for_loop(self) -> None:
        with self._free:
            self._free.wait_for(lambda: not self._taken and not self._asked)
            self._taken = True

    def _give(self) -> None:
        with self._free:
            self._taken = False
            self._free.notify_all()
