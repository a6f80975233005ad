"""What `load_grader` returns: one object for graders of every kind, and the rule that a failure is a status."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, get_args

from rlhub.types import Prompt, RewardResult, RewardStatus

Item = tuple[Prompt, str, dict[str, Any]]  # prompt, completion, columns

MAX_DETAIL = 2000  # characters; a grader may not flood the logs
STATUSES = get_args(RewardStatus)


class WrongCount(ValueError):
    """A batched grader broke its contract: one result per item."""


@dataclass(frozen=True)
class Grader:
    """Grades items one by one or in batches.

    Args:
        name: for messages.
        one: `(prompt, completion, row)` -> a RewardResult or a number; may be a coroutine function.
        many: the same for a list of items at once; None where `one` is all there is.
        version: changes with the grader's source, its options and rlhub's version; the key of cached grades.
        prepare: loads what is slow; called once in each process, outside of any deadline.
        own_limits: it bounds its own time and memory.
    """

    name: str
    one: Callable[..., Any]
    many: Callable[[Sequence[Item]], Any] | None = None
    version: str = ""
    prepare: Callable[[], None] = lambda: None
    own_limits: bool = False
    _loop: _Loop = field(default_factory=lambda: _Loop(), init=False, repr=False, compare=False)

    @property
    def batched(self) -> bool:
        """Are several items faster together than one after the other?"""
        return self.many is not None or self._concurrent

    @property
    def _concurrent(self) -> bool:
        return inspect.iscoroutinefunction(self.one) or inspect.iscoroutinefunction(getattr(self.one, "func", None))

    def __call__(self, prompt: Prompt, completion: str, row: dict[str, Any]) -> RewardResult:
        """The grade of one completion. A grader that fails raises here."""
        return checked(self._loop.value_of(self.one(prompt, completion, row)))

    def grade_batch(self, items: Sequence[Item], deadline_seconds: float | None = None) -> list[RewardResult]:
        """One result per item, in order; an item on which the grader raises has status `crashed` with the end of the traceback.

        Which item it was cannot be said of a grader that takes them all in one call (`many`): what that raises is raised here, and a
        `rewards.pool.RewardPool` then asks for each item alone. `deadline_seconds` ends each item of a coroutine grader with status
        `timeout`; other graders can be stopped by ending their process only, which the pool does.

        Raises:
            WrongCount: the grader returned more or fewer results than there are items.
        """
        if not items:
            return []
        if self.many is not None:
            return [checked(value) for value in same_count(self._loop.value_of(self.many(items)), len(items), self.name)]
        if self._concurrent:
            return self._loop.value_of(self._grade_concurrently(items, deadline_seconds))
        return [self.grade_alone(item) for item in items]

    def grade_alone(self, item: Item) -> RewardResult:
        """The grade of one item without raising."""
        try:
            return checked(self._loop.value_of(self.one(*item)))
        except (Exception, SystemExit) as error:  # a user's grader is a boundary: its failure is a status, not the end of the run
            return crashed(error)

    async def _grade_concurrently(self, items: Sequence[Item], deadline_seconds: float | None) -> list[RewardResult]:
        async def grade(item: Item) -> RewardResult:
            try:
                return checked(await asyncio.wait_for(self.one(*item), deadline_seconds))
            except TimeoutError as error:
                if deadline_seconds is None:
                    return crashed(error)
                return RewardResult(math.nan, "timeout", f"took longer than {deadline_seconds:g} s")
            except (Exception, SystemExit) as error:
                return crashed(error)

        return await asyncio.gather(*map(grade, items))


def same_count(values: Any, count: int, name: str) -> list[Any]:
    """The results as a list of `count`.

    Raises:
        WrongCount: there are more or fewer, or it is no collection.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | dict):
        raise WrongCount(f"reward {name} must return one value per completion, got {type(values).__name__}")
    values = list(values)
    if len(values) != count:
        raise WrongCount(f"reward {name} must return one value per completion, got {len(values)} for {count}")
    return values


def checked(value: Any) -> RewardResult:
    """What a grader returned as a RewardResult: None and numbers that are not finite are `rejected`, never a zero.

    Raises:
        ValueError, TypeError: it is neither a number nor a RewardResult, or has an unknown status.
    """
    if value is None:
        return RewardResult(math.nan, "rejected", "the grader returned None")
    if not isinstance(value, RewardResult):
        value = RewardResult(float(value))
    if value.status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {value.status!r}")
    number, detail = float(value.value), str(value.detail)
    if value.valid and not math.isfinite(number):
        return RewardResult(number, "rejected", f"the grader returned {number}{': ' if detail else ''}{detail[:MAX_DETAIL]}", value.parts)
    return RewardResult(number, value.status, detail[:MAX_DETAIL], value.parts, value.cached)


def crashed(error: BaseException) -> RewardResult:
    """The grade of an item on which the grader raised."""
    text = "".join(traceback.format_exception(error, limit=-2))
    return RewardResult(math.nan, "crashed", text[-MAX_DETAIL:])


def to_json(result: RewardResult) -> dict[str, Any]:
    """A result for JSON, which has no NaN: `{"value": number or null, "status", "detail", "parts"?: {label: ...}}`."""
    row = {"value": result.value if math.isfinite(result.value) else None, "status": result.status, "detail": result.detail}
    if result.parts:
        row["parts"] = {label: to_json(part) for label, part in result.parts.items()}
    return row


def from_json(row: Any) -> RewardResult:
    """The inverse of `to_json`.

    Raises:
        ValueError: it is not such a row.
    """
    if not isinstance(row, dict) or "value" not in row:
        raise ValueError(f"expected {{value, status, detail}}, got {row!r:.200}")
    value, status = row["value"], row.get("status", "ok")
    if isinstance(value, bool) or not isinstance(value, int | float | None) or (value is None and status in ("ok", "unparsed")):
        raise ValueError(f"value must be a number, got {value!r:.200} with status {status!r:.200}")
    if status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r:.200}")
    parts = row.get("parts") or {}
    if not isinstance(parts, dict):
        raise ValueError(f"parts must be {{label: result}}, got {parts!r:.200}")
    return checked(
        RewardResult(
            math.nan if value is None else float(value),
            status,
            str(row.get("detail", "")),
            {str(label): from_json(part) for label, part in parts.items()},
        )
    )


class _Loop:
    """Runs coroutines on one event loop per grader, so that clients which belong to a loop can be kept between calls."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.lock = threading.Lock()

    def value_of(self, value: Any) -> Any:
        """The value itself, or what it resolves to when it is awaitable."""
        if not inspect.isawaitable(value):
            return value
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._run(value)
        with ThreadPoolExecutor(1) as thread:  # called from a notebook, whose own loop is busy
            return thread.submit(self._run, value).result()

    def _run(self, value: Any) -> Any:
        async def resolved() -> Any:
            return await value

        with self.lock:
            self.loop = self.loop or asyncio.new_event_loop()
            return self.loop.run_until_complete(resolved())

    def __del__(self) -> None:
        if self.loop is not None:
            self.loop.close()
