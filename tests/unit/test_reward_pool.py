"""The pool: whatever a grader does, the other items get their grades, and the guilty one gets a status that says what happened."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rewards.pool import RewardPool, RewardPoolConfig
from rewards.pool.cache import GradeCache
from rewards.pool.process import RewardProcess
from rlhub.errors import UserError
from rlhub.types import RewardResult
from workers.reward import RewardWorker

GRADERS = '''
import ctypes, os, signal, sys, threading, time
from pathlib import Path

HERE = Path(__file__).parent

def length(prompt, completion, row):
    """Its length, or the harm that the completion asks for."""
    match completion:
        case "loop":
            while True:
                pass
        case "sleep in C":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.PyDLL(None).sleep(1000)
        case "ignore":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(1000)
        case "catch all":
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    pass
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "unnamed signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 3)
        case "interrupt":
            raise KeyboardInterrupt
        case "leak":
            hoard = []
            while True:
                hoard.append(bytearray(2**20))
        case "child":
            child = os.fork()
            if child == 0:
                time.sleep(1000)
            (HERE / "child").write_text(str(child))
            os._exit(4)
        case "close":
            os.closerange(0, 256)
            time.sleep(1000)
        case "print":
            line = "x" * 2**20
            for _ in range(1024):
                os.write(1, line.encode())
                sys.stderr.write(line[:1024])
        case "leave":
            sys.exit(0)
        case "raise":
            raise ZeroDivisionError("on purpose")
        case "detail":
            raise ValueError("y" * 10**7)
        case "nan":
            return float("nan")
    return float(len(completion))

def once(prompt, completion, row):
    """Dies of the first attempt at an item, and counts the attempts."""
    with open(HERE / f"attempts {completion}", "a") as file:
        file.write("x")
    if completion == "hang":
        time.sleep(1000)
    if completion == "die" and os.path.getsize(HERE / "attempts die") == 1:
        os._exit(1)
    return 1.0

def together(prompt, completion, row):
    """Ends when as many processes as `row` says are in it."""
    (HERE / f"in {os.getpid()}").touch()
    while len(list(HERE.glob("in *"))) < row["processes"]:
        time.sleep(0.005)
    return float(os.getpid())

def batch(completions, **columns):
    with open(HERE / "calls", "a") as file:
        file.write(f"{len(completions)} ")
    with open(HERE / "processes", "a") as file:
        file.write(f"{os.getpid()} ")
    if "hang" in completions:
        time.sleep(1000)
    if "raise" in completions:
        raise ZeroDivisionError
    if "exit" in completions:
        os._exit(3)
    return [1.0] * (len(completions) + ("one more" in completions))

def pause(prompt, completion, row):
    time.sleep(0.05)
    return 1.0

def counted(prompt, completion, row):
    with open(HERE / "graded", "a") as file:
        file.write("x")
    if completion == "raise":
        raise ZeroDivisionError
    return 0.5

def alive(prompt, completion, row):
    (HERE / "pid").write_text(str(os.getpid()))
    while True:
        pass

async def waiting(prompt, completion, row):
    import asyncio
    await asyncio.sleep(1000 if completion == "hang" else 0.05)
    return 1.0
'''
MODULE = """
import time
from dataclasses import dataclass
from rlhub.types import RewardResult

READY = False

@dataclass(frozen=True)
class Config:
    limits: bool = False

def prepare(config):
    global READY
    time.sleep(0.6)
    READY = True

def own_limits(config):
    return config.limits

def grade(prompt, completion, row, config):
    time.sleep(0.6 if completion == "slow" else 0.0)
    return RewardResult(float(READY))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graders")
    (folder / "graders.py").write_text(GRADERS)
    (folder / "my_graders").mkdir()
    (folder / "my_graders" / "slow.py").write_text(MODULE)
    return folder


@pytest.fixture
def pool(tmp_path: Path) -> Callable[..., RewardPool]:
    """`pool(function, option=value)`; the graders and what they write are in `tmp_path`. Closed at the end."""
    (tmp_path / "graders.py").write_text(GRADERS)
    pools: list[RewardPool] = []

    def make(function: str, **options: object) -> RewardPool:
        pools.append(RewardPool({"name": f"{tmp_path}/graders.py:{function}"}, RewardPoolConfig(**options)))
        return pools[-1]

    yield make
    for one in pools:
        one.close()


@pytest.fixture(scope="module")
def strict(folder: Path) -> RewardPool:
    """One pool for all that may go wrong, one after the other, so that it has to survive everything."""
    options = RewardPoolConfig(processes=2, deadline_seconds=1.0, memory_megabytes=100, batch_size=32, retries=0)
    with RewardPool({"name": f"{folder}/graders.py:length"}, options) as pool:
        yield pool


def item(completion: str = "ok", **row: object) -> tuple[str, str, dict]:
    return "prompt", completion, row


def counts(results: Sequence[RewardResult | None], expected: int) -> dict[str, int]:
    statuses = Counter(result.status for result in results)
    assert sum(statuses.values()) == len(results) == expected
    assert all(math.isnan(result.value) for result in results if not result.valid), "a failure is never a number"
    return dict(statuses)


HARM = [
    ("loop", "timeout", "longer than 1 s"),
    ("sleep in C", "timeout", "longer than 1 s"),
    ("ignore", "timeout", "longer than 1 s"),
    ("catch all", "timeout", "longer than 1 s"),
    ("segfault", "crashed", "SIGSEGV"),
    ("exit", "crashed", "exited with code 3"),
    ("kill", "crashed", "SIGKILL"),
    ("unnamed signal", "crashed", "ended by signal"),
    ("interrupt", "crashed", "SIGINT"),
    ("leak", "crashed", "more memory than 100 MB (reward_pool.memory_megabytes)"),
    ("child", "crashed", "exited with code 4"),
    ("close", "crashed", "closed its channel"),
    ("leave", "crashed", "SystemExit"),
    ("raise", "crashed", "ZeroDivisionError: on purpose"),
    ("detail", "crashed", "yyy"),
    ("nan", "rejected", "nan"),
]


@pytest.mark.parametrize(("harm", "status", "detail"), HARM, ids=[harm for harm, *_ in HARM])
def test_only_the_guilty_item_fails(strict: RewardPool, harm: str, status: str, detail: str) -> None:
    items = [item("x" * number) for number in range(50)]
    items[20] = item(harm)
    results = strict.grade(items)
    assert counts(results, 50) == {"ok": 49, status: 1}
    assert results[20].status == status and detail in results[20].detail and len(results[20].detail) <= 2000
    assert [result.value for result in results if result.valid] == [float(number) for number in range(50) if number != 20]


def test_everything_at_once(strict: RewardPool) -> None:
    items = [item("x" * number) for number in range(100)]
    for place, (harm, *_) in enumerate(HARM):
        items[6 * place + 3] = item(harm)
    results = strict.grade(items)
    assert counts(results, 100) == dict(Counter(status for _, status, _ in HARM)) | {"ok": 100 - len(HARM)}
    assert [results[6 * place + 3].status for place in range(len(HARM))] == [status for _, status, _ in HARM]


def test_a_gigabyte_of_output_goes_nowhere(pool: Callable[..., RewardPool], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = pool("length", memory_megabytes=300).grade([item(), item("print"), item()])
    assert counts(results, 3) == {"ok": 3}
    assert capfd.readouterr().out == "" and sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file()) < 2**20


def test_what_a_dead_grader_started_is_ended(strict: RewardPool, folder: Path) -> None:
    assert counts(strict.grade([item("child")]), 1) == {"crashed": 1}
    child = int((folder / "child").read_text())
    wait_for(lambda: not is_alive(child))


def test_a_dead_process_is_tried_again_and_a_hanging_one_is_not(pool: Callable[..., RewardPool], tmp_path: Path) -> None:
    once = pool("once", deadline_seconds=0.5)
    assert counts(once.grade([item(name) for name in ("a", "die", "b")]), 3) == {"ok": 3}
    results = once.grade([item(name) for name in ("c", "hang", "d")])
    assert counts(results, 3) == {"ok": 2, "timeout": 1} and results[1].status == "timeout"
    assert (tmp_path / "attempts die").read_text() == "xx" and (tmp_path / "attempts hang").read_text() == "x"
    (tmp_path / "attempts die").unlink()
    assert counts(pool("once", retries=0).grade([item("die"), item("a")]), 2) == {"crashed": 1, "ok": 1}


def test_a_process_that_died_while_it_waited_costs_nothing(pool: Callable[..., RewardPool]) -> None:
    one = pool("length", retries=0)
    before = set(psutil.Process().children())
    other = pool("length", retries=0)
    (process,) = set(psutil.Process().children()) - before
    process.kill()
    wait_for(lambda: not is_alive(process.pid))
    assert counts(other.grade([item()] * 3), 3) == counts(one.grade([item()] * 3), 3) == {"ok": 3}


def test_processes_work_at_the_same_time(pool: Callable[..., RewardPool]) -> None:
    results = pool("together", processes=2, batch_size=8).grade([item(processes=2)] * 16)
    assert counts(results, 16) == {"ok": 16}
    assert len({result.value for result in results}) == 2


def test_many_callers_in_other_threads(strict: RewardPool) -> None:
    def call(number: int) -> list[RewardResult | None]:
        return strict.grade([item("x" * number)] * 7 + [item("loop" if number == 3 else "y")])

    with ThreadPoolExecutor(8) as threads:
        calls = list(threads.map(call, range(8)))
    for number, results in enumerate(calls):
        assert counts(results, 8) == ({"ok": 7, "timeout": 1} if number == 3 else {"ok": 8})
        assert {result.value for result in results[:7]} == {float(number)}


def test_a_worker_off_the_main_thread(folder: Path) -> None:
    graded: list[RewardResult] = []

    def work() -> None:
        worker = RewardWorker({"name": f"{folder}/graders.py:length"}, deadline_seconds=0.5)
        graded.extend(worker.grade([item(), item("loop")]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts(graded, 2) == {"ok": 1, "timeout": 1}


def test_a_call_ends_soon_after_its_budget(pool: Callable[..., RewardPool]) -> None:
    results = pool("pause").grade([item()] * 100, budget_seconds=0.3)
    begun = [result for result in results if result is not None]
    assert results[: len(begun)] == begun and 1 <= len(begun) <= 12
    assert counts(begun, len(begun)) == {"ok": len(begun)}
    assert [result is None for result in pool("pause").grade([item()] * 3, budget_seconds=0.0)] == [False, True, True]


def test_a_budget_begins_with_the_first_item_so_that_a_batch_stays_whole(pool: Callable[..., RewardPool]) -> None:
    """However long the items wait for the process that grades them."""
    assert counts(pool("batch").grade([item()] * 20, budget_seconds=0.0), 20) == {"ok": 20}


def test_a_batched_grader_that_hangs_dies_or_raises_is_asked_for_each_item(pool: Callable[..., RewardPool], tmp_path: Path) -> None:
    batched = pool("batch", deadline_seconds=0.5, batch_size=4)
    for harm, status in (("hang", "timeout"), ("raise", "crashed"), ("exit", "crashed")):
        results = batched.grade([item("a"), item(harm), item("b"), item("c")])
        assert counts(results, 4) == {"ok": 3, status: 1} and results[1].status == status
    (tmp_path / "calls").unlink()
    assert counts(batched.grade([item("raise")]), 1) == {"crashed": 1}
    assert (tmp_path / "calls").read_text() == "1 1 ", "a call that raised says nothing about its items, not even about a single one"
    (tmp_path / "calls").unlink()
    assert counts(batched.grade([item()] * 8), 8) == {"ok": 8}
    assert (tmp_path / "calls").read_text() == "4 4 ", "batches stay whole when nothing goes wrong"
    results = batched.grade([item(), item("one more"), item()])
    assert counts(results, 3) == {"crashed": 3} and "got 4 for 3" in results[0].detail


def test_a_batch_that_raises_costs_no_process(pool: Callable[..., RewardPool], tmp_path: Path) -> None:
    """Loading a grader may take minutes."""
    batched = pool("batch", batch_size=4)
    batched.grade([item("raise"), item()])
    batched.grade([item()])
    assert len(set((tmp_path / "processes").read_text().split())) == 1
    batched.grade([item("exit"), item()])
    assert len(set((tmp_path / "processes").read_text().split())) > 1


def test_coroutines_wait_together_and_each_has_its_deadline(pool: Callable[..., RewardPool]) -> None:
    started = time.monotonic()
    results = pool("waiting", deadline_seconds=0.5).grade([item()] * 30 + [item("hang")] + [item()] * 30)
    assert counts(results, 61) == {"ok": 60, "timeout": 1} and results[30].status == "timeout"
    assert time.monotonic() - started < 60 * 0.05, "one after the other they would take three seconds"


def test_loading_is_outside_of_the_deadline_and_a_grader_may_bound_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    with RewardPool({"name": "my_graders.slow"}, RewardPoolConfig(deadline_seconds=0.3)) as pool:
        results = pool.grade([item(), item("slow")])
    assert counts(results, 2) == {"ok": 1, "timeout": 1} and results[0].value == 1.0
    with RewardPool({"name": "my_graders.slow", "limits": True}, RewardPoolConfig(deadline_seconds=0.3)) as pool:
        assert counts(pool.grade([item("slow")]), 1) == {"ok": 1}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "countdwn"}, "did you mean countdown"),
        ({"name": "exact_match", "strict": True}, "strict: unknown key of exact_match"),
        ({"name": "no/such.py:f"}, "file not found"),
    ],
)
def test_a_grader_that_cannot_be_loaded_says_why(part: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardPool(part)


def test_items_that_cannot_travel_raise_and_the_pool_goes_on(strict: RewardPool) -> None:
    with pytest.raises(TypeError, match="pickle"):
        strict.grade([item(lock=threading.Lock())])
    assert counts(strict.grade([item()]), 1) == {"ok": 1}


def test_grades_are_looked_up_and_failures_are_not(pool: Callable[..., RewardPool], tmp_path: Path) -> None:
    def graded() -> int:
        file = tmp_path / "graded"
        return len(file.read_text()) if file.exists() else 0

    cached = pool("counted", cache="memory")
    items = [item("a", answer=1), item("a", answer=2), item("raise")]
    first, second = cached.grade(items), cached.grade(items)
    assert counts(first, 3) == counts(second, 3) == {"ok": 2, "crashed": 1}
    assert graded() == 4 and [result.cached for result in first + second] == [False] * 3 + [True, True, False]
    assert [result.value for result in second[:2]] == [0.5, 0.5]
    place = str(tmp_path / "cache")
    pool("counted", cache=place).grade(items)
    assert graded() == 7
    assert [result.cached for result in pool("counted", cache=place).grade(items)] == [True, True, False]
    (tmp_path / "graders.py").write_text(GRADERS.replace("return 0.5", "return 0.25"))
    assert [result.value for result in pool("counted", cache=place).grade(items[:2])] == [0.25, 0.25], "a new version grades again"


def test_a_cache_tells_versions_prompts_completions_and_rows_apart(tmp_path: Path) -> None:
    cache = GradeCache(str(tmp_path))
    kept = ("p", "c", {"answer": "1"})
    part = RewardResult(1.0, "unparsed", "x")
    cache.keep("v", [(kept, RewardResult(0.25, "ok", "why", {"part": part})), (("p", "d", {}), RewardResult(math.nan, "timeout"))])
    others = [("p", "d", {}), ("q", "c", {"answer": "1"}), ("p", "e", {"answer": "1"}), ("p", "c", {"answer": 1}), ("p", "c", {})]
    (found, *rest) = GradeCache(str(tmp_path)).look_up("v", [kept, *others])
    assert found == RewardResult(0.25, "ok", "why", {"part": part}, cached=True) and rest == [None] * len(others)
    assert cache.look_up("w", [kept]) == [None]


def test_overhead_is_small() -> None:
    """In CPU time of all processes, which other programs on the machine do not change."""
    items = [("2 1", "1 2", {"answer": "1 2"})] * 5000
    with RewardPool({"name": "exact_match"}, RewardPoolConfig(processes=2)) as pool:
        pool.grade(items[:200])
        before = cpu_seconds()
        assert counts(pool.grade(items), 5000) == {"ok": 5000}
        after = cpu_seconds()
        assert len(before) >= 3, "this process and two that grade"
        assert sum(after[pid] - before[pid] for pid in before.keys() & after.keys()) < 2.0, "5,000 items a second on two cores"


def cpu_seconds() -> dict[int, float]:
    """CPU time so far of this process and of those that it started, by process id, without those that end while they are looked at."""
    seconds = {}
    for process in (psutil.Process(), *psutil.Process().children()):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds[process.pid] = sum(process.cpu_times()[:2])
    return seconds


def test_grading_processes_start_without_pytorch() -> None:
    code = "import sys, rewards.pool.child; from rewards import load_grader; load_grader({'name': 'exact_match'}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rewards" in loaded and not {"torch", "numpy", "ray", "omegaconf"} & set(loaded)


def test_a_closed_pool_leaves_no_process_and_answers_nobody(pool: Callable[..., RewardPool]) -> None:
    before = set(psutil.Process().children())
    one = pool("pause", processes=2)
    assert counts(one.grade([item()]), 1) == {"ok": 1}
    late = one.submit([item()] * 1000)
    started = set(psutil.Process().children()) - before
    assert len(started) == 2
    one.close()
    assert not started & set(psutil.Process().children())
    with pytest.raises(RuntimeError, match="closed"):
        late.result(timeout=5)


@pytest.mark.parametrize("turns", range(5))
def test_a_pool_that_is_closed_while_a_process_answers_does_not_wait_for_ever(turns: int) -> None:
    """A cancellation that comes in the turn of the event loop in which the answer does must not be lost."""

    async def cancelled() -> bool:
        process = RewardProcess({"name": "exact_match"}, RewardPoolConfig())
        starting = asyncio.create_task(process.start())
        await asyncio.sleep(0.01)
        select.select([process.process.stdout], [], [], 60)  # holds the event loop until the answer is there
        for _ in range(turns):
            await asyncio.sleep(0)
        asked = starting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            return True
        finally:
            await process.end()
        return not asked

    assert asyncio.run(cancelled())


def test_grading_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "graders.py").write_text(GRADERS)
    code = "import sys; from rewards.pool import RewardPool; RewardPool({'name': sys.argv[1]}).grade([('', '', {})])"
    parent = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path}/graders.py:alive"])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    grading = int((tmp_path / "pid").read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not is_alive(grading))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
