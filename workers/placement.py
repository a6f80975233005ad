"""Starting the crew of a run: what each worker asks for, and where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rewards.pool import longest_call
from rlhub.config.schema import Recipe
from rlhub.parts import load_part
from workers.crew import Crew, GeneratorPool, GraderPool, LearnerGroup, ScorerGroup, gather
from workers.generator import Generator
from workers.learner import Learner
from workers.reward import RewardWorker
from workers.runtimes.runtime import Handle, LocalRuntime, Resources, Runtime
from workers.scorer import Scorer

W = TypeVar("W")


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
    shared: dict[str, Any] = {"dtype": recipe.model.dtype, "attention": recipe.model.attention, "threads": threads}

    def spawn(role: str, index: int, build: Callable[..., W], gpus: float = 0, **kwargs: Any) -> Handle[W]:
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
    workers: list[Handle[Any]] = [*learners, *scorers, *generators, *graders]
    gather(runtime, [runtime.ping(handle) for handle in workers])
    if recipe.learner.backend == "deepspeed" or roles.learners > 1:
        address = runtime.get(runtime.submit(learners[0], Learner.rendezvous))
        gather(runtime, [runtime.submit(learner, Learner.join, address) for learner in learners])
    # Members of a process group must run at the same time, so in one process the weights go through memory.
    name = recipe.weights.transport if recipe.run.runtime == "ray" else "object_store"
    transport = load_part("transports", name).Transport(runtime, learners, recipe.weights)
    return Crew(
        runtime,
        LearnerGroup(runtime, learners),
        ScorerGroup(runtime, scorers),
        generators=GeneratorPool(runtime, generators, deadline=roles.generate_timeout_seconds if recipe.run.runtime == "ray" else None),
        graders=GraderPool(
            runtime, graders, deadline=longest_call(recipe.reward_pool) if recipe.run.runtime == "ray" else None, attempts=2
        ),
        transport=transport,
        bucket_bytes=int(recipe.weights.bucket_megabytes * 2**20),
        sync_timeout=recipe.weights.timeout_seconds if recipe.run.runtime == "ray" else None,
    )
