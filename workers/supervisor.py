"""A pool of interchangeable workers that survives the loss of any of them.

A piece of work that was on a worker when it died or passed its deadline is given to another one; the dead worker is rebuilt, brought up
to date and readmitted. Work is idempotent by construction (all randomness is keyed), so a repeated piece gives the same result.

Work may go on in the background: `begin` hands it out, and `collect` waits for it later. Each worker takes its calls in the order in
which they were handed out, at most one of each piece of work at a time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from rlhub.errors import WorkerHung, WorkerLost
from workers.generator import StaleWeights
from workers.runtimes.runtime import Future, Handle, Runtime, T, Ts, W

log = logging.getLogger("rlhub")


@dataclass(eq=False)
class Work(Generic[T]):
    """Pieces that a pool works on; `Pool.collect` gives their results."""

    method: Callable[..., T]
    pieces: Sequence[tuple[Any, ...]]
    give_up: Callable[[int, WorkerLost], T] | None

    def __post_init__(self) -> None:
        self.answers: dict[int, T] = {}
        self.waiting = deque(range(len(self.pieces)))  # pieces that no worker has
        self.tries = [0] * len(self.pieces)
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return len(self.answers) == len(self.pieces) or self.error is not None

    @property
    def results(self) -> list[T]:
        """The results, in the order of the pieces."""
        return [self.answers[index] for index in range(len(self.pieces))]


@dataclass(frozen=True, eq=False)
class _Call:
    future: Future[Any]
    work: Work[Any]
    index: int
    since: float


@dataclass
class Pool(Generic[W]):
    """Workers of one role, of class W.

    Args:
        refresh: brings a worker up to date that refused work with StaleWeights (a rebuilt generator needs the current weights).
        deadline: seconds after which a piece of work counts as hanging and its worker is restarted; None waits for ever.
        attempts: times that one piece of work may be tried.
        patience: seconds that the pool waits for a worker to come back when it has none left.

    Example:
        >>> work = pool.begin(Generator.generate, [(requests, settings, version)])  # doctest: +SKIP
        >>> pool.collect(work)  # doctest: +SKIP
    """

    runtime: Runtime
    handles: list[Handle[W]]
    refresh: Callable[[Handle[W]], None] = lambda handle: None
    deadline: float | None = None
    attempts: int = 3
    patience: float = 300.0
    num_lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._works: list[Work[Any]] = []  # unfinished, oldest first
        self._calls: dict[str, deque[_Call]] = {handle.name: deque() for handle in self.handles}  # of each worker; it runs the first
        self._heard: dict[str, float] = {handle.name: 0.0 for handle in self.handles}  # when each last finished a call
        self._back: dict[str, Future[int]] = {}  # the ping that a lost worker has yet to answer
        self._alone_since: float | None = None  # when the pool had no worker left

    def map(
        self, method: Callable[[W, *Ts], T], pieces: Sequence[tuple[*Ts]], give_up: Callable[[int, WorkerLost], T] | None = None
    ) -> list[T]:
        """Results of `method(*piece)` in the order of `pieces`.

        Args:
            give_up: result for a piece that lost a worker `attempts` times; without it the last loss is raised.

        Raises:
            WorkerLost: a piece failed too often, or no worker came back in time.
        """
        return self.collect(self.begin(method, pieces, give_up))

    def begin(
        self, method: Callable[[W, *Ts], T], pieces: Sequence[tuple[*Ts]], give_up: Callable[[int, WorkerLost], T] | None = None
    ) -> Work[T]:
        """Start on what `map` would do and return at once. Lost workers are replaced while anything is collected."""
        work = Work(method, pieces, give_up)
        self._works.append(work)
        self._hand_out()
        return work

    def collect(self, work: Work[T]) -> list[T]:
        """Wait for the results of `begin`, in the order of its pieces; raises as `map` does."""
        while not work.done:
            self._turn()
        if work.error is not None:
            raise work.error
        return work.results

    def settle(self) -> None:
        """Wait until nothing runs in the background; results and errors stay for `collect`."""
        while any(not work.done for work in self._works):
            self._turn()

    def _turn(self) -> None:
        """Hand out what waits, and take what is done or lost."""
        self._readmit(wait=not any(self._calls.values()))
        self._hand_out()
        calls = {id(call.future): (handle, call) for handle in self.handles for call in self._calls[handle.name]}
        if not calls:
            self._alone_since = self._alone_since or time.monotonic()
            if time.monotonic() - self._alone_since > self.patience:
                raise WorkerLost(f"none of {', '.join(handle.name for handle in self.handles)} came back within {self.patience:g} s")
            return
        self._alone_since = None
        ready = self.runtime.wait([call.future for _, call in calls.values()], timeout=0.5)
        for future in ready:
            handle, call = calls[id(future)]
            if call in self._calls[handle.name]:  # else it was taken back with a lost worker
                self._take(handle, call)
        if not ready and self.deadline is not None:
            self._end_hanging(self.deadline)
        self._works = [work for work in self._works if not work.done]

    def _hand_out(self) -> None:
        for work in self._works:
            while work.waiting:
                free = [
                    handle
                    for handle in self.handles
                    if handle.name not in self._back and all(call.work is not work for call in self._calls[handle.name])
                ]
                if not free:
                    break
                handle, index = min(free, key=lambda handle: len(self._calls[handle.name])), work.waiting.popleft()
                work.tries[index] += 1
                future = self.runtime.submit(handle, work.method, *work.pieces[index])
                self._calls[handle.name].append(_Call(future, work, index, time.monotonic()))

    def _take(self, handle: Handle[W], call: _Call) -> None:
        """Take the result of a call that is done."""
        try:
            result = self.runtime.get(call.future)
        except WorkerLost as error:
            self._lose(handle, error, self._calls[handle.name][0])
            return
        except StaleWeights:
            self._return(handle, call)
            try:
                self.refresh(handle)
            except WorkerLost as error:
                self._lose(handle, error)
            return
        except Exception as error:  # of the work itself, for whoever collects it
            call.work.error = error
        else:
            call.work.answers[call.index] = result
        self._calls[handle.name].remove(call)
        self._heard[handle.name] = time.monotonic()

    def _end_hanging(self, deadline: float) -> None:
        for handle in self.handles:
            calls = self._calls[handle.name]
            if calls and time.monotonic() - max(calls[0].since, self._heard[handle.name]) > deadline:
                self.runtime.restart(handle)
                self._lose(handle, WorkerHung(f"{handle.name} hung for more than {deadline:g} s"), calls[0])

    def _lose(self, handle: Handle[W], error: WorkerLost, running: _Call | None = None) -> None:
        """Take all calls of a lost worker back. Only the one that it was running counts as tried."""
        self.num_lost += 1
        log.warning("%s", error)
        self._back[handle.name] = self.runtime.ping(handle)
        if running is not None:
            self._calls[handle.name].remove(running)
            work, index = running.work, running.index
            if work.tries[index] < self.attempts:
                work.waiting.append(index)
            elif work.give_up is not None:
                work.answers[index] = work.give_up(index, error)
            else:
                work.error = error
        for call in reversed(list(self._calls[handle.name])):
            self._return(handle, call)

    def _return(self, handle: Handle[W], call: _Call) -> None:
        """Put a call's piece back as if it had never been handed out."""
        self._calls[handle.name].remove(call)
        call.work.tries[call.index] -= 1
        call.work.waiting.appendleft(call.index)

    def _readmit(self, wait: bool) -> None:
        """Let lost workers that answer again take part; `wait` gives them half a second to do so."""
        for name, ping in list(self._back.items()):
            if not self.runtime.wait([ping], timeout=0.5 if wait else 0):
                continue
            try:
                self.runtime.get(ping)
            except WorkerLost:  # still being rebuilt
                self._back[name] = self.runtime.ping(next(handle for handle in self.handles if handle.name == name))
            else:
                del self._back[name]
