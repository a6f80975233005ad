"""Workers, runtimes and crews that stand in for the real ones: they follow a script, record calls, or answer in an order of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from helpers import a_rollout

from rlhub.config.schema import Recipe
from rlhub.config.tasks import evaluation_task
from rlhub.errors import WorkerLost
from rlhub.records.progress import RunProgress
from rlhub.records.trackers import Trackers
from rlhub.tasks import load_task, task_tokenizer
from rlhub.training.session import Session, StopRequest
from rlhub.types import Receipt, RewardResult, Rollout
from workers.crew import Crew, GeneratorPool, GraderPool, LearnerGroup, ScorerGroup
from workers.generator import StaleWeights
from workers.runtimes.runtime import LocalFuture, LocalHandle, LocalRuntime, Resources
from workers.supervisor import Pool
from workers.transports.object_store import Transport


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
    """A worker that answers, or fails as its script says; the calls of all are in one list."""

    def __init__(self, label: str, calls: list, script: list) -> None:
        self.label, self.calls, self.script = label, calls, script

    def work(self, piece: object) -> str:
        self.calls.append((self.label, piece))
        failure = self.script.pop(0) if self.script else None
        if failure is not None:
            raise failure
        return str(piece).upper()

    def grade(self, items: list) -> list[RewardResult]:
        self.calls.append(items)
        if any("poison" in completion for _, completion, _ in items):
            raise WorkerLost("reward-0 died")
        return [RewardResult(float(len(completion))) for _, completion, _ in items[:3]]


def scripted_pool(runtime: LocalRuntime, *scripts: list, **options: Any) -> tuple[Pool, list]:
    """A pool with one worker for each script, and the calls of all of them."""
    calls: list = []
    handles = [
        runtime.spawn(f"worker-{index}", Scripted, Resources(), label=f"worker-{index}", calls=calls, script=list(script))
        for index, script in enumerate(scripts)
    ]
    return Pool(runtime, handles, **options), calls


class Recording:
    """Every role at once: remembers its calls and answers with the least that the loop needs."""

    def __init__(self, role: str, calls: list) -> None:
        self.role, self.calls, self.version = role, calls, -1

    def __getattr__(self, method: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.calls.append((self.role, method, args))
            return None

        return call

    def make_views(self, batch: object) -> list[str]:
        self.calls.append((self.role, "make_views", (batch,)))
        return ["views"]

    def score(self, views: list, first: int, stride: int) -> dict:
        self.calls.append((self.role, "score", (views, first, stride)))
        return {0: f"scores of {views}"}

    def step(self, *args: object) -> dict:
        self.calls.append((self.role, "step", args))
        return {"loss": 1.0}

    def replay_check(self, rollouts: list) -> dict:
        self.calls.append((self.role, "replay_check", (len(rollouts),)))
        return {"replay/max_gap": 0.0}

    def publish(self, bucket_bytes: int):
        self.calls.append((self.role, "publish", ()))
        yield np.zeros(1)

    def receipt(self, version: int, bucket_bytes: int) -> Receipt:
        return Receipt(version, 1, 1, ("hash",), (0.0,))

    def receive(self, version: int, bucket_bytes: int, *buckets: object) -> Receipt:
        self.calls.append((self.role, "receive", (version,)))
        self.version = version
        return self.receipt(version, bucket_bytes)

    def generate(self, requests: list, settings: object, version: int) -> list[Rollout]:
        self.calls.append((self.role, "generate", (len(requests), version)))
        if version != self.version:
            raise StaleWeights("old")
        fields = vars(a_rollout(0)) | {"policy_version": np.full(4, version, np.int32)}
        return [Rollout(**{**fields, "uid": request.uid, "group_uid": request.group_uid}) for request in requests]

    def grade(self, items: list) -> list[RewardResult]:
        self.calls.append((self.role, "grade", (len(items),)))
        return [RewardResult(1.0)] * len(items)


def recording_crew(recipe: Recipe, num_learners: int = 1) -> tuple[Crew, list]:
    """A crew of the recipe's size, but for the learners, that records (role, method, arguments), and its calls in their order."""
    calls: list = []
    runtime, roles = LocalRuntime(), recipe.roles

    def spawn(role: str, count: int) -> list:
        return [runtime.spawn(f"{role}-{index}", Recording, Resources(), role=role, calls=calls) for index in range(count)]

    learners = spawn("learner", num_learners)
    crew = Crew(
        runtime=runtime,
        learners=LearnerGroup(runtime, learners),
        scorers=ScorerGroup(runtime, spawn("scorer", roles.scorers)),
        generators=GeneratorPool(runtime, spawn("generator", roles.generators)),
        graders=GraderPool(runtime, spawn("reward", roles.reward_workers)),
        transport=Transport(runtime, learners, recipe.weights),
        bucket_bytes=2**20,
    )
    return crew, calls


def session_of(recipe: Recipe, folder: Path, crew: Crew, trackers: Trackers, **fields: Any) -> Session:
    """A session on the task sort that begins at the beginning."""
    progress = RunProgress(enabled=False)
    defaults = {
        "recipe": recipe,
        "folder": folder,
        "model_path": folder,
        "tokenizer": task_tokenizer("sort", {}),
        "train_task": load_task("sort", recipe.task.train, "train", 0),
        "eval_task": evaluation_task(recipe),
        "crew": crew,
        "trackers": trackers,
        "progress": progress,
        "position": None,
        "stop": StopRequest(progress),
    }
    session = Session(**(defaults | fields))
    session.stop_ids = (session.tokenizer.eos_token_id,)  # of a model that is not there
    return session
