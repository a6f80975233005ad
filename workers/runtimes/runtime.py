"""Where workers run: the same classes in this process or as Ray actors, behind five verbs.

`spawn` a worker, `submit` a method call (returns a future), `get` values, `wait` for any of several futures, `stream` the items that a
generator method yields. The controller is written against these, so a laptop and a cluster run the same loop.

A method is named by its function, `runtime.submit(handle, Learner.load, folder)`, so that editors and type checkers follow the call into
the worker; only the function's name travels.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, TypeVarTuple, cast

Interval = tuple[float, float]  # seconds since the epoch by the worker's own clock
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class Resources:
    """What one worker asks for.

    Args:
        restarts: times that it may be rebuilt from its constructor arguments; -1 without bound.
        concurrent: it has a second thread for calls that are submitted as `concurrent`. Without, its calls run one after the other.
    """

    cpus: float = 1
    gpus: float = 0
    restarts: int = 0
    concurrent: bool = False


class Handle(Generic[W_co]):
    """A spawned worker of class W."""

    name: str


class Future(Generic[T_co]):
    """The value of a call that may still run, or a value that `Runtime.put` keeps."""


def value_of(sent: T | Future[T]) -> T:
    """A future as an argument of `Runtime.submit`: the worker receives its value, and to type checkers it is that already."""
    return cast(T, sent)


class Runtime(Protocol):
    """See the module docstring. Futures may be passed as arguments of `submit` by `value_of`; the worker receives their values."""

    def spawn(self, name: str, build: Callable[..., W], resources: Resources, **kwargs: Any) -> Handle[W]: ...

    def submit(self, handle: Handle[W], method: Callable[[W, *Ts], T], *args: *Ts, concurrent: bool = False) -> Future[T]:
        """A future of a call, which runs after all that were submitted before it.

        Args:
            concurrent: run it beside them where the worker has a second thread (`Resources`), in turn among calls of this kind.
        """
        ...

    def put(self, value: T) -> Future[T]:
        """A future of a value that several calls will receive, so that it is sent once."""
        ...

    def stream(self, handle: Handle[W], method: Callable[[W, *Ts], Iterable[T]], *args: *Ts) -> list[Future[T]]:
        """Futures of the items that a generator method yields, owned by the caller: they outlive the worker."""
        ...

    def get(self, future: Future[T]) -> T:
        """The value. Raises WorkerLost when the worker died, or the error that the method raised."""
        ...

    def wait(self, futures: Sequence[Future[T]], timeout: float | None) -> list[Future[T]]:
        """The futures that are done, at least one unless the timeout (seconds) passes."""
        ...

    def ping(self, handle: Handle[Any]) -> Future[int]:
        """A future of the worker's process id; it fails while the worker is being rebuilt."""
        ...

    def restart(self, handle: Handle[Any]) -> None:
        """End a worker that hangs; it is rebuilt when its resources allow restarts."""
        ...

    def take_intervals(self) -> dict[str, list[Interval]]:
        """Busy intervals of each worker since the last call, by the workers' clocks."""
        ...

    def close(self) -> None: ...


@dataclass
class LocalHandle(Handle[W_co]):
    name: str
    worker: W_co


@dataclass
class LocalFuture(Future[T_co]):
    value: T_co | None = None
    error: BaseException | None = None

    def result(self) -> T_co:
        if self.error is not None:
            raise self.error
        return cast(T_co, self.value)


@dataclass
class LocalRuntime:
    """Every worker in this process; a call runs when it is submitted. For tests, notebooks and tiny models."""

    intervals: dict[str, list[Interval]] = field(default_factory=lambda: defaultdict(list))

    def spawn(self, name: str, build: Callable[..., W], resources: Resources, **kwargs: Any) -> Handle[W]:
        return LocalHandle(name, build(**kwargs))

    def submit(self, handle: Handle[W], method: Callable[[W, *Ts], T], *args: *Ts, concurrent: bool = False) -> Future[T]:
        started = time.time()
        try:
            return LocalFuture(_method(handle, method)(*_resolved(args)))
        except Exception as error:  # delivered by get, as a remote call would
            return LocalFuture(error=error)
        finally:
            self.intervals[handle.name].append((started, time.time()))

    def put(self, value: T) -> Future[T]:
        return LocalFuture(value)

    def stream(self, handle: Handle[W], method: Callable[[W, *Ts], Iterable[T]], *args: *Ts) -> list[Future[T]]:
        started = time.time()
        items: list[Future[T]] = [LocalFuture(item) for item in _method(handle, method)(*_resolved(args))]
        self.intervals[handle.name].append((started, time.time()))
        return items

    def get(self, future: Future[T]) -> T:
        return cast(LocalFuture[T], future).result()

    def wait(self, futures: Sequence[Future[T]], timeout: float | None) -> list[Future[T]]:
        return list(futures)

    def ping(self, handle: Handle[Any]) -> Future[int]:
        return LocalFuture(os.getpid())

    def restart(self, handle: Handle[Any]) -> None:
        raise RuntimeError(f"{handle.name} runs in this process and cannot be restarted")

    def take_intervals(self) -> dict[str, list[Interval]]:
        taken, self.intervals = dict(self.intervals), defaultdict(list)
        return taken

    def close(self) -> None:
        pass


def _method(handle: Handle[Any], method: Callable[..., T]) -> Callable[..., T]:
    """The worker's own method of that name."""
    return cast(Callable[..., T], getattr(cast(LocalHandle[Any], handle).worker, method.__name__))


def _resolved(args: Iterable[Any]) -> list[Any]:
    return [arg.result() if isinstance(arg, LocalFuture) else arg for arg in args]
