"""Weights through shared memory: published once, pulled by whoever needs them.

The default on one machine and the way in for late joiners anywhere. The buckets are owned by the controller, so they survive the
learner that made them, and they are immutable, so a receiver that comes back later gets exactly the version that the others have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhub.config.schema import SyncConfig
from workers.runtimes.runtime import Handle, Runtime


class Transport:
    """See `workers.transports`."""

    def __init__(self, runtime: Runtime, learners: Sequence[Handle], config: SyncConfig) -> None:
        self.runtime, self.learners = runtime, list(learners)
        self.bucket_bytes = int(config.bucket_megabytes * 2**20)
        self.buckets: list[Any] = []

    def push(self, receivers: Sequence[Handle], version: int, concurrent: bool = False) -> dict[str, Any]:
        self.publish()
        return {receiver.name: self.refresh(receiver, version, concurrent) for receiver in receivers}

    def publish(self) -> None:
        """Take the learners' weights into buckets of the controller's."""
        others = self.gather_others()
        self.buckets = self.runtime.stream(self.learners[0], "publish", self.bucket_bytes)
        for other in others:
            self.runtime.get(other)

    def gather_others(self) -> list[Any]:
        """Let the other learners take their part while the first one reads weights that they share; futures of it."""
        return [self.runtime.submit(learner, "gather_only", self.bucket_bytes) for learner in self.learners[1:]]

    def refresh(self, receiver: Handle, version: int, concurrent: bool = False) -> Any:
        return self.runtime.submit(receiver, "receive", version, self.bucket_bytes, *self.buckets, concurrent=concurrent)

    def close(self) -> None:
        self.buckets = []
