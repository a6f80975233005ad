"""Ways for weights to travel. A module here has a class `Transport(runtime, learners, config)` with

push(receivers, version, concurrent)      send the learners' weights to every receiver; returns {receiver name: future of its Receipt}
refresh(receiver, version, concurrent)    send the last pushed weights to one late joiner; returns the future of its Receipt
close()

and may state `NEEDS_GPUS = True` (False by default): learners and generators must have GPUs.

`concurrent` (False by default): generators receive them between two steps of the batch that they are at, instead of after it.

What it works with, `object_store` being the shortest example:

runtime     `workers.runtimes.runtime.Runtime`: `submit(handle, Class.method, *arguments)` calls a worker and returns a future, `stream` the
            futures of what a generator method yields, `put`, `get` and `wait` are for values and futures
learners    handles, one a rank. `Learner.publish(bucket_bytes)` yields the weights in buckets (uint8 arrays, in the order that receivers
            expect), `Learner.gather_only(bucket_bytes)` is the part of the other ranks in it, `Learner.broadcast(bucket_bytes)` sends them
            through a process group
receivers   handles with a `name`: generators, and scorers as late joiners. `Receiver.receive(version, bucket_bytes, *buckets)` adopts the
            buckets and returns the receipt that the crew compares with the learner's
config      `weights` of the recipe; its `bucket_megabytes` times 2**20 is `bucket_bytes`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlhub.types import Receipt

if TYPE_CHECKING:
    from workers.generator import Generator
    from workers.runtimes.runtime import Future, Handle

CONTRACT = (
    "Transport(runtime, learners, config)",
    "Transport.push(self, receivers, version, concurrent)",
    "Transport.refresh(self, receiver, version, concurrent)",
    "Transport.close(self)",
)


class Receiver(Protocol):
    """A generator or a scorer."""

    def receive(self, version: int, bucket_bytes: int, *buckets: np.ndarray) -> Receipt:
        """Adopt weights and return the receipt for what is held now."""
        ...


class WeightTransport(Protocol):
    """What the crew asks of a transport, see the module docstring."""

    def push(self, receivers: Sequence[Handle[Generator]], version: int, concurrent: bool = False) -> dict[str, Future[Receipt]]: ...

    def refresh(self, receiver: Handle[Receiver], version: int, concurrent: bool = False) -> Future[Receipt]: ...

    def close(self) -> None: ...
