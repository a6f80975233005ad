"""Where workers run: the same classes in this process or as Ray actors, behind five verbs.

`spawn` a worker, `submit` a method call (returns a future), `get` values, `wait` for any of several futures, `stream` the items that a
generator method yields. The controller is written against these, so a laptop and a cluster run the same loop.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Interval = tuple[float, float]  # seconds since the epoch by the worker's own clock


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


class Handle(Protocol):
    """A spawned worker."""

    name: str


class Runtime(Protocol):
    """See the module docstring. Futures may be passed as arguments of `submit`; the worker receives their values."""

    def spawn(self, name: str, build: Callable[..., Any], resources: Resources, **kwargs: Any) -> Handle: ...

    def submit(self, handle: Handle, method: str, *args: Any, concurrent: bool = False) -> Any:
        """A future of a call, which runs after all that were submitted before it.

        Args:
            concurrent: run it beside them where the worker has a second thread (`Resources`), in turn among calls of this kind.
        """
        ...

    def put(self, value: Any) -> Any:
        """A future of a value that several calls will receive, so that it is sent once."""
        ...

    def stream(self, handle: Handle, method: str, *args: Any) -> list[Any]:
        """Futures of the items that a generator method yields, owned by the caller: they outlive the worker."""
        ...

    def get(self, future: Any) -> Any:
        """The value. Raises WorkerLost when the worker died, or the error that the method raised."""
        ...

    def wait(self, futures: Sequence[Any], timeout: float | None) -> list[Any]:
        """The futures that are done, at least one unless the timeout (seconds) passes."""
        ...

    def ping(self, handle: Handle) -> Any:
        """A future of the worker's process id; it fails while the worker is being rebuilt."""
        ...

    def restart(self, handle: Handle) -> None:
        """End a worker that hangs; it is rebuilt when its resources allow restarts."""
        ...

    def take_intervals(self) -> dict[str, list[Interval]]:
        """Busy intervals of each worker since the last call, by the workers' clocks."""
        ...

    def close(self) -> None: ...


@dataclass
class LocalHandle:
    name: str
    worker: Any


@dataclass
class LocalFuture:
    value: Any = None
    error: BaseException | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


@dataclass
class LocalRuntime:
    """Every worker in this process; a call runs when it is submitted. For tests, notebooks and tiny models."""

    intervals: dict[str, list[Interval]] = field(default_factory=lambda: defaultdict(list))

    def spawn(self, name: str, build: Callable[..., Any], resources: Resources, **kwargs: Any) -> LocalHandle:
        return LocalHandle(name, build(**kwargs))

    def submit(self, handle: LocalHandle, method: str, *args: Any, concurrent: bool = False) -> LocalFuture:
        started = time.time()
        try:
            return LocalFuture(getattr(handle.worker, method)(*_resolved(args)))
        except Exception as error:  # delivered by get, as a remote call would
            return LocalFuture(error=error)
        finally:
            self.intervals[handle.name].append((started, time.time()))

    def put(self, value: Any) -> LocalFuture:
        return LocalFuture(value)

    def stream(self, handle: LocalHandle, method: str, *args: Any) -> list[Any]:
        started = time.time()
        items = [LocalFuture(item) for item in getattr(handle.worker, method)(*_resolved(args))]
        self.intervals[handle.name].append((started, time.time()))
        return items

    def get(self, future: LocalFuture) -> Any:
        return future.result()

    def wait(self, futures: Sequence[LocalFuture], timeout: float | None) -> list[LocalFuture]:
        return list(futures)

    def ping(self, handle: LocalHandle) -> LocalFuture:
        return LocalFuture(os.getpid())

    def restart(self, handle: LocalHandle) -> None:
        raise RuntimeError(f"{handle.name} runs in this process and cannot be restarted")

    def take_intervals(self) -> dict[str, list[Interval]]:
        taken, self.intervals = dict(self.intervals), defaultdict(list)
        return taken

    def close(self) -> None:
        pass


def _resolved(args: Iterable[Any]) -> list[Any]:
    return [arg.result() if isinstance(arg, LocalFuture) else arg for arg in args]
