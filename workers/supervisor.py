"""A pool of interchangeable workers that survives the loss of any of them.

A piece of work that was on a worker when it died or passed its deadline is given to another one; the dead worker is rebuilt, brought up
to date and readmitted. Work is idempotent by construction (all randomness is keyed), so a repeated piece gives the same result.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhub.errors import WorkerLost
from workers.generator import StaleWeights
from workers.runtime import Handle, Runtime

log = logging.getLogger("rlhub")

PATIENCE = 120.0  # seconds that a pool waits for a worker to come back before it gives up


@dataclass
class Pool:
    """Workers of one role.

    Args:
        refresh: brings a worker up to date that refused work with StaleWeights (a rebuilt generator needs the current weights).
        deadline: seconds after which a piece of work counts as hanging and its worker is restarted; None waits for ever.
        attempts: times that one piece of work may be tried.
    """

    runtime: Runtime
    handles: list[Handle]
    refresh: Callable[[Handle], None] = lambda handle: None
    deadline: float | None = None
    attempts: int = 3
    num_lost: int = field(default=0, init=False)

    def map(
        self,
        method: str,
        pieces: Sequence[tuple[Any, ...]],
        on_done: Callable[[int], None] = lambda index: None,
        give_up: Callable[[int, Exception], Any] | None = None,
    ) -> list[Any]:
        """Results of `method(*piece)` in the order of `pieces`.

        Args:
            on_done: called with the index of each finished piece.
            give_up: result for a piece that failed `attempts` times; without it the last error is raised.

        Raises:
            WorkerLost: a piece failed too often, or no worker came back in time.
        """
        results: list[Any] = [None] * len(pieces)
        waiting = deque(range(len(pieces)))
        tries = [0] * len(pieces)
        idle = deque(self.handles)
        retry_at: dict[str, float] = {}
        running: dict[int, tuple[Any, Handle, int, float]] = {}
        last_success = time.monotonic()

        def failed(index: int, error: Exception) -> None:
            if tries[index] < self.attempts:
                waiting.append(index)
            elif give_up is not None:
                results[index] = give_up(index, error)
                on_done(index)
            else:
                raise error

        while waiting or running:
            for _ in range(len(idle)):
                handle = idle.popleft()
                if not waiting or retry_at.get(handle.name, 0.0) > time.monotonic():
                    idle.append(handle)
                    continue
                index = waiting.popleft()
                tries[index] += 1
                future = self.runtime.submit(handle, method, *pieces[index])
                running[id(future)] = (future, handle, index, time.monotonic())
            if not running:
                if time.monotonic() - last_success > PATIENCE:
                    raise WorkerLost(f"none of {', '.join(h.name for h in self.handles)} came back within {PATIENCE:g} s")
                time.sleep(0.05)
                continue
            ready = self.runtime.wait([entry[0] for entry in running.values()], timeout=0.5)
            for future in ready:
                _, handle, index, _ = running.pop(id(future))
                idle.append(handle)
                try:
                    results[index] = self.runtime.get(future)
                except StaleWeights:
                    tries[index] -= 1
                    waiting.appendleft(index)
                    self._refresh(handle, retry_at)
                except WorkerLost as error:
                    self.num_lost += 1
                    log.warning("%s lost piece %d: %s", handle.name, index, error)
                    retry_at[handle.name] = time.monotonic() + 0.5
                    # A worker that is being rebuilt refuses at once; that says nothing against the piece itself.
                    if "restarted" in str(error) and time.monotonic() - last_success < PATIENCE:
                        tries[index] -= 1
                    failed(index, error)
                else:
                    last_success = time.monotonic()
                    on_done(index)
            self._end_hanging(running, idle, failed)
        return results

    def _refresh(self, handle: Handle, retry_at: dict[str, float]) -> None:
        try:
            self.refresh(handle)
        except WorkerLost as error:
            log.warning("%s was lost while it was brought up to date: %s", handle.name, error)
            retry_at[handle.name] = time.monotonic() + 0.5

    def _end_hanging(self, running: dict, idle: deque, failed: Callable[[int, Exception], None]) -> None:
        if self.deadline is None:
            return
        for key, (_, handle, index, started) in list(running.items()):
            if time.monotonic() - started > self.deadline:
                del running[key]
                self.num_lost += 1
                log.warning("%s passed the deadline of %g s and is restarted", handle.name, self.deadline)
                self.runtime.restart(handle)
                idle.append(handle)
                failed(index, WorkerLost(f"{handle.name} hung for more than {self.deadline:g} s"))
