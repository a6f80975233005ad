"""Grading in processes that can be killed: a grader that hangs, leaks, crashes or floods its output costs one item its grade.

Items wait in one queue, and each process takes as many as travel together. When a process has to be ended or dies, what it had graded is
kept, the guilty item gets a status (or another try in a fresh process, if the process died), and the innocent ones go back to the front
of the queue. This is the only place that retries and blames items, see FAILURES.md. Works from any thread and needs no signals.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rewards._grader import Item
from rewards.pool.cache import GradeCache
from rewards.pool.child import TOGETHER
from rewards.pool.process import START_SECONDS, Failure, RewardProcess
from rewards.pool.settings import RewardPoolConfig
from rlhub.types import RewardResult

log = logging.getLogger("rlhub")


def longest_call(config: RewardPoolConfig) -> float:
    """Seconds after which a reward worker that has not answered cannot be at work any more.

    A call begins no items after one deadline, but a batched reward that passed it is then asked for each item alone.
    """
    return START_SECONDS + config.deadline_seconds * (config.batch_size + 2) * (config.retries + 1)


class RewardPool:
    """Grades with the reward `part` in `config.processes` processes, which start at once and end with this object.

    Example:
        >>> with RewardPool({"name": "exact_match"}) as pool:
        ...     [result.value for result in pool.grade([("2 1", "1 2", {"answer": "1 2"}), ("2 1", "2 1", {"answer": "1 2"})])]
        [1.0, 0.0]

    Attributes:
        version: of the grader, see `rewards.Grader`.

    Raises:
        UserError: the grader cannot be loaded.
    """

    def __init__(self, part: dict[str, Any], config: RewardPoolConfig | None = None) -> None:
        self._dispatcher = _Dispatcher(dict(part), config or RewardPoolConfig())
        self.close = weakref.finalize(self, self._dispatcher.stop)
        try:
            self.version: str = self._dispatcher.version.result()
        except BaseException:
            self.close()
            raise

    def grade(self, items: Sequence[Item], budget_seconds: float = math.inf) -> list[RewardResult | None]:
        """One result per item, in order; None for those that had not begun `budget_seconds` after the first one did."""
        return self.submit(items, budget_seconds).result()

    def submit(self, items: Sequence[Item], budget_seconds: float = math.inf) -> Future[list[RewardResult | None]]:
        """A future of what `grade` returns; the items of several callers share the processes and travel together."""
        return self._dispatcher.submit(list(items), budget_seconds)

    @property
    def num_waiting(self) -> int:
        """Items that no process has taken yet."""
        return len(self._dispatcher.queue)

    @property
    def num_graded(self) -> int:
        """Results so far, of any status."""
        return self._dispatcher.num_graded

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class _Job:
    """The items of one caller."""

    items: list[Item]
    results: list[RewardResult | None]
    budget_seconds: float
    num_open: int
    until: float = math.inf  # monotonic seconds after which no item begins; known once the first one does
    future: Future[list[RewardResult | None]] = field(default_factory=Future)


@dataclass
class _Task:
    """One item of a job. `alone`: not in one call with others, because such a call failed."""

    job: _Job
    index: int
    is_first: bool
    num_deaths: int = 0
    alone: bool = False

    def is_late(self, now: float) -> bool:
        begun = self.is_first or self.alone or self.num_deaths > 0
        return not begun and now > self.job.until


class _Dispatcher:
    """The queue and the processes, in an event loop in a thread of their own. The pool's owner does not keep it alive."""

    def __init__(self, part: dict[str, Any], config: RewardPoolConfig) -> None:
        self.part, self.config = part, config
        self.cache = None if config.cache == "none" else GradeCache(config.cache)
        self.queue: deque[_Task] = deque()
        self.version: Future[str] = Future()
        self.num_graded = 0
        self.loop = asyncio.new_event_loop()
        self.work = asyncio.Event()
        self.main = self.loop.create_task(self._main())
        self.thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self.thread.start()

    def submit(self, items: list[Item], budget_seconds: float) -> Future[list[RewardResult | None]]:
        known = self.cache.look_up(self.version.result(), items) if self.cache else [None] * len(items)
        missing = [index for index, result in enumerate(known) if result is None]
        job = _Job(items, known, budget_seconds, len(missing))
        if missing:
            self.loop.call_soon_threadsafe(self._add, [_Task(job, index, index == missing[0]) for index in missing])
        else:
            self._complete(job)
        return job.future

    def stop(self) -> None:
        """Ends all processes; what was not graded by then raises."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.main.cancel)
            self.thread.join()

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self.main)
        except asyncio.CancelledError:
            pass
        finally:
            self.loop.close()

    async def _main(self) -> None:
        try:
            async with asyncio.TaskGroup() as places:
                for _ in range(self.config.processes):
                    places.create_task(self._serve())
        finally:
            for task in self.queue:
                self._fail(task.job, RuntimeError("the reward pool was closed"))

    async def _serve(self) -> None:
        """The life of one place in the pool: a process, and the next one when that ends."""
        process, tasks = None, []
        try:
            while True:
                try:
                    process = process or await self._start()
                    tasks = await self._take()
                    if process.has_ended:  # while it waited
                        ended, process = process, None
                        await ended.end()
                        process = await self._start()
                    process = await self._grade(process, tasks)
                except Exception as error:  # a grader that cannot be loaded, items that cannot be pickled
                    if not self.version.done():
                        self.version.set_exception(error)
                    ended, process = process, None
                    if ended is not None:
                        await ended.end()
                    for task in tasks or await self._take():
                        self._fail(task.job, error)
                tasks = []
        finally:
            for task in tasks:
                self._fail(task.job, RuntimeError("the reward pool was closed"))
            if process is not None:
                await process.end()

    async def _start(self) -> RewardProcess:
        process = RewardProcess(self.part, self.config)
        try:
            version = await process.start()
        except BaseException:
            await process.end()
            raise
        if not self.version.done():
            self.version.set_result(version)
        return process

    def _add(self, tasks: list[_Task]) -> None:
        self.queue.extend(tasks)
        self.work.set()

    async def _take(self) -> list[_Task]:
        """A fair share of the queue, at most one batch."""
        tasks: list[_Task] = []
        while not tasks:
            while not self.queue:
                self.work.clear()
                await self.work.wait()
            size, now = min(self.config.batch_size, math.ceil(len(self.queue) / self.config.processes)), time.monotonic()
            while self.queue and len(tasks) < size and (not tasks or self.queue[0].alone == tasks[0].alone):
                task = self.queue.popleft()
                if task.job.future.done():
                    continue
                task.job.until = min(task.job.until, now + task.job.budget_seconds)
                if task.is_late(now):
                    self._settle(task, None)
                else:
                    tasks.append(task)
        return tasks

    async def _grade(self, process: RewardProcess, tasks: list[_Task]) -> RewardProcess | None:
        """Has the tasks graded, or puts them back; the process unless it is gone."""
        pending = dict(enumerate(tasks))
        process.send(([task.job.items[task.index] for task in tasks], min(task.job.until for task in tasks), tasks[0].alone))
        while not isinstance(answer := await process.next(), Failure):
            results, is_last = answer
            for index, result in results:
                self._settle(pending.pop(index), result)
            if is_last:
                self._put_back(pending)
                return process
        if answer.is_fatal:
            await process.end()
            log.warning("reward %s: %s", self.part.get("name"), answer.detail)
        self._blame(pending, answer)
        self._put_back(pending)
        return None if answer.is_fatal else process

    def _blame(self, pending: dict[int, _Task], failure: Failure) -> None:
        """The policy, see FAILURES.md: what failed together blames nobody, and is asked for one by one; an item that failed alone has its
        status, after `retries` more tries if a process died of it."""
        if failure.index == TOGETHER and (len(pending) > 1 or not failure.is_fatal):
            for task in pending.values():
                task.alone = True
            return
        # A process that died between two items may have been brought down by any of those that it had not reported.
        for index in [failure.index] if failure.index in pending else list(pending):
            task = pending[index]
            task.num_deaths += 1
            if failure.status == "timeout" or task.num_deaths > self.config.retries:
                self._settle(pending.pop(index), RewardResult(math.nan, failure.status, failure.detail))

    def _put_back(self, pending: dict[int, _Task]) -> None:
        self.queue.extendleft(reversed(pending.values()))
        if self.queue:
            self.work.set()

    def _settle(self, task: _Task, result: RewardResult | None) -> None:
        task.job.results[task.index] = result
        task.job.num_open -= 1
        self.num_graded += result is not None
        if task.job.num_open == 0:
            self._complete(task.job)

    def _complete(self, job: _Job) -> None:
        if self.cache is not None:
            graded = zip(job.items, job.results, strict=True)
            self.cache.keep(self.version.result(), [(item, result) for item, result in graded if result is not None])
        if not job.future.done():
            job.future.set_result(job.results)

    def _fail(self, job: _Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)
