"""Ways for weights to travel. A module here has a class `Transport(runtime, learners, config)` with

push(receivers, version, concurrent)      send the learners' weights to every receiver; returns {receiver name: future of its Receipt}
refresh(receiver, version, concurrent)    send the last pushed weights to one late joiner; returns the future of its Receipt
close()

and may state `NEEDS_GPUS = True` (False by default): learners and generators must have GPUs.

`concurrent` (False by default): generators receive them between two steps of the batch that they are at, instead of after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlhub.types import Receipt

if TYPE_CHECKING:
    from workers.generator import Generator
    from workers.runtimes.runtime import Future, Handle

CONTRACT = ("Transport(runtime, learners, config)",)


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
