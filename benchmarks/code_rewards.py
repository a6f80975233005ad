"""Programs graded per second in the sandbox: HumanEval's canonical solutions, against the limit that we hold ourselves to.

python benchmarks/code_rewards.py [--file HumanEval.jsonl.gz] [--processes 2] [--sandbox strong] [--json]
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rewards.code_tests import Config, grade
from rewards.sandbox import layers

LIMIT = 20.0  # programs a second on two cores
HUMANEVAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"


def main(file: Path, processes: int, config: Config) -> dict[str, Any]:
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(partial(graded, config), rows[:processes] * 4, chunksize=1)  # starts the fork servers
        started = time.perf_counter()
        results = pool.map(partial(graded, config), rows, chunksize=4)
        seconds = time.perf_counter() - started
        pool.close()
        pool.join()
    failed = [row["task_id"] for row, result in zip(rows, results, strict=True) if result.value != 1.0]
    return {
        "programs": len(rows),
        "passed": len(rows) - len(failed),
        "failed": failed,
        "seconds": seconds,
        "programs_per_second": len(rows) / seconds,
        "limit": LIMIT,
        "processes": processes,
        "layers": layers(config.sandbox),
    }


def graded(config: Config, row: dict[str, Any]) -> Any:
    return grade(row["prompt"], row["canonical_solution"], row, config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=HUMANEVAL)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sandbox", default="strong")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if not chosen.file.exists():
        sys.exit(f"no file {chosen.file}; --file names HumanEval.jsonl.gz of openai/human-eval")
    found = main(chosen.file, chosen.processes, Config(deadline_seconds=10.0, sandbox=chosen.sandbox))
    if chosen.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{found['passed']} of {found['programs']} solutions pass, {found['programs_per_second']:.1f} programs/s (limit {LIMIT:g})")
    sys.exit(found["programs_per_second"] < LIMIT or bool(found["failed"]))
