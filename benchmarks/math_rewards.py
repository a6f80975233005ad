"""Answers verified per second by `math_answer`, in processes of their own, on GSM8K or any file of completions.

    python benchmarks/math_rewards.py DATA.jsonl [--processes 2] [--seconds 5] [--json]

Rows hold `prompt`, `completion`, `answer` (or GSM8K's `question`, `answer`, where the worked solution is graded against itself). Each
process grades the whole file over and over; the figure is the sum of the processes' own rates, by the clock and by CPU time (the latter is
what a machine with that many free cores would do). The cache of gold answers is warm after
the first pass, as it is in training, where a gold is used for a whole group.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from rewards import load_grader
from rlhub.tasks.jsonl import read_jsonl

LIMIT = 10_000  # answers per second that must be reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [row for _, row in read_jsonl(arguments.data)]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(measure, [rows] * arguments.processes, [arguments.seconds] * arguments.processes))
    report = {
        "answers_per_second": sum(part["graded"] / part["seconds"] for part in parts),
        "answers_per_cpu_second": sum(part["graded"] / part["cpu_seconds"] for part in parts),
        "required": LIMIT,
        "processes": arguments.processes,
        "graded": sum(part["graded"] for part in parts),
        "statuses": dict(sum((Counter(part["statuses"]) for part in parts), Counter())),
        "milliseconds_first_pass": [1000 * part["first"] for part in parts],
    }
    print(json.dumps(report) if arguments.json else "\n".join(f"{key}: {value}" for key, value in report.items()))


def measure(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Grades all rows in passes until the time is up."""
    grader = load_grader({"name": "math_answer"})
    grader.prepare()
    items = [(row.get("prompt", row.get("question", "")), row.get("completion", row["answer"]), row) for row in rows]
    statuses: Counter[str] = Counter()
    start, cpu, first = time.perf_counter(), time.process_time(), 0.0
    while time.perf_counter() - start < seconds:
        statuses.update(grader(*item).status for item in items)
        first = first or time.perf_counter() - start
    return {
        "graded": statuses.total(),
        "statuses": dict(statuses),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "first": first,
    }


if __name__ == "__main__":
    main()
