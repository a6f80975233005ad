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

from rlhub.errors import WorkerHung, WorkerLost
from workers.generator import StaleWeights
from workers.runtime import Handle, Runtime

log = logging.getLogger("rlhub")


@dataclass
class Pool:
    """Workers of one role.

    Args:
        refresh: brings a worker up to date that refused work with StaleWeights (a rebuilt generator needs the current weights).
        deadline: seconds after which a piece of work counts as hanging and its worker is restarted; None waits for ever.
        attempts: times that one piece of work may be tried.
        patience: seconds that the pool waits for a worker to come back when it has none left.
    """

    runtime: Runtime
    handles: list[Handle]
    refresh: Callable[[Handle], None] = lambda handle: None
    deadline: float | None = None
    attempts: int = 3
    patience: float = 120.0
    num_lost: int = field(default=0, init=False)
    _back: dict[str, Any] = field(default_factory=dict, init=False)  # the ping that a lost worker has yet to answer

    def map(self, method: str, pieces: Sequence[tuple[Any, ...]], give_up: Callable[[int, WorkerLost], Any] | None = None) -> list[Any]:
        """Results of `method(*piece)` in the order of `pieces`.

        Args:
            give_up: result for a piece that lost a worker `attempts` times; without it the last loss is raised.

        Raises:
            WorkerLost: a piece failed too often, or no worker came back in time.
        """
        results: list[Any] = [None] * len(pieces)
        waiting = deque(range(len(pieces)))
        tries = [0] * len(pieces)
        idle = deque(handle for handle in self.handles if handle.name not in self._back)
        running: dict[int, tuple[Any, Handle, int, float]] = {}
        alone_since = None  # when the pool had no worker left

        def lost(handle: Handle, index: int, error: WorkerLost) -> None:
            self._lose(handle, error)
            if tries[index] < self.attempts:
                waiting.append(index)
            elif give_up is not None:
                results[index] = give_up(index, error)
            else:
                raise error

        while waiting or running:
            idle.extend(self._returned(wait=not idle and not running))
            while idle and waiting:
                handle, index = idle.popleft(), waiting.popleft()
                tries[index] += 1
                future = self.runtime.submit(handle, method, *pieces[index])
                running[id(future)] = (future, handle, index, time.monotonic())
            if running:
                alone_since = None
            else:
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > self.patience:
                    raise WorkerLost(f"none of {', '.join(handle.name for handle in self.handles)} came back within {self.patience:g} s")
                continue
            for future in self.runtime.wait([entry[0] for entry in running.values()], timeout=0.5):
                _, handle, index, _ = running.pop(id(future))
                try:
                    results[index] = self.runtime.get(future)
                    idle.append(handle)
                except StaleWeights:
                    tries[index] -= 1
                    waiting.appendleft(index)
                    try:
                        self.refresh(handle)
                        idle.append(handle)
                    except WorkerLost as error:
                        self._lose(handle, error)
                except WorkerLost as error:
                    lost(handle, index, error)
            for key, (_, handle, index, started) in list(running.items()):
                if self.deadline is not None and time.monotonic() - started > self.deadline:
                    del running[key]
                    self.runtime.restart(handle)
                    lost(handle, index, WorkerHung(f"{handle.name} hung for more than {self.deadline:g} s"))
        return results

    def _lose(self, handle: Handle, error: WorkerLost) -> None:
        self.num_lost += 1
        log.warning("%s", error)
        self._back[handle.name] = self.runtime.ping(handle)

    def _returned(self, wait: bool) -> list[Handle]:
        """Lost workers that answer again; `wait` gives them half a second to do so."""
        returned = []
        for handle in self.handles:
            ping = self._back.get(handle.name)
            if ping is None or not self.runtime.wait([ping], timeout=0.5 if wait else 0):
                continue
            try:
                self.runtime.get(ping)
            except WorkerLost:  # still being rebuilt
                self._back[handle.name] = self.runtime.ping(handle)
            else:
                del self._back[handle.name]
                returned.append(handle)
        return returned
