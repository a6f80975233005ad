"""Throughput of the grading pool: overhead, scaling with processes, one hanging item, HTTP.

    python benchmarks/reward_pool.py --json

`busy_1` and `busy_2` are items per second of a grader that computes for 2 ms, in one and two processes; their ratio needs two idle cores.
`waiting_1` and `waiting_2` are the same for one that sleeps for 2 ms, so that busy cores do not matter.
`instant_2` is exact_match, so what the pool itself costs. `step_s` are the seconds of 128 such items in batches of 64, as in a training
step of the quickstart. `hanging_s` are the seconds of 500 busy items of which one never returns, with a deadline of 2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BUSY_SECONDS = 0.002
DEADLINE_SECONDS = 2.0
REPEATS = 3


def busy(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """Two milliseconds of computing, or an endless loop."""
    end = time.process_time() + (float("inf") if completion == "hang" else BUSY_SECONDS)
    while time.process_time() < end:
        pass
    return 1.0


def waiting(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """Two milliseconds of waiting."""
    time.sleep(BUSY_SECONDS)
    return 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    results = measure()
    if parser.parse_args().json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:>20} {value}")


def measure() -> dict[str, Any]:
    """All figures; the best of three repeats where it is a rate."""
    from rewards import load_grader
    from rewards.pool import RewardPool, RewardPoolConfig
    from workers.reward import RewardWorker

    computing = {"name": f"{__file__}:busy"}
    items = [("2 1", "1 2", {"answer": "1 2"})] * 500
    results: dict[str, Any] = {}
    for kind in ("busy", "waiting"):
        for processes in (1, 2):
            with RewardPool({"name": f"{__file__}:{kind}"}, RewardPoolConfig(processes=processes)) as pool:
                results[f"{kind}_{processes}"] = round(len(items) / best(lambda pool=pool: pool.grade(items)))
        results[f"{kind}_ratio"] = round(results[f"{kind}_2"] / results[f"{kind}_1"], 2)
    with RewardPool({"name": "exact_match"}, RewardPoolConfig(processes=2)) as pool:
        results["instant_2"] = round(20 * len(items) / best(lambda: pool.grade(20 * items)))
    worker = RewardWorker({"name": "exact_match"})
    steps = [seconds(lambda: [worker.grade(items[:64]) for _ in range(2)]) for _ in range(20)]
    results["step_s"] = round(statistics.median(steps), 4)
    with RewardPool(computing, RewardPoolConfig(processes=2, deadline_seconds=DEADLINE_SECONDS)) as pool:
        hanging = [*items[:250], ("2 1", "hang", {}), *items[251:]]
        graded: list[Any] = []
        results["hanging_s"] = round(seconds(lambda: graded.extend(pool.grade(hanging))), 2)
        results["hanging_statuses"] = dict(Counter(result.status for result in graded))
    with served({"name": "exact_match"}) as url:
        grader = load_grader({"name": "http", "url": url})
        results["http_500_s"] = round(best(lambda: grader.grade_batch(items)), 4)
    return results


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best(work: Callable[[], Any]) -> float:
    return min(seconds(work) for _ in range(REPEATS))


@contextmanager
def served(part: dict[str, Any]) -> Iterator[str]:
    """The URL of a reward server in this process."""
    from rewards.pool import RewardPoolConfig
    from rewards.pool.server import serve_until

    loop, stop, urls, ready = asyncio.new_event_loop(), asyncio.Event(), [], threading.Event()

    def announce(url: str) -> None:
        urls.append(url)
        ready.set()

    thread = threading.Thread(
        target=loop.run_until_complete, args=[serve_until(stop, part, "127.0.0.1", 0, RewardPoolConfig(processes=2), announce)]
    )
    thread.start()
    ready.wait()
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


if __name__ == "__main__":
    main()
