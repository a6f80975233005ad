"""Broadcast of weights from learner rank 0 to all receivers over a process group of our own.

The group lives beside DeepSpeed's default one and outside torch's registry of groups, so neither can address the other's ranks. It has
a generation number: when a member was lost, the survivors leave and a new generation forms without it. A late joiner is served through
the object store until the next push takes it in. gloo and nccl run the same code; they differ in the group and in where buffers live.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhub.config import SyncConfig
from rlhub.errors import WorkerLost
from workers.runtime import Handle, Runtime
from workers.sync import bucket_plan, to_bytes
from workers.transports import object_store


class Member:
    """One rank of one generation of the group, held by a learner (rank 0) or a receiver."""

    def __init__(self, backend: str, address: str, rank: int, size: int, generation: int, timeout_seconds: float) -> None:
        host, port = address.rsplit(":", 1)
        timeout = timedelta(seconds=timeout_seconds)
        store = dist.TCPStore(host, int(port), size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore(f"weights/{generation}", store)
        if backend == "nccl":
            self.group = dist.ProcessGroupNCCL(prefixed, rank, size, dist.ProcessGroupNCCL.Options())
        else:
            self.group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)
        self.rank, self.generation = rank, generation

    def broadcast(self, buffer: Tensor) -> None:
        """Send from rank 0, in place elsewhere.

        Raises:
            RuntimeError: a member was lost or the timeout passed.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([buffer], options).wait()

    def close(self) -> None:
        self.group.shutdown()


@torch.no_grad()
def send_state(member: Member, state: dict[str, Tensor], bucket_bytes: int) -> None:
    """Broadcast every bucket of a state dict as rank 0."""
    for names in bucket_plan(state, bucket_bytes):
        member.broadcast(torch.cat([to_bytes(state[name]) for name in names]))


@torch.no_grad()
def receive_state(member: Member, state: dict[str, Tensor], bucket_bytes: int) -> None:
    """Receive every bucket into a state dict, in place."""
    for names in bucket_plan(state, bucket_bytes):
        sizes = [state[name].numel() * state[name].element_size() for name in names]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=state[names[0]].device)
        member.broadcast(buffer)
        for name, part in zip(names, buffer.split(sizes), strict=True):
            state[name].copy_(part.view(state[name].dtype).view(state[name].shape))


class CollectiveTransport:
    """See `workers.transports`; `backend` is gloo or nccl."""

    backend: str

    def __init__(self, runtime: Runtime, learners: Sequence[Handle], config: SyncConfig) -> None:
        self.runtime, self.learners, self.config = runtime, list(learners), config
        self.bucket_bytes = int(config.bucket_megabytes * 2**20)
        self.late = object_store.Transport(runtime, learners, config)
        self.generation = 0
        self.members: list[str] = []

    def push(self, receivers: Sequence[Handle], version: int) -> dict[str, Any]:
        self.late.buckets = []
        if self.members != [receiver.name for receiver in receivers]:
            self._form(receivers)
        if not self.members:
            return self.late.push(receivers, version)
        others = [self.runtime.submit(learner, "gather_only", self.bucket_bytes) for learner in self.learners[1:]]
        futures = {receiver.name: self.runtime.submit(receiver, "receive_broadcast", version, self.bucket_bytes) for receiver in receivers}
        try:
            self.runtime.get(self.runtime.submit(self.learners[0], "broadcast", self.bucket_bytes))
        except (WorkerLost, RuntimeError):
            # A member was lost: the survivors' group is void, and they take this version through the object store.
            self.members = []
            futures = {receiver.name: self.refresh(receiver, version) for receiver in receivers}
        for other in others:
            self.runtime.get(other)
        return futures

    def refresh(self, receiver: Handle, version: int) -> Any:
        if receiver.name in self.members:
            self.members = []  # it was rebuilt and holds no place in the group
        if not self.late.buckets:
            self.late.buckets = self.runtime.stream(self.learners[0], "publish", self.bucket_bytes)
        return self.late.refresh(receiver, version)

    def close(self) -> None:
        self.late.close()

    def _form(self, receivers: Sequence[Handle]) -> None:
        """Let everybody join the next generation; a receiver that cannot leaves the group empty for this push."""
        self.generation += 1
        address = self.runtime.get(self.runtime.submit(self.learners[0], "rendezvous"))
        size = len(receivers) + 1
        arguments = (size, self.generation, self.config.timeout_seconds)
        joins = [
            self.runtime.submit(handle, "join_weights", self.backend, address, rank, *arguments)
            for rank, handle in enumerate([self.learners[0], *receivers])
        ]
        try:
            for join in joins:
                self.runtime.get(join)
            self.members = [receiver.name for receiver in receivers]
        except (WorkerLost, RuntimeError):
            self.members = []


class GroupMember:
    """The part of a worker that holds its place in the weight group; a mixin for learners and generators."""

    member: Member | None = None

    def join_weights(self, backend: str, address: str, rank: int, size: int, generation: int, timeout_seconds: float) -> None:
        """Enter a generation of the weight group, leaving the one before."""
        if self.member is not None:
            self.member.close()
        self.member = Member(backend, address, rank, size, generation, timeout_seconds)


def free_address() -> str:
    """`host:port` on this machine that others can reach."""
    host = socket.gethostbyname(socket.gethostname())
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"

