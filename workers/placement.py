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
    """Every worker, joined to its group, as a crew."""
    roles, is_local = recipe.roles, recipe.run.runtime == "local"

    def spawn(role: str, index: int, build: Callable[..., W], gpus: float = 0, **kwargs: Any) -> Handle[W]:
        device = {"device": "cuda" if gpus else "cpu"} if role != "reward" else {}
        return runtime.spawn(f"{role}-{index}", build, wanted[role], **kwargs, **device)

    model: dict[str, Any] = {
        "model_path": str(model_path),
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "threads": None if is_local else roles.threads,
    }
    learning = {"config": recipe.learner, "router": recipe.model.router, "num_learners": roles.learners}
    learners = [
        spawn("learner", rank, Learner, roles.gpus_per_learner, run_seed=recipe.run.seed, rank=rank, **learning, **model)
        for rank in range(roles.learners)
    ]
    scorers = [
        spawn("scorer", index, Scorer, roles.gpus_per_scorer, micro_batch_tokens=recipe.learner.micro_batch_tokens, **model)
        for index in range(roles.scorers)
    ]
    generators = [
        spawn("generator", index, Generator, roles.gpus_per_generator, run_seed=recipe.run.seed, engine=roles.engine, **model)
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
    transport = load_part("transports", "object_store" if is_local else recipe.weights.transport)
    return Crew(
        runtime,
        LearnerGroup(runtime, learners),
        ScorerGroup(runtime, scorers),
        GeneratorPool(runtime, generators, deadline=None if is_local else roles.generate_timeout_seconds),
        GraderPool(runtime, graders, deadline=None if is_local else longest_call(recipe.reward_pool), attempts=2),
        transport.Transport(runtime, learners, recipe.weights),
        bucket_bytes=int(recipe.weights.bucket_megabytes * 2**20),
        sync_timeout=None if is_local else recipe.weights.timeout_seconds,
    )
