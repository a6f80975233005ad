"""Metrics of a run: an append-only JSONL log, its reader and summary, and clocks for what took how long.

A row is one flat JSON object, `{"phase": "online", "step": 3, "wall_s": 41.2, "reward/mean": 0.31, ...}`. Step 0 of a phase holds the
evaluation before its training, `wall_s` counts from the start of the run, NaN and infinities are written as null, and a key that
was not measured at a step is simply absent.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rlhub.errors import DataError
from rlhub.files import plain, replace_file

MetricsRow = dict[str, Any]
Interval = tuple[float, float]

CLOCK_PREFIXES = ("time/", "system/", "throughput/")


def read_metrics(path: Path | str) -> list[MetricsRow]:
    """The rows of a log. A missing file has none; a torn last line (the writer was killed) is left out."""
    return _parse(Path(path))[0]


def without_clocks(row: MetricsRow) -> MetricsRow:
    """The part of a row that a deterministic run repeats bit for bit."""
    return {key: value for key, value in row.items() if key != "wall_s" and not key.startswith(CLOCK_PREFIXES)}


class MetricsLog:
    """Appends rows to a JSONL file; a row that `write` returned from survives a crash."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows, complete = _parse(self.path)
        if not complete:
            self._replace(rows)  # a row appended to a torn line would be lost with it
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: MetricsRow) -> None:
        self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_after(self, phase: str, step: int, phases_order: Sequence[str]) -> int:
        """Drops the rows beyond `step` of `phase`, which a resumed run makes again; returns how many went."""
        rank = {name: index for index, name in enumerate(phases_order)}
        rows = read_metrics(self.path)
        for row in rows:
            if row["phase"] not in rank:
                raise DataError(f"{self.path}: phase {row['phase']!r} is not one of the run's phases {list(phases_order)}")
        kept = [row for row in rows if (rank[row["phase"]], row["step"]) <= (rank[phase], step)]
        if len(kept) < len(rows):
            self._file.close()
            self._replace(kept)
            self._file = self.path.open("a", encoding="utf-8")
        return len(rows) - len(kept)

    def close(self) -> None:
        self._file.close()

    def _replace(self, rows: list[MetricsRow]) -> None:
        replace_file(self.path, "".join(map(_line, rows)))


def _line(row: MetricsRow) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


def _parse(path: Path) -> tuple[list[MetricsRow], bool]:
    """Rows of a log, and whether its last line is whole."""
    if not path.exists():
        return [], True
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return rows, False
            raise DataError(f"{path}, line {number}: not a JSON object ({error.msg}); delete the line to go on") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}; delete the line to go on")
        rows.append(row)
    return rows, not text or text.endswith("\n")


def series(rows: Sequence[MetricsRow], key: str, phase: str | None = None) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it was measured, in the order of the log."""
    found = [
        (row["step"], float(row[key]))
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float) and phase in (None, row.get("phase"))
    ]
    return [step for step, _ in found], [value for _, value in found]


def phases(rows: Sequence[MetricsRow]) -> list[str]:
    """Names of the phases in the order in which they ran."""
    return list(dict.fromkeys(row["phase"] for row in rows if "phase" in row))


@dataclass(frozen=True)
class Summary:
    """What a run achieved: held-out accuracies at the first and the last evaluation of its last phase."""

    phase: str
    first_step: int
    last_step: int
    before: float | None  # greedy
    after: float | None
    before_t1: float | None  # temperature 1
    after_t1: float | None
    test_set: str
    num_problems: int | None
    test_hash: str
    seconds: float | None  # of the whole run
    phase_seconds: float | None  # of the last phase


def summarize(rows: Sequence[MetricsRow]) -> Summary | None:
    """The summary of a log, None before the first evaluation. The test set is read from the newest row that names it."""
    evaluated = [row for row in rows if row.get("eval/accuracy") is not None or row.get("eval/accuracy_t1") is not None]
    if not evaluated:
        return None
    phase = evaluated[-1].get("phase", "")
    mine = [row for row in evaluated if row.get("phase", "") == phase]
    greedy, tempered = (series(mine, key)[1] for key in ("eval/accuracy", "eval/accuracy_t1"))
    clock = [row["wall_s"] for row in rows if row.get("wall_s") is not None]
    phase_clock = [row["wall_s"] for row in rows if row.get("wall_s") is not None and row.get("phase", "") == phase]

    def newest(key: str, default: Any) -> Any:
        return next((row[key] for row in reversed(rows) if row.get(key) is not None), default)

    return Summary(
        phase=phase,
        first_step=mine[0].get("step", 0),
        last_step=mine[-1].get("step", 0),
        before=greedy[0] if greedy else None,
        after=greedy[-1] if greedy else None,
        before_t1=tempered[0] if tempered else None,
        after_t1=tempered[-1] if tempered else None,
        test_set=newest("eval/test_set", ""),
        num_problems=newest("eval/num_problems", None),
        test_hash=newest("eval/test_hash", ""),
        seconds=clock[-1] if clock else None,
        phase_seconds=phase_clock[-1] - phase_clock[0] if phase_clock else None,
    )


def student_interval(values: Sequence[float]) -> Interval:
    """Student's 95 % interval of the mean of values [n]; unbounded for a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return -math.inf, math.inf
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def wilson_interval(accuracy: float, num_problems: int, z: float = 1.959964) -> Interval:
    """95 % Wilson interval of a success rate over independent problems.

    >>> [round(bound, 4) for bound in wilson_interval(0.5, 100)]
    [0.4038, 0.5962]
    """
    denominator = 1 + z**2 / num_problems
    center = (accuracy + z**2 / (2 * num_problems)) / denominator
    half = z / denominator * math.sqrt(accuracy * (1 - accuracy) / num_problems + z**2 / (4 * num_problems**2))
    return max(0.0, center - half), min(1.0, center + half)


class SpanClock:
    """Seconds spent in the named parts of a step.

    >>> clock = SpanClock()
    >>> with clock.span("generate"):
    ...     pass
    >>> sorted(clock.metrics())
    ['time/generate_s', 'time/step_s']

    Its clock is the time of day, so that its intervals can be compared with those of actors in other processes.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self.reset()

    def reset(self) -> None:
        """Begins a new step now."""
        self.start = self._now()
        self.spans: dict[str, list[Interval]] = defaultdict(list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the time of the `with` block to `name`, also when the block raises."""
        begin = self._now()
        try:
            yield
        finally:
            self.spans[name].append((begin, self._now()))

    def window(self) -> Interval:
        """From the last `reset` to now."""
        return self.start, self._now()

    def metrics(self) -> dict[str, float]:
        """`time/<name>_s` of every span and `time/step_s` since the last `reset`."""
        seconds = {f"time/{name}_s": sum(stop - start for start, stop in spans) for name, spans in self.spans.items()}
        return seconds | {"time/step_s": self._now() - self.start}


def busy_union(intervals: Sequence[Interval], window: Interval = (-math.inf, math.inf)) -> float:
    """Seconds covered by at least one interval, inside the window.

    >>> busy_union([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    covered, reached = 0.0, window[0]
    for start, stop in sorted(intervals):
        start, stop = max(start, reached), min(stop, window[1])
        if stop > start:
            covered += stop - start
            reached = stop
    return covered


def idle_share(intervals: Sequence[Interval], window: Interval) -> float:
    """Share of the window, 0 to 1, in which none of the intervals runs."""
    return 1.0 - busy_union(intervals, window) / (window[1] - window[0])
