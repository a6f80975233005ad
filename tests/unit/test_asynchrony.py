"""Rollouts ahead of training: which weights generate which batch, work in the background, and runs of it in one process."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhub.config.schema import Recipe, SamplerConfig
from rlhub.errors import DataError, RecipeError, SyncError, WorkerHung, WorkerLost
from rlhub.planning.plan import format_plan, make_plan
from rlhub.records.metrics import read_metrics, without_clocks
from rlhub.records.rollout_log import read_rollouts, rollout_path
from rlhub.training.rollouts import Issued, RolloutQueue
from rlhub.training.run import train
from rlhub.types import Request, Rollout
from workers.crew import GeneratorPool
from workers.generator import StaleWeights
from workers.runtimes.runtime import LocalFuture, LocalHandle, LocalRuntime, Resources
from workers.supervisor import Pool


@pytest.fixture(autouse=True)
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own, and plots take longer than these runs."""
    monkeypatch.setattr("rlhub.training.run.write_report", lambda folders: folders[0] / "report.html")


# ------------------------------------------------------------------------------------------------- calls that wait their turn


class InTurn(LocalRuntime):
    """Calls of a worker run in their order, one at each look at them. A worker that dies takes its calls with it and is back at once."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[str, list[tuple[LocalFuture, Callable[[], Any]]]] = {}
        self.restarted: list[str] = []

    def submit(self, handle: LocalHandle, method: Callable[..., Any], *args: Any, concurrent: bool = False) -> LocalFuture:
        future = LocalFuture()
        self.queues.setdefault(handle.name, []).append((future, lambda: getattr(handle.worker, method.__name__)(*args)))
        return future

    def wait(self, futures: list[LocalFuture], timeout: float | None) -> list[LocalFuture]:
        for name, queue in self.queues.items():
            if queue and queue[0][0] in futures:
                self._run_first(name)
        return [future for future in futures if not self._is_waiting(future)]

    def _run_first(self, name: str) -> None:
        future, call = self.queues[name].pop(0)
        try:
            future.value = call()
        except WorkerLost as error:
            for dead, _ in [(future, None), *self.queues[name]]:
                dead.error = error
            self.queues[name] = []
        except Exception as error:
            future.error = error

    def _is_waiting(self, future: LocalFuture) -> bool:
        return any(future is other for queue in self.queues.values() for other, _ in queue)

    def restart(self, handle: LocalHandle) -> None:
        self.restarted.append(handle.name)
        self.queues[handle.name] = []


class Scripted:
    """Answers, or fails as its script says; the calls of all are in one list."""

    def __init__(self, label: str, calls: list, script: list) -> None:
        self.label, self.calls, self.script = label, calls, script

    def work(self, piece: str) -> str:
        self.calls.append((self.label, piece))
        failure = self.script.pop(0) if self.script else None
        if failure is not None:
            raise failure
        return piece.upper()


def pool_of(*scripts: list, runtime: LocalRuntime | None = None, **options: Any) -> tuple[Pool, list]:
    runtime, calls = runtime or InTurn(), []
    handles = [
        runtime.spawn(f"worker-{index}", Scripted, Resources(), label=f"worker-{index}", calls=calls, script=list(script))
        for index, script in enumerate(scripts)
    ]
    return Pool(runtime, handles, **options), calls


def pieces(text: str) -> list[tuple[str]]:
    return [(letter,) for letter in text]


def test_work_in_the_background_is_handed_out_at_once_and_done_in_order() -> None:
    pool, calls = pool_of([], [])
    works = [pool.begin(Scripted.work, pieces(text)) for text in ("ab", "cd", "ef")]
    assert calls == [] and [len(queue) for queue in pool.runtime.queues.values()] == [3, 3], "each worker has a piece of each"
    assert pool.collect(works[1]) == ["C", "D"], "in any order"
    assert [piece for name, piece in calls if name == "worker-0"][:2] == ["a", "c"]
    assert pool.collect(works[0]) == ["A", "B"] and pool.collect(works[2]) == ["E", "F"]
    assert sorted(piece for _, piece in calls) == list("abcdef")


def test_settling_waits_for_everything_and_keeps_results() -> None:
    pool, calls = pool_of([], [])
    works = [pool.begin(Scripted.work, pieces(text)) for text in ("abc", "d")]
    pool.settle()
    assert len(calls) == 4 and [pool.collect(work) for work in works] == [["A", "B", "C"], ["D"]]
    pool.settle()
    assert pool.collect(pool.begin(Scripted.work, [])) == []


def test_a_lost_worker_returns_the_calls_of_all_its_works_and_only_what_it_ran_was_tried() -> None:
    failures = [WorkerLost("killed")] * 3
    pool, calls = pool_of(failures, attempts=2)
    works = [
        pool.begin(Scripted.work, pieces("a"), lambda index, error: "gave up"),
        pool.begin(Scripted.work, pieces("b")),
        pool.begin(Scripted.work, pieces("c")),
    ]
    assert pool.collect(works[0]) == ["gave up"], "killed its worker twice"
    assert [pool.collect(work) for work in works[1:]] == [["B"], ["C"]], "b killed it once, c waited behind both"
    assert [piece for _, piece in calls] == ["a", "a", "b", "b", "c"] and pool.num_lost == 3


def test_the_other_worker_takes_over_what_was_in_flight() -> None:
    pool, calls = pool_of([WorkerLost("killed")], [])
    pool.runtime.ping = lambda handle: pool.runtime.submit(SimpleNamespace(name="rebuilding", worker=Gone()), Gone.answer)
    works = [pool.begin(Scripted.work, pieces("ab")), pool.begin(Scripted.work, pieces("cd"))]
    assert [pool.collect(work) for work in works] == [["A", "B"], ["C", "D"]]
    assert [name for name, _ in calls].count("worker-0") == 1 and pool.num_lost == 1


class Gone:
    def answer(self) -> None:
        raise WorkerLost("still being rebuilt")


def test_an_error_waits_for_whoever_collects_its_work() -> None:
    pool, _ = pool_of([DataError("row 7 is bad")])
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

    pool, calls = pool_of([], runtime=Slow(), deadline=8.0)
    works = [pool.begin(Scripted.work, pieces(text)) for text in "abcd"]
    assert [pool.collect(work) for work in works] == [["A"], ["B"], ["C"], ["D"]] and pool.runtime.restarted == [] and len(calls) == 4
    pool, _ = pool_of([], runtime=Slow(), deadline=4.0, attempts=1)
    with pytest.raises(WorkerHung, match="hung for more than 4 s"):
        pool.map(Scripted.work, pieces("a"))


# ------------------------------------------------------------------------------------------------- weights of each batch


class Versioned:
    """A generator that remembers by which weights it generated what."""

    def __init__(self, calls: list) -> None:
        self.calls, self.version, self.lag = calls, 0, 0

    def adopt(self, version: int) -> None:
        self.version = version

    def generate(self, requests: list[Request], settings: Any, version: int) -> list[Rollout]:
        if self.version < version:
            raise StaleWeights("old")
        self.calls.append((requests[0].uid, self.version))
        zeros, versions = np.zeros(2, np.float32), np.full(2, self.version - self.lag, np.int32)
        return [
            Rollout(
                one.uid, one.group_uid, one.prompt_ids, np.zeros(2, np.int32), 2, np.arange(2, dtype=np.int16), zeros, zeros, versions, 2
            )
            for one in requests
        ]


def request(step: int) -> Issued:
    return Issued([Request(step, step, np.zeros(1, np.int32))], [None])


def pipeline(ahead: int, num_steps: int) -> tuple[RolloutQueue, SimpleNamespace, list]:
    runtime, calls = InTurn(), []
    generators = GeneratorPool(runtime, [runtime.spawn("generator-0", Versioned, Resources(), calls=calls)])
    crew = SimpleNamespace(generators=generators, version=0, runtime=runtime)
    generators.refresh = lambda handle: handle.worker.adopt(crew.version)
    return RolloutQueue(crew, request, SamplerConfig(), ahead, num_steps), crew, calls


@pytest.mark.parametrize(
    ("ahead", "versions"),
    [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 2, 3]), (9, [0] * 6)],
)
def test_batch_t_is_generated_by_weights_t_minus_1_minus_k(ahead: int, versions: list[int]) -> None:
    queue, crew, calls = pipeline(ahead, 6)
    for step in range(1, 7):
        _, rollouts = queue.batch(step)
        assert [one.uid for one in rollouts] == [step]
        assert len(queue.begun) == min(ahead, 6 - step)
        crew.generators.settle()
        crew.version = step
        crew.generators.handles[0].worker.adopt(step)
    assert calls == list(zip(range(1, 7), versions, strict=True)), "each batch once, none beyond the last step"


def test_weights_that_arrive_amid_generation_make_batches_fresher() -> None:
    queue, crew, calls = pipeline(2, 6)
    for step in range(1, 7):
        queue.batch(step)
        crew.version = step
        crew.generators.handles[0].worker.adopt(step)  # with batches waiting, which `settle` would have prevented
    assert [uid for uid, _ in calls] == [1, 2, 3, 4, 5, 6]
    assert [version for _, version in calls] == [0, 1, 2, 3, 4, 5]


def test_a_rebuilt_generator_serves_batches_in_flight_with_the_weights_of_now() -> None:
    queue, crew, calls = pipeline(1, 2)
    queue.batch(1)
    crew.version = 1
    crew.generators.handles[0].worker.adopt(-1)  # as after its restart
    assert queue.batch(2)[1][0].policy_version.tolist() == [1, 1] and calls == [(1, 0), (2, 1)]


def test_rollouts_that_are_too_old_are_never_trained_on() -> None:
    queue, crew, _ = pipeline(1, 3)
    crew.generators.handles[0].worker.lag = 2
    with pytest.raises(SyncError, match=r"step 1: rollout 1 was generated by weights 2 versions old, but max_staleness is 1"):
        queue.batch(1)


# ------------------------------------------------------------------------------------------------- whole runs in one process

ONLINE = ("run.phases=[online]", "run.steps=4", "run.checkpoint_every=2")
STALE = (*ONLINE, "algorithm.max_staleness=2", "algorithm.correction=none")
# The recorded log-probs are the likelihood: left to right, and of the tokens of each step where their positions are drawn at random.
TOKENS = (
    "algorithm.objective={name: token_clip}",
    "algorithm.kl.coefficient=0",
    "algorithm.reference=none",
    "learner.optimizer.learning_rate=1e-2",
)
EXACT = (
    *TOKENS,
    "sampler.name=left_to_right",
    "sampler.early_stop=off",
    "algorithm.views={name: prefix}",
    "algorithm.likelihood={name: exact, granularity: token}",
)
TRAJECTORY = (*TOKENS, "sampler.name=random", "algorithm.views={name: trajectory}", "algorithm.likelihood={name: trajectory}")


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def rows(run: Path) -> list[dict]:
    return [without_clocks(row) for row in read_metrics(run / "metrics.jsonl")]


def column(run: Path, key: str) -> list[float | None]:
    return [row.get(key) for row in rows(run)[1:]]


@pytest.fixture(scope="module")
def stale_run(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhub.training.run.write_report", lambda folders: folders[0] / "report.html")
        return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('stale')}", *STALE), silent())


def test_staleness_grows_to_its_bound_and_is_logged(stale_run: Path) -> None:
    assert column(stale_run, "async/staleness_mean") == column(stale_run, "async/staleness_max") == [0, 1, 2, 2]
    assert column(stale_run, "async/mixed_share") == [0.0] * 4
    assert [row["sync/version"] for row in rows(stale_run)[1:]] == [1, 2, 3, 4]


def test_only_rollouts_of_the_learners_weights_are_replayed(stale_run: Path) -> None:
    first, *later = column(stale_run, "replay/max_gap")
    assert first < 1e-4 and later == [None] * 3


def uids(run: Path, step: int) -> list[int]:
    return [sample["uid"] for sample in read_rollouts(rollout_path(run, step))]


def test_a_killed_run_goes_on_with_the_same_prompts(stale_run: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    killed = Path(shutil.copytree(stale_run, tmp_path / "tiny"))
    shutil.rmtree(killed / "checkpoints" / "step_00004")
    train(tiny(f"run.output_dir={tmp_path}", *STALE), silent())
    assert column(killed, "async/staleness_max") == [0, 1, 0, 1], "batches in flight were generated again by the checkpoint's weights"
    for step in range(1, 5):
        assert uids(killed, step) == uids(stale_run, step)
    every = [uid for step in range(1, 5) for uid in uids(killed, step)]
    assert len(every) == len(set(every)) == 4 * 16


def test_an_undisturbed_run_repeats_itself(stale_run: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    assert rows(train(tiny(f"run.output_dir={tmp_path}", *STALE), silent())) == rows(stale_run)


@pytest.mark.parametrize("parts", [EXACT, TRAJECTORY])
def test_the_first_batch_of_a_run_is_on_policy_and_weighs_one(tiny: Callable[..., Recipe], tmp_path: Path, parts: tuple[str, ...]) -> None:
    run = train(tiny(f"run.output_dir={tmp_path}", *ONLINE, *parts, "algorithm.max_staleness=1", "algorithm.updates=1"), silent())
    means, largest = column(run, "async/correction_mean"), column(run, "async/correction_max")
    assert means[0] == pytest.approx(1, abs=1e-4) and largest[0] == pytest.approx(1, abs=1e-3), "recorded log-probs are the learner's"
    assert all(abs(value - 1) > 1e-3 for value in largest[1:]) and all(value <= 2 for value in largest)
    assert column(run, "async/correction_capped_share")[0] == 0


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "low_confidence chooses positions by draws"),
        ([*EXACT, "algorithm.likelihood={name: elbo}"], "the likelihood elbo does not score"),
        ([*EXACT, "algorithm.length=response"], "training sees less of the canvas"),
        ([*EXACT, "sampler.early_stop=fill_eos"], "tokens that sampler.early_stop fills in"),
        ([*TRAJECTORY, "algorithm.views={name: trajectory, shrink: 2}"], "the likelihood trajectory merges steps"),
        ([*EXACT, "algorithm.advantage.name=best_worst", "algorithm.objective={name: simpo}"], "simpo has no advantages"),
    ],
)
def test_what_cannot_be_corrected_is_refused_with_the_way_out(tiny: Callable[..., Recipe], overrides: list[str], problem: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"algorithm\.correction: auto .* but .*{problem}.*correction=none, algorithm\.max_staleness=0 or"
    ):
        tiny(*ONLINE, *overrides, "algorithm.max_staleness=1")
    tiny(*ONLINE, *overrides, "algorithm.max_staleness=1", "algorithm.correction=none")


def test_only_the_online_phase_can_be_stale(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"algorithm\.max_staleness: 1, but only the phase online generates"):
        tiny("run.phases=[sft]", "algorithm.max_staleness=1")


def test_the_plan_shows_the_pipeline(tiny: Callable[..., Recipe]) -> None:
    text = " ".join(format_plan(make_plan(tiny(*STALE, "run.runtime=ray"))).replace("│", " ").split())
    assert (
        "3 batches of 16 sequences in flight, rollouts up to 2 versions old, not weighed; new weights are adopted between batches" in text
    )
    assert "no faster than 1" in text and "trained on as if the newest ones had generated them" in text
    exact = (*ONLINE, *EXACT, "run.runtime=ray", "algorithm.max_staleness=1", "weights.in_flight=true")
    text = " ".join(format_plan(make_plan(tiny(*exact))).replace("│", " ").split())
    assert "weights of at most 2; new weights are adopted amid batches" in text and "cannot be repeated bit for bit" in text
    assert "saves no time in one process" in " ".join(format_plan(make_plan(tiny(*STALE))).split())
    assert "versions old" not in format_plan(make_plan(tiny()))
