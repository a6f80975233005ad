"""Broadcast of weights from learner rank 0 to all generators over a process group of our own (`workers.weight_group`).

When a member was lost, a new generation of the group forms without it. A late joiner is served through the object store until the next
push takes it in. gloo and nccl run the same code; they differ in the group and in where buffers live.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhub.config.schema import SyncConfig
from rlhub.errors import WorkerLost
from rlhub.types import Receipt
from workers.generator import Generator
from workers.learner import Learner
from workers.runtimes.runtime import Future, Handle, Runtime
from workers.transports import Receiver, object_store
from workers.weight_group import GroupMember


class CollectiveTransport:
    """See `workers.transports`; `backend` is gloo or nccl."""

    backend: str

    def __init__(self, runtime: Runtime, learners: Sequence[Handle[Learner]], config: SyncConfig) -> None:
        self.runtime, self.learners, self.config = runtime, list(learners), config
        self.bucket_bytes = int(config.bucket_megabytes * 2**20)
        self.late = object_store.Transport(runtime, learners, config)
        self.generation = 0
        self.members: dict[str, int] = {}  # process of each receiver in the group; a rebuilt one has another and no place in it

    def push(self, receivers: Sequence[Handle[Generator]], version: int, concurrent: bool = False) -> dict[str, Future[Receipt]]:
        """Broadcast the weights over the group, formed anew when its members changed; a future receipt by receiver.

        Where a member is lost in between, the survivors take this version through the object store.
        """
        self.late.buckets = []
        processes = self._processes(receivers)
        receivers = [receiver for receiver in receivers if receiver.name in processes]
        if self.members != processes:
            self._form(receivers, processes, concurrent)
        if not self.members:
            return self.late.push(receivers, version, concurrent)
        others = self.late.gather_others()
        futures = {
            receiver.name: self.runtime.submit(receiver, Generator.receive_broadcast, version, self.bucket_bytes, concurrent=concurrent)
            for receiver in receivers
        }
        try:
            self.runtime.get(self.runtime.submit(self.learners[0], Learner.broadcast, self.bucket_bytes))
        except (WorkerLost, RuntimeError):
            # A member was lost: the survivors' group is void, and they take this version through the object store.
            self.members = {}
            futures = {receiver.name: self.refresh(receiver, version, concurrent) for receiver in receivers}
        for other in others:
            self.runtime.get(other)
        return futures

    def refresh(self, receiver: Handle[Receiver], version: int, concurrent: bool = False) -> Future[Receipt]:
        if not self.late.buckets:
            self.late.publish()
        return self.late.refresh(receiver, version, concurrent)

    def close(self) -> None:
        self.late.close()

    def _processes(self, receivers: Sequence[Handle[Generator]]) -> dict[str, int]:
        """Process ids of the receivers that are there; one that is being rebuilt is brought up to date when it is readmitted."""
        pings = {receiver.name: self.runtime.ping(receiver) for receiver in receivers}
        processes = {}
        for name, ping in pings.items():
            try:
                processes[name] = self.runtime.get(ping)
            except WorkerLost:
                continue
        return processes

    def _form(self, receivers: Sequence[Handle[Generator]], processes: dict[str, int], concurrent: bool) -> None:
        """Let everybody join the next generation; a receiver that cannot leaves the group empty for this push."""
        self.generation += 1
        size = len(receivers) + 1
        address = self.runtime.get(self.runtime.submit(self.learners[0], Learner.open_weights, size))
        arguments = (size, self.generation, self.config.timeout_seconds)
        members: list[Handle[GroupMember]] = [self.learners[0], *receivers]
        joins = [
            self.runtime.submit(handle, GroupMember.join_weights, self.backend, address, rank, *arguments, concurrent=concurrent)
            for rank, handle in enumerate(members)
        ]
        self.members = {}
        try:
            for join in joins:
                self.runtime.get(join)
        except (WorkerLost, RuntimeError):
            return
        self.members = processes
