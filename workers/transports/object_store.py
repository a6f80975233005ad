"""Weights through shared memory: published once, pulled by whoever needs them.

The default on one machine and the way in for late joiners anywhere. The buckets are owned by the controller, so they survive the
learner that made them, and they are immutable, so a receiver that comes back later gets exactly the version that the others have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhub.config.schema import SyncConfig
from rlhub.types import Receipt
from workers.generator import Generator
from workers.learner import Learner
from workers.runtimes.runtime import Future, Handle, Runtime, value_of
from workers.transports import Receiver


class Transport:
    """See `workers.transports`."""

    def __init__(self, runtime: Runtime, learners: Sequence[Handle[Learner]], config: SyncConfig) -> None:
        self.runtime, self.learners = runtime, list(learners)
        self.bucket_bytes = int(config.bucket_megabytes * 2**20)
        self.buckets: list[Future[np.ndarray]] = []

    def push(self, receivers: Sequence[Handle[Generator]], version: int, concurrent: bool = False) -> dict[str, Future[Receipt]]:
        self.publish()
        return {receiver.name: self.refresh(receiver, version, concurrent) for receiver in receivers}

    def publish(self) -> None:
        """Take the learners' weights into buckets of the controller's."""
        others = self.gather_others()
        self.buckets = self.runtime.stream(self.learners[0], Learner.publish, self.bucket_bytes)
        for other in others:
            self.runtime.get(other)

    def gather_others(self) -> list[Future[None]]:
        """Let the other learners take their part while the first one reads weights that they share; futures of it."""
        return [self.runtime.submit(learner, Learner.gather_only, self.bucket_bytes) for learner in self.learners[1:]]

    def refresh(self, receiver: Handle[Receiver], version: int, concurrent: bool = False) -> Future[Receipt]:
        buckets: list[np.ndarray] = [value_of(bucket) for bucket in self.buckets]
        return self.runtime.submit(receiver, Receiver.receive, version, self.bucket_bytes, *buckets, concurrent=concurrent)

    def close(self) -> None:
        self.buckets = []
