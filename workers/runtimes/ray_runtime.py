"""Workers as Ray actors."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhub.errors import RecipeError, WorkerLost
from rlhub.siblings import ROOT, SIBLINGS
from workers.runtimes.runtime import Future, Handle, Interval, Resources, T, T_co, Ts, W, W_co


class Host:
    """The actor around a worker: builds it, times its calls by its own clock and writes its log file.

    A worker that cannot be built says why in the answer to every call, so that the error arrives as itself.
    """

    def __init__(self, name: str, log_file: str | None, build: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if log_file is not None:
            _log_to(log_file)
        self.log = logging.getLogger("rlhub")
        self.log.info("%s starts as process %d", name, os.getpid())
        self.error: Exception | None = None
        try:
            self.worker = build(**kwargs)
        except Exception as error:
            self.log.exception("%s cannot start", name)
            self.error = error
        # What exists now stays: without this the collector walks over all imported modules again and again, a tenth of a second each time.
        gc.collect()
        gc.freeze()

    @ray.method(num_returns=2)
    def call(self, method: str, *args: Any) -> tuple[Any, Interval]:
        started = time.time()
        with self._logged(method):
            return getattr(self.worker, method)(*args), (started, time.time())

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """The items of a generator method, then the interval that it took."""
        started = time.time()
        with self._logged(method):
            yield from getattr(self.worker, method)(*args)
        yield started, time.time()

    def ping(self) -> int:
        """The process id, which changes when the actor was rebuilt."""
        with self._logged("ping"):
            return os.getpid()

    @contextmanager
    def _logged(self, method: str) -> Iterator[None]:
        if self.error is not None:
            raise self.error
        try:
            yield
        except Exception:
            self.log.exception("%s failed", method)
            raise


def _log_to(path: str) -> None:
    """Send log records, and whatever else this process prints, to a file."""
    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


BESIDE = "beside"  # concurrency group of calls that run beside the others


@dataclass(frozen=True)
class RayHandle(Handle[W_co]):
    name: str
    actor: Any
    log_file: str | None
    concurrent: bool = False

    def method(self, name: str, concurrent: bool) -> Any:
        """A method of the actor, for its second thread where that is asked for and there is one."""
        method = getattr(self.actor, name)
        return method.options(concurrency_group=BESIDE) if concurrent and self.concurrent else method


@dataclass(frozen=True)
class RayFuture(Future[T_co]):
    value: Any
    handle: RayHandle[Any] | None  # whose result it is; None for a value that the controller put


@dataclass
class RayRuntime:
    """Actors on the cluster that `RAY_ADDRESS` names (as in `ray job submit`), or on one started here.

    Args:
        demands: what each worker that will be spawned asks for, in that order: reserved at once, so that a cluster that is too small
            is an error and not a hang.
        log_folder: where each worker writes `<name>.log`; None leaves it to Ray.
        dashboard: start Ray's dashboard with a cluster of our own.
        reserve_timeout: seconds to wait for the reservation.
    """

    demands: list[Resources]
    log_folder: Path | None = None
    dashboard: bool = False
    reserve_timeout: float = 120.0
    handles: list[RayHandle[Any]] = field(default_factory=list, init=False)
    pending: list[tuple[str, Any, float]] = field(default_factory=list, init=False)  # worker, interval of a call, when it was submitted

    def __post_init__(self) -> None:
        self.owns_connection = not ray.is_initialized()
        if self.owns_connection:
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if os.getcwd() != ROOT and any(PathFinder.find_spec(name, [os.getcwd()]) for name in ("rlhub", *SIBLINGS)):
                options["runtime_env"] = {"worker_process_setup_hook": _own_packages(ROOT)}
            if "RAY_ADDRESS" not in os.environ:
                _choose_token(keep=self.dashboard)
                # Roles take turns on a small machine, so it may declare more CPUs than it has.
                wanted = sum(demand.cpus for demand in self.demands)
                cpus = max(os.cpu_count() or 1, int(wanted) + 1)
                options |= {"address": "local", "num_cpus": cpus, "include_dashboard": self.dashboard}
            ray.init(**options)
        bundles = [{"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {}) for demand in self.demands]
        self.group = placement_group(bundles, strategy="PACK")
        try:
            ready, _ = ray.wait([self.group.ready()], timeout=self.reserve_timeout)
            if not ready:
                have = ray.cluster_resources()  # type: ignore[no-untyped-call]
                cpu, gpu = (sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU"))
                raise RecipeError(
                    f"the roles ask for {cpu:g} CPUs and {gpu:g} GPUs, "
                    f"the cluster has {have.get('CPU', 0):g} and {have.get('GPU', 0):g}; lower roles.* or add nodes"
                )
        except BaseException:
            self.close()
            raise

    def spawn(self, name: str, build: Callable[..., W], resources: Resources, **kwargs: Any) -> Handle[W]:
        """A named actor on the next of the reserved bundles; its log file is named after it."""
        host = type(build.__name__, (Host,), {"__doc__": build.__doc__})
        log_file = None if self.log_folder is None else str(self.log_folder / f"{name}.log")
        actor = (
            cast(Any, ray.remote)(concurrency_groups={BESIDE: 1} if resources.concurrent else {})(host)
            .options(
                name=f"{name}-{secrets.token_hex(4)}",
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                max_restarts=resources.restarts,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=len(self.handles)),
            )
            .remote(name, log_file, build, kwargs)
        )
        handle: RayHandle[W] = RayHandle(name, actor, log_file, resources.concurrent)
        self.handles.append(handle)
        return handle

    def submit(self, handle: Handle[W], method: Callable[[W, *Ts], T], *args: *Ts, concurrent: bool = False) -> Future[T]:
        worker = cast(RayHandle[W], handle)
        value, interval = worker.method("call", concurrent).remote(method.__name__, *_references(args))
        self.pending.append((worker.name, interval, time.time()))
        return RayFuture(value, worker)

    def put(self, value: T) -> Future[T]:
        return RayFuture(ray.put(value), None)

    def stream(self, handle: Handle[W], method: Callable[[W, *Ts], Iterable[T]], *args: *Ts) -> list[Future[T]]:
        worker = cast(RayHandle[W], handle)
        with _translated(worker):
            *items, interval = worker.actor.stream.options(num_returns="streaming").remote(method.__name__, *_references(args))
            ray.get(interval)  # where an error of the method would stand
        self.pending.append((worker.name, interval, time.time()))
        return [RayFuture(item, worker) for item in items]

    def get(self, future: Future[T]) -> T:
        sent = cast(RayFuture[T], future)
        with _translated(sent.handle):
            return cast(T, ray.get(sent.value))

    def wait(self, futures: Sequence[Future[T]], timeout: float | None) -> list[Future[T]]:
        by_ref = {cast(RayFuture[T], future).value: future for future in futures}
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout)
        return [by_ref[ref] for ref in ready]

    def ping(self, handle: Handle[Any]) -> Future[int]:
        worker = cast(RayHandle[Any], handle)
        return RayFuture(worker.method("ping", concurrent=True).remote(), worker)

    def restart(self, handle: Handle[Any]) -> None:
        ray.kill(cast(RayHandle[Any], handle).actor, no_restart=False)

    def take_intervals(self) -> dict[str, list[Interval]]:
        """Busy intervals of each worker since the last call; a call that still runs counts until now."""
        taken: dict[str, list[Interval]] = defaultdict(list)
        pending, self.pending = self.pending, []
        ended = set(ray.wait([ref for _, ref, _ in pending], num_returns=len(pending), timeout=0)[0]) if pending else set()
        for name, ref, submitted in pending:
            if ref not in ended:  # it runs, or waits for calls that do: until now its worker was busy
                taken[name].append((submitted, time.time()))
                self.pending.append((name, ref, submitted))
                continue
            try:
                interval = ray.get(ref)
            except Exception:  # a failed call has no interval, and whoever gets its value gets its error
                continue
            taken[name].append(interval)
        return taken

    def close(self) -> None:
        """End the workers and give their resources back, also where the cluster or the connection is not ours."""
        if not ray.is_initialized():
            return
        for handle in self.handles:
            ray.kill(handle.actor, no_restart=True)
        self.handles = []
        remove_placement_group(self.group)
        if self.owns_connection:
            ray.shutdown()


def _own_packages(root: str) -> Callable[[], None]:
    """What a worker process does first: it imports `rlhub` from where it lies here, and with it the way to the packages beside it.

    Ray puts the current folder in front of a worker's path, where a `workers.py` of the user's may lie.
    """

    def import_rlhub() -> None:  # pickled by value, since nothing of ours can be imported before it has run
        import importlib
        import sys

        sys.path.insert(0, root)
        importlib.import_module("rlhub")
        sys.path.remove(root)

    return import_rlhub


def _choose_token(keep: bool) -> None:
    """Give a cluster of our own a token that ends with this process.

    Ray turns token authentication on for local clusters and would leave the token in ~/.ray. It still does where somebody must be able
    to read it (`keep`, for the dashboard), and whatever the user configured stands.
    """
    if not keep and not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _references(args: Sequence[Any]) -> list[Any]:
    return [arg.value if isinstance(arg, RayFuture) else arg for arg in args]


class _translated:
    """Turns Ray's errors into ours: a dead worker is WorkerLost, a failed method raises what it raised."""

    def __init__(self, handle: RayHandle[Any] | None) -> None:
        self.name = "the controller" if handle is None else handle.name
        self.log = f"; its log is {handle.log_file}" if handle is not None and handle.log_file else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> Literal[False]:
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, RayActorError | ObjectLostError):
                raise WorkerLost(f"{self.name} needed a result of a worker that died{self.log}") from error
            raise error.cause from error
        if isinstance(error, RayError):
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise WorkerLost(f"{self.name} died ({reason}){self.log}") from error
        return False
