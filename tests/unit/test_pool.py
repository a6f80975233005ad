"""Pools of workers that die, hang, refuse or fail: every piece of work is done once, in order, at once or in the background."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fakes import InTurn, Scripted, scripted_pool

from rlhub.errors import DataError, WorkerHung, WorkerLost
from workers.crew import gather
from workers.generator import StaleWeights
from workers.runtimes.runtime import LocalRuntime, Resources
from workers.supervisor import Pool


class Late(LocalRuntime):
    """Futures are done in the reverse order of submission, one at a time."""

    def wait(self, futures: list, timeout: float | None) -> list:
        return futures[-1:]


@pytest.mark.parametrize("runtime", [LocalRuntime, Late])
def test_results_come_in_order_whoever_finishes_first(runtime: type) -> None:
    pool, calls = scripted_pool(runtime(), [], [], [])
    assert pool.map(Scripted.work, [(number,) for number in range(7)]) == [str(number) for number in range(7)]
    assert sorted(piece for _, piece in calls) == list(range(7)) and {name for name, _ in calls} == {"worker-0", "worker-1", "worker-2"}
    assert pool.map(Scripted.work, []) == []


def test_a_lost_piece_is_done_again() -> None:
    pool, calls = scripted_pool(LocalRuntime(), [WorkerLost("killed")], [])
    assert pool.map(Scripted.work, [("a",), ("b",), ("c",)]) == ["A", "B", "C"]
    assert sorted(piece for _, piece in calls) == ["a", "a", "b", "c"] and pool.num_lost == 1


def test_a_piece_that_kills_its_workers_is_given_up_or_raised() -> None:
    failures = [WorkerLost("killed")] * 3
    pool, calls = scripted_pool(LocalRuntime(), failures)
    assert pool.map(Scripted.work, [("a",), ("b",)], give_up=lambda index, error: f"gave up {index}: {error}")[1] in (
        "B",
        "gave up 1: killed",
    )
    assert len(calls) <= 6
    pool, calls = scripted_pool(LocalRuntime(), [WorkerLost("one"), WorkerLost("two"), WorkerLost("three")])
    with pytest.raises(WorkerLost, match="three"):
        pool.map(Scripted.work, [("a",)])
    assert len(calls) == 3


def test_an_error_of_the_work_itself_is_raised_at_once() -> None:
    pool, calls = scripted_pool(LocalRuntime(), [DataError("row 7 is bad")])
    with pytest.raises(DataError, match="row 7"):
        pool.map(Scripted.work, [("a",)])
    assert len(calls) == 1


def test_stale_workers_are_brought_up_to_date_and_keep_their_piece() -> None:
    refreshed: list[str] = []
    pool, _ = scripted_pool(LocalRuntime(), [StaleWeights("old")] * 4)
    pool.refresh = lambda handle: refreshed.append(handle.name)
    assert pool.map(Scripted.work, [("a",)]) == ["A"] and refreshed == ["worker-0"] * 4 and pool.num_lost == 0


def test_a_worker_that_dies_while_it_is_brought_up_to_date_is_tried_again() -> None:
    attempts: list[str] = []

    def refresh(handle: object) -> None:
        attempts.append("refresh")
        if len(attempts) == 1:
            raise WorkerLost("killed again")

    pool, _ = scripted_pool(LocalRuntime(), [StaleWeights("old"), StaleWeights("old")], refresh=refresh)
    assert pool.map(Scripted.work, [("a",)]) == ["A"] and len(attempts) == 2 and pool.num_lost == 1


class Rebuilding(LocalRuntime):
    """A lost worker does not answer pings until it was asked a number of times."""

    silent_for = 3
    pings = 0

    def ping(self, handle: object) -> object:
        self.pings += 1
        return super().submit(SimpleNamespace(name="ping", worker=self), Rebuilding._answer)

    def _answer(self) -> int:
        if self.pings <= self.silent_for:
            raise WorkerLost("still being rebuilt")
        return 1


def test_a_worker_gets_no_work_while_it_is_rebuilt() -> None:
    runtime = Rebuilding()
    pool, calls = scripted_pool(runtime, [WorkerLost("killed")])
    assert pool.map(Scripted.work, [("a",)]) == ["A"]
    assert len(calls) == 2 and runtime.pings == 4


def test_a_pool_whose_workers_stay_away_gives_up() -> None:
    runtime = Rebuilding()
    runtime.silent_for = 10**9
    pool, _ = scripted_pool(runtime, [WorkerLost("killed")], patience=0.2)
    with pytest.raises(WorkerLost, match=r"none of worker-0 came back within 0\.2 s"):
        pool.map(Scripted.work, [("a",)])


def test_a_hanging_worker_is_ended_and_its_piece_done_elsewhere() -> None:
    ended: list[str] = []

    class Hanging(LocalRuntime):
        def wait(self, futures: list, timeout: float | None) -> list:
            return [future for future in futures if future.value != "HANG" or ended]

        def restart(self, handle: object) -> None:
            ended.append(handle.name)

    pool, _ = scripted_pool(Hanging(), [], [], deadline=0.05)
    assert pool.map(Scripted.work, [("hang",), ("b",)]) == ["HANG", "B"] and ended == ["worker-0"]
    ended.clear()
    pool, _ = scripted_pool(Hanging(), [], deadline=0.05, attempts=1)
    assert isinstance(pool.map(Scripted.work, [("hang",)], give_up=lambda index, error: error)[0], WorkerHung)


def test_the_first_failure_of_several_is_raised_and_a_death_explains_the_others() -> None:
    runtime = LocalRuntime()
    died = runtime.spawn("learner-1", Scripted, Resources(), label="b", calls=[], script=[WorkerLost("learner-1 died")])
    peer = runtime.spawn("learner-0", Scripted, Resources(), label="a", calls=[], script=[RuntimeError("connection closed by peer")])
    with pytest.raises(WorkerLost, match="learner-1"):
        gather(runtime, [runtime.submit(peer, Scripted.work, 0), runtime.submit(died, Scripted.work, 0)])
    assert gather(runtime, [runtime.submit(peer, Scripted.work, number) for number in range(3)]) == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------------- work in the background


def in_turn(*scripts: list, runtime: LocalRuntime | None = None, **options: Any) -> tuple[Pool, list]:
    return scripted_pool(runtime or InTurn(), *scripts, **options)


def pieces(text: str) -> list[tuple[str]]:
    return [(letter,) for letter in text]


def test_work_in_the_background_is_handed_out_at_once_and_done_in_order() -> None:
    pool, calls = in_turn([], [])
    works = [pool.begin(Scripted.work, pieces(text)) for text in ("ab", "cd", "ef")]
    assert calls == [] and [len(queue) for queue in pool.runtime.queues.values()] == [3, 3], "each worker has a piece of each"
    assert pool.collect(works[1]) == ["C", "D"], "in any order"
    assert [piece for name, piece in calls if name == "worker-0"][:2] == ["a", "c"]
    assert pool.collect(works[0]) == ["A", "B"] and pool.collect(works[2]) == ["E", "F"]
    assert sorted(piece for _, piece in calls) == list("abcdef")


def test_settling_waits_for_everything_and_keeps_results() -> None:
    pool, calls = in_turn([], [])
    works = [pool.begin(Scripted.work, pieces(text)) for text in ("abc", "d")]
    pool.settle()
    assert len(calls) == 4 and [pool.collect(work) for work in works] == [["A", "B", "C"], ["D"]]
    pool.settle()
    assert pool.collect(pool.begin(Scripted.work, [])) == []


def test_a_lost_worker_returns_the_calls_of_all_its_works_and_only_what_it_ran_was_tried() -> None:
    failures = [WorkerLost("killed")] * 3
    pool, calls = in_turn(failures, attempts=2)
    works = [
        pool.begin(Scripted.work, pieces("a"), lambda index, error: "gave up"),
        pool.begin(Scripted.work, pieces("b")),
        pool.begin(Scripted.work, pieces("c")),
    ]
    assert pool.collect(works[0]) == ["gave up"], "killed its worker twice"
    assert [pool.collect(work) for work in works[1:]] == [["B"], ["C"]], "b killed it once, c waited behind both"
    assert [piece for _, piece in calls] == ["a", "a", "b", "b", "c"] and pool.num_lost == 3


def test_the_other_worker_takes_over_what_was_in_flight() -> None:
    pool, calls = in_turn([WorkerLost("killed")], [])
    pool.runtime.ping = lambda handle: pool.runtime.submit(SimpleNamespace(name="rebuilding", worker=Gone()), Gone.answer)
    works = [pool.begin(Scripted.work, pieces("ab")), pool.begin(Scripted.work, pieces("cd"))]
    assert [pool.collect(work) for work in works] == [["A", "B"], ["C", "D"]]
    assert [name for name, _ in calls].count("worker-0") == 1 and pool.num_lost == 1


class Gone:
    def answer(self) -> None:
        raise WorkerLost("still being rebuilt")


def test_an_error_waits_for_whoever_collects_its_work() -> None:
    pool, _ = in_turn([DataError("row 7 is bad")])
    bad, good = pool.begin(Scripted.work, pieces("ab")), pool.begin(Scripted.work, pieces("c"))
    assert pool.collect(good) == ["C"]
    with pytest.raises(DataError, match="row 7"):
        pool.collect(bad)
    assert pool.map(Scripted.work, pieces("d")) == ["D"]


def test_time_spent_behind_other_calls_does_not_count_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("workers.supervisor.time.monotonic", lambda: clock.now)

    class Slow(InTurn):
        """A call takes six looks of one second."""

        looks = 0

        def wait(self, futures: list, timeout: float | None) -> list:
            clock.now, self.looks = clock.now + 1, self.looks + 1
            return super().wait(futures, timeout) if self.looks % 6 == 0 else []

    pool, calls = in_turn([], runtime=Slow(), deadline=8.0)
    works = [pool.begin(Scripted.work, pieces(text)) for text in "abcd"]
    assert [pool.collect(work) for work in works] == [["A"], ["B"], ["C"], ["D"]] and pool.runtime.restarted == [] and len(calls) == 4
    pool, _ = in_turn([], runtime=Slow(), deadline=4.0, attempts=1)
    with pytest.raises(WorkerHung, match="hung for more than 4 s"):
        pool.map(Scripted.work, pieces("a"))
