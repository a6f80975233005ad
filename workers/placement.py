"""The crew of a run: which workers there are, what each asks for, and the weight transport between them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rewards.pool import longest_call
from rlhub.config.schema import Recipe
from rlhub.errors import SyncError, WorkerLost
from rlhub.types import Receipt
from workers.generator import Generator
from workers.learner import Learner
from workers.reward import RewardWorker
from workers.runtimes.runtime import Handle, LocalRuntime, Resources, Runtime
from workers.scorer import Scorer
from workers.supervisor import Pool


@dataclass
class Crew:
    """All workers of a run and what the controller asks of them."""

    runtime: Runtime
    learners: list[Handle]
    scorers: list[Handle]
    generators: Pool
    graders: Pool
    transport: Any
    bucket_bytes: int
    sync_timeout: float | None = None  # seconds
    version: int = -1
    last_receipt: Receipt | None = field(default=None)

    def __post_init__(self) -> None:
        self.generators.refresh = self.refresh

    def learn(self, method: str, *args: Any) -> Any:
        """Call a method on every learner at once; the result of rank 0."""
        return self.collect([self.runtime.submit(learner, method, *args) for learner in self.learners])[0]

    def collect(self, futures: Sequence[Any]) -> list[Any]:
        """The values of futures, see `gather`."""
        return gather(self.runtime, futures)

    def publish(self, version: int, concurrent: bool = False) -> Receipt:
        """Give every generator the learners' weights as `version` and compare receipts.

        A generator that is being rebuilt or does not answer in time is left out; it is brought up to date when it is readmitted.

        Args:
            concurrent: generators adopt them between two steps of the batch that they are at, instead of after it.

        Raises:
            SyncError: a generator holds something else than the learners.
        """
        self.version = version
        receipts = self.transport.push(self.generators.handles, version, concurrent)
        self.last_receipt = self.learn("receipt", version, self.bucket_bytes)
        handles = {handle.name: handle for handle in self.generators.handles}
        for name, future in receipts.items():
            if not self.runtime.wait([future], timeout=self.sync_timeout):
                self.runtime.restart(handles[name])
                continue
            try:
                self._check(name, self.runtime.get(future))
            except WorkerLost:
                continue
        return self.last_receipt

    def refresh(self, receiver: Handle) -> None:
        """Bring one generator or scorer up to date."""
        self._check(receiver.name, self.runtime.get(self.transport.refresh(receiver, self.version)))

    def set_reference(self, model_path: str) -> None:
        """Give every scorer the weights of a model folder."""
        for future in [self.runtime.submit(scorer, "load", model_path) for scorer in self.scorers]:
            self.runtime.get(future)

    def copy_reference(self) -> None:
        """Give every scorer the weights that were published last."""
        for scorer in self.scorers:
            self.refresh(scorer)

    def save_reference(self, folder: str) -> None:
        """Write the reference's weights, for references that follow the policy."""
        self.runtime.get(self.runtime.submit(self.scorers[0], "save", folder))

    def close(self) -> None:
        self.transport.close()
        for learner in self.learners:
            self.runtime.submit(learner, "leave")
        self.runtime.close()

    def _check(self, name: str, received: Receipt) -> None:
        difference = self.last_receipt.mismatch(received)
        if difference is not None:
            raise SyncError(f"{name} holds other weights than the learners: {difference}")


def gather(runtime: Runtime, futures: Sequence[Any]) -> list[Any]:
    """All values. A failure is raised soon, since the other members of a collective may wait for the one that failed.

    Raises:
        WorkerLost: where a worker died, also when the error of another one that needed it arrives first.
    """
    waiting, values, errors = list(futures), {}, []
    while waiting and not any(isinstance(error, WorkerLost) for error in errors):
        ready = runtime.wait(waiting, timeout=2.0 if errors else None)
        if not ready:
            break
        for future in ready:
            waiting.remove(future)
            try:
                values[id(future)] = runtime.get(future)
            except Exception as error:
                errors.append(error)
    if errors:
        raise next((error for error in errors if isinstance(error, WorkerLost)), errors[0])
    return [values[id(future)] for future in futures]


def demands(recipe: Recipe) -> dict[str, Resources]:
    """What one worker of each role asks for. Reward workers need no thread of their own while a model computes."""
    roles = recipe.roles
    return {
        "learner": Resources(roles.threads, roles.gpus_per_learner),
        "scorer": Resources(roles.threads, roles.gpus_per_scorer),
        "generator": Resources(roles.threads, roles.gpus_per_generator, restarts=-1, concurrent=recipe.weights.in_flight),
        "reward": Resources(1, roles.gpus_per_reward_worker, restarts=-1),
    }


def assemble(recipe: Recipe, model_path: Path, log_folder: Path | None = None) -> Crew:
    """Start the runtime and spawn every worker from the same model folder.

    Raises:
        RecipeError: the cluster cannot hold the roles.
    """
    roles, wanted = recipe.roles, demands(recipe)
    counts = {"learner": roles.learners, "scorer": roles.scorers, "generator": roles.generators, "reward": roles.reward_workers}
    if recipe.run.runtime == "local":
        import torch

        torch.set_num_threads(roles.threads)
        runtime: Runtime = LocalRuntime()
    else:
        from workers.runtimes.ray_runtime import RayRuntime

        every = [wanted[role] for role, count in counts.items() for _ in range(count)]
        runtime = RayRuntime(every, log_folder, dashboard=recipe.run.dashboard)

    try:
        return _spawn_all(recipe, model_path, runtime, wanted)
    except BaseException:
        runtime.close()
        raise


def _spawn_all(recipe: Recipe, model_path: Path, runtime: Runtime, wanted: dict[str, Resources]) -> Crew:
    roles = recipe.roles
    threads = roles.threads if recipe.run.runtime != "local" else None
    shared = {"dtype": recipe.model.dtype, "attention": recipe.model.attention, "threads": threads}

    def spawn(role: str, index: int, build: type, gpus: float = 0, **kwargs: Any) -> Handle:
        device = {"device": "cuda" if gpus else "cpu"} if role != "reward" else {}
        return runtime.spawn(f"{role}-{index}", build, wanted[role], **kwargs, **device)

    learners = [
        spawn(
            "learner",
            rank,
            Learner,
            roles.gpus_per_learner,
            model_path=str(model_path),
            config=recipe.learner,
            run_seed=recipe.run.seed,
            rank=rank,
            num_learners=roles.learners,
            router=recipe.model.router,
            **shared,
        )
        for rank in range(roles.learners)
    ]
    scorers = [
        spawn(
            "scorer",
            index,
            Scorer,
            roles.gpus_per_scorer,
            model_path=str(model_path),
            micro_batch_tokens=recipe.learner.micro_batch_tokens,
            **shared,
        )
        for index in range(roles.scorers)
    ]
    generators = [
        spawn(
            "generator",
            index,
            Generator,
            roles.gpus_per_generator,
            model_path=str(model_path),
            run_seed=recipe.run.seed,
            engine=roles.engine,
            **shared,
        )
        for index in range(roles.generators)
    ]
    graders = [
        spawn("reward", index, RewardWorker, part=recipe.task.reward, **asdict(recipe.reward_pool)) for index in range(roles.reward_workers)
    ]
    gather(runtime, [runtime.ping(handle) for handle in (*learners, *scorers, *generators, *graders)])
    if recipe.learner.backend == "deepspeed" or roles.learners > 1:
        address = runtime.get(runtime.submit(learners[0], "rendezvous"))
        gather(runtime, [runtime.submit(learner, "join", address) for learner in learners])
    # Members of a process group must run at the same time, so in one process the weights go through memory.
    name = recipe.weights.transport if recipe.run.runtime == "ray" else "object_store"
    module = importlib.import_module(name if "." in name else f"workers.transports.{name}")
    transport = module.Transport(runtime, learners, recipe.weights)
    return Crew(
        runtime,
        learners,
        scorers,
        generators=Pool(runtime, generators, deadline=roles.generate_timeout_seconds if recipe.run.runtime == "ray" else None),
        graders=Pool(runtime, graders, deadline=longest_call(recipe.reward_pool) if recipe.run.runtime == "ray" else None, attempts=2),
        transport=transport,
        bucket_bytes=int(recipe.weights.bucket_megabytes * 2**20),
        sync_timeout=recipe.weights.timeout_seconds if recipe.run.runtime == "ray" else None,
    )
