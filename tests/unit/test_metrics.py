"""The metrics log under crashes and resumes, clocks with hand-made times, and the fan-out to trackers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhub.errors import DataError, RecipeError
from rlhub.files import plain
from rlhub.records.metrics import (
    MetricsLog,
    SpanClock,
    busy_union,
    idle_share,
    read_metrics,
    series,
    summarize,
    wilson_interval,
    without_clocks,
)
from rlhub.records.trackers import Trackers, check_trackers

PHASES = ["sft", "online"]


def row(phase: str, step: int, **values: object) -> dict:
    return {"phase": phase, "step": step, **values}


def test_rows_come_back_as_plain_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    values = {"loss": torch.tensor(2.5), "kl": float("nan"), "big": np.float32("inf"), "count": np.int64(3), "parts": np.array([1, np.nan])}
    log.write(row("sft", 0, **values))
    assert read_metrics(log.path) == [row("sft", 0, loss=2.5, kl=None, big=None, count=3, parts=[1.0, None])]
    assert "NaN" not in log.path.read_text()


def test_floats_survive_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(row("sft", 0, **{f"v{index}": value for index, value in enumerate(values)}))
    assert [read_metrics(log.path)[0][f"v{index}"] for index in range(50)] == values


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_torn_last_line_is_left_out_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"phase": "sft", "step": 0}\n{"phase": "sft", "st')
    assert read_metrics(path) == [row("sft", 0)]
    MetricsLog(path).write(row("sft", 1))
    assert read_metrics(path) == [row("sft", 0), row("sft", 1)]


def test_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"phase": "sft", "step": 0}')
    MetricsLog(path).write(row("sft", 1))
    assert read_metrics(path) == [row("sft", 0), row("sft", 1)]


@pytest.mark.parametrize("bad", ["{broken", "[1, 2]"])
def test_malformed_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_truncation_orders_phases_and_leaves_no_other_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rows = [row("sft", 0), row("sft", 5), row("online", 0), row("online", 1), row("online", 2)]
    for item in rows:
        log.write(item)
    assert log.truncate_after("online", 2, PHASES) == 0
    assert log.truncate_after("online", 1, PHASES) == 1
    assert log.truncate_after("sft", 5, PHASES) == 2
    log.write(row("online", 0, again=1))
    assert read_metrics(log.path) == [*rows[:2], row("online", 0, again=1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(DataError, match="'online'"):
        log.truncate_after("sft", 0, ["sft"])


def test_clocks_are_left_out_of_what_must_repeat() -> None:
    clocks = {"wall_s": 3.0, "time/step_s": 1.0, "system/sync_bytes": 2, "throughput/samples_per_s": 3.0}
    assert without_clocks(row("sft", 1, loss=1.0, **clocks)) == row("sft", 1, loss=1.0)


def test_series_skips_what_was_not_measured() -> None:
    rows = [row("sft", 0, a=1), row("online", 0), row("online", 1, a=None), row("online", 2, a=3.0), {"a": 9}]
    assert series(rows, "a") == ([0, 2], [1.0, 3.0]) and series(rows, "a", "online") == ([2], [3.0])


def test_summary_takes_the_last_phase() -> None:
    test = {"eval/num_problems": 512, "eval/test_set": "held-out", "eval/test_hash": "abc"}
    rows = [
        row("sft", 0, wall_s=1.0, **{"eval/accuracy": 0.0}),
        row("sft", 800, wall_s=60.0, **{"eval/accuracy": 0.5}),
        row("online", 0, wall_s=61.0, **test, **{"eval/accuracy": 0.51, "eval/accuracy_t1": 0.2}),
        row("online", 100, wall_s=151.0, **{"eval/accuracy": 0.8, "eval/accuracy_t1": 0.7}),
        row("online", 101, wall_s=152.0),
    ]
    summary = summarize(rows)
    assert (summary.phase, summary.first_step, summary.last_step) == ("online", 0, 100)
    assert (summary.before, summary.after, summary.before_t1, summary.after_t1) == (0.51, 0.8, 0.2, 0.7)
    assert (summary.test_set, summary.num_problems, summary.test_hash) == ("held-out", 512, "abc")
    assert (summary.seconds, summary.phase_seconds) == (152.0, 91.0)
    assert summarize([row("sft", 0, loss=1.0)]) is None


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(0.0, 50)[0] == 0.0 and wilson_interval(1.0, 50)[1] == pytest.approx(1.0)
    low, high = wilson_interval(0.0, 10)
    assert math.isclose(high, 0.2775, abs_tol=1e-4) and low == 0.0


def test_span_clock_adds_up_also_when_a_span_fails() -> None:
    times = iter([0.0, 1.0, 3.0, 4.0, 4.5, 6.0, 7.0, 10.0])
    clock = SpanClock(now=lambda: next(times))
    with clock.span("generate"):
        pass
    with clock.span("generate"):
        pass
    with pytest.raises(KeyError), clock.span("learn"):
        raise KeyError
    assert clock.metrics() == {"time/generate_s": 2.5, "time/learn_s": 1.0, "time/step_s": 10.0}


def test_busy_union_and_idle_share_by_hand() -> None:
    intervals = [(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (9.0, 12.0)]
    assert busy_union(intervals) == 8.0 and busy_union([]) == 0.0
    assert busy_union(intervals, (1.0, 10.0)) == 5.0
    assert idle_share(intervals, (0.0, 10.0)) == pytest.approx(0.4)


SECONDS = st.integers(0, 60).map(float)


@given(st.lists(st.tuples(SECONDS, SECONDS).map(lambda pair: (min(pair), max(pair)))), st.integers(1, 60))
def test_busy_union_counts_the_covered_seconds(intervals: list[tuple[float, float]], stop: int) -> None:
    covered = sum(any(start <= second and second + 1 <= end for start, end in intervals) for second in range(stop))
    assert busy_union(intervals, (0.0, float(stop))) == covered


def test_plain_keeps_json_and_converts_the_rest() -> None:
    assert plain({"a": (1, np.float64(2)), 3: [float("inf"), True, "x", None]}) == {"a": [1, 2.0], "3": [None, True, "x", None]}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_follows_a_resume(tmp_path: Path) -> None:
    with Trackers(tmp_path, ["tensorboard"]) as trackers:
        for step in range(4):
            trackers.log(row("online", step, **{"reward/mean": float(step), "kl": float("nan"), "eval/test_set": "held-out"}))
    with Trackers(tmp_path, ["tensorboard"]) as trackers:
        assert trackers.truncate_after("online", 1, PHASES) == 2
        trackers.log(row("online", 2, **{"reward/mean": 20.0}))
    assert [item["reward/mean"] for item in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 20.0]
    assert events(tmp_path / "logs" / "tensorboard" / "online") == {"reward/mean": [(0, 0.0), (1, 1.0), (2, 20.0)]}


def test_only_jsonl_unless_asked(tmp_path: Path) -> None:
    with Trackers(tmp_path) as trackers:
        trackers.log(row("sft", 0))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_unknown_tracker_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean tensorboard"):
        Trackers(tmp_path, ["tensorbord"])
    with pytest.raises(RecipeError, match="choose from tensorboard"):
        check_trackers(["xyz"])
    assert list(tmp_path.iterdir()) == []
