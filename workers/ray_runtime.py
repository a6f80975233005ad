"""Workers as Ray actors."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhub.errors import RecipeError, WorkerLost
from workers.runtime import Interval, Resources


class Host:
    """The actor around a worker: builds it, times its calls by its own clock and writes its log file."""

    def __init__(self, name: str, log_file: str | None, build: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        if log_file is not None:
            logging.basicConfig(
                filename=log_file, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
            )
        logging.getLogger("rlhub").info("%s starts as process %d", name, os.getpid())
        self.worker = build(**kwargs)

    @ray.method(num_returns=2)
    def call(self, method: str, *args: Any) -> tuple[Any, Interval]:
        started = time.time()
        try:
            value = getattr(self.worker, method)(*args)
        except Exception:
            logging.getLogger("rlhub").exception("%s failed", method)
            raise
        return value, (started, time.time())

    def stream(self, method: str, *args: Any):
        yield from getattr(self.worker, method)(*args)

    def ping(self) -> int:
        """The process id, which changes when the actor was rebuilt."""
        return os.getpid()


@dataclass(frozen=True)
class RayHandle:
    name: str
    actor: Any


@dataclass(frozen=True)
class RayFuture:
    value: Any
    name: str


@dataclass
class RayRuntime:
    """Actors on the cluster that `RAY_ADDRESS` names (as in `ray job submit`), or on one started here.

    Args:
        num_workers: workers that will be spawned, and `cpus`, `gpus` what they ask for together: reserved at once, so that a cluster
            that is too small is an error and not a hang.
    """

    demands: list[Resources]
    log_folder: Path | None = None
    dashboard: bool = False
    reserve_timeout: float = 120.0
    pending: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owns_cluster = not ray.is_initialized()
        if self.owns_cluster:
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if "RAY_ADDRESS" not in os.environ:
                # Roles take turns on a small machine, so it may declare more CPUs than it has.
                wanted = sum(demand.cpus for demand in self.demands)
                options |= {"num_cpus": max(os.cpu_count() or 1, int(wanted) + 1), "include_dashboard": self.dashboard}
            ray.init(**options)
        bundles = [{"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {}) for demand in self.demands]
        self.group = placement_group(bundles, strategy="PACK")
        ready, _ = ray.wait([self.group.ready()], timeout=self.reserve_timeout)
        if not ready:
            have = ray.cluster_resources()
            self.close()
            cpus, gpus = (sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU"))
            raise RecipeError(
                f"the roles ask for {cpus:g} CPUs and {gpus:g} GPUs, the cluster has {have.get('CPU', 0):g} and {have.get('GPU', 0):g}; "
                "lower roles.* or add nodes"
            )
        self.spawned = 0

    def spawn(self, name: str, build: Callable[..., Any], resources: Resources, **kwargs: Any) -> RayHandle:
        host = type(build.__name__, (Host,), {"__doc__": build.__doc__})
        log_file = None if self.log_folder is None else str(self.log_folder / f"{name}.log")
        actor = (
            ray.remote(host)
            .options(
                name=f"{name}-{id(self):x}",
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                max_restarts=resources.restarts,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.spawned),
                runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
            )
            .remote(name, log_file, build, kwargs)
        )
        self.spawned += 1
        return RayHandle(name, actor)

    def submit(self, handle: RayHandle, method: str, *args: Any) -> RayFuture:
        args = [arg.value if isinstance(arg, RayFuture) else arg for arg in args]
        value, interval = handle.actor.call.remote(method, *args)
        self.pending.append((handle.name, interval))
        return RayFuture(value, handle.name)

    def put(self, value: Any) -> RayFuture:
        return RayFuture(ray.put(value), "controller")

    def stream(self, handle: RayHandle, method: str, *args: Any) -> list[RayFuture]:
        args = [arg.value if isinstance(arg, RayFuture) else arg for arg in args]
        with _translated(handle.name):
            return [RayFuture(ref, handle.name) for ref in handle.actor.stream.options(num_returns="streaming").remote(method, *args)]

    def get(self, future: RayFuture) -> Any:
        with _translated(future.name):
            return ray.get(future.value)

    def wait(self, futures: Sequence[RayFuture], timeout: float | None) -> list[RayFuture]:
        by_ref = {future.value: future for future in futures}
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout)
        return [by_ref[ref] for ref in ready]

    def restart(self, handle: RayHandle) -> None:
        ray.kill(handle.actor, no_restart=False)

    def ping(self, handle: RayHandle, timeout: float = 10.0) -> int | None:
        """The worker's process id, or None when it does not answer in time."""
        try:
            return ray.get(handle.actor.ping.remote(), timeout=timeout)
        except (RayActorError, GetTimeoutError):
            return None

    def take_intervals(self) -> dict[str, list[Interval]]:
        taken: dict[str, list[Interval]] = defaultdict(list)
        pending, self.pending = self.pending, []
        for name, ref in pending:
            try:
                taken[name].append(ray.get(ref))
            except RayError:
                continue  # a failed call has no interval
        return taken

    def close(self) -> None:
        if self.owns_cluster and ray.is_initialized():
            ray.shutdown()


class _translated:
    """Turns Ray's errors into ours: a dead worker is WorkerLost, a failed method raises what it raised."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, RayActorError):
                raise WorkerLost(f"{self.name} needed a result of a worker that died") from error
            raise cause from error
        if isinstance(error, RayError):
            raise WorkerLost(f"{self.name} died or is being restarted: {str(error).splitlines()[0]}") from error
