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

from rlhub.config.schema import SyncConfig
from rlhub.errors import WorkerLost
from workers.runtimes.runtime import Handle, Runtime
from workers.sync import bucket_plan, to_bytes
from workers.transports import object_store


class Member:
    """One rank of one generation of the group, held by a learner (rank 0) or a receiver."""

    def __init__(self, backend: str, store: dist.Store, rank: int, size: int, generation: int, timeout: timedelta) -> None:
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
        self.members: dict[str, int] = {}  # process of each receiver in the group; a rebuilt one has another and no place in it

    def push(self, receivers: Sequence[Handle], version: int, concurrent: bool = False) -> dict[str, Any]:
        self.late.buckets = []
        processes = self._processes(receivers)
        receivers = [receiver for receiver in receivers if receiver.name in processes]
        if self.members != processes:
            self._form(receivers, processes, concurrent)
        if not self.members:
            return self.late.push(receivers, version, concurrent)
        others = self.late.gather_others()
        arguments = ("receive_broadcast", version, self.bucket_bytes)
        futures = {receiver.name: self.runtime.submit(receiver, *arguments, concurrent=concurrent) for receiver in receivers}
        try:
            self.runtime.get(self.runtime.submit(self.learners[0], "broadcast", self.bucket_bytes))
        except (WorkerLost, RuntimeError):
            # A member was lost: the survivors' group is void, and they take this version through the object store.
            self.members = {}
            futures = {receiver.name: self.refresh(receiver, version, concurrent) for receiver in receivers}
        for other in others:
            self.runtime.get(other)
        return futures

    def refresh(self, receiver: Handle, version: int, concurrent: bool = False) -> Any:
        if not self.late.buckets:
            self.late.publish()
        return self.late.refresh(receiver, version, concurrent)

    def close(self) -> None:
        self.late.close()

    def _processes(self, receivers: Sequence[Handle]) -> dict[str, int]:
        """Process ids of the receivers that are there; one that is being rebuilt is brought up to date when it is readmitted."""
        pings = {receiver.name: self.runtime.ping(receiver) for receiver in receivers}
        processes = {}
        for name, ping in pings.items():
            try:
                processes[name] = self.runtime.get(ping)
            except WorkerLost:
                continue
        return processes

    def _form(self, receivers: Sequence[Handle], processes: dict[str, int], concurrent: bool) -> None:
        """Let everybody join the next generation; a receiver that cannot leaves the group empty for this push."""
        self.generation += 1
        size = len(receivers) + 1
        address = self.runtime.get(self.runtime.submit(self.learners[0], "open_weights", size))
        arguments = (size, self.generation, self.config.timeout_seconds)
        joins = [
            self.runtime.submit(handle, "join_weights", self.backend, address, rank, *arguments, concurrent=concurrent)
            for rank, handle in enumerate([self.learners[0], *receivers])
        ]
        self.members = {}
        try:
            for join in joins:
                self.runtime.get(join)
        except (WorkerLost, RuntimeError):
            return
        self.members = processes


class GroupMember:
    """The part of a worker that holds its place in the weight group; a mixin for learners and generators."""

    member: Member | None = None
    weight_store: dist.TCPStore | None = None

    def open_weights(self, size: int) -> str:
        """Open the place at which the next generation meets, `host:port` on this machine; asked of rank 0."""
        self.weight_store = open_store(size)
        return f"{self.weight_store.host}:{self.weight_store.port}"

    def join_weights(self, backend: str, address: str, rank: int, size: int, generation: int, timeout_seconds: float) -> None:
        """Enter a generation of the weight group, leaving the one before."""
        self.leave_weights()
        timeout = timedelta(seconds=timeout_seconds)
        if rank > 0:
            host, port = address.rsplit(":", 1)
            self.weight_store = dist.TCPStore(host, int(port), size, timeout=timeout, wait_for_workers=False)
        self.member = Member(backend, self.weight_store, rank, size, generation, timeout)

    def leave_weights(self) -> None:
        """Close this side's connections, which wakes members that wait for it."""
        if self.member is not None:
            self.member.close()
        self.member = None


def open_store(size: int) -> dist.TCPStore:
    """The store through which `size` processes find each other, on a port that the system chooses."""
    return dist.TCPStore(node_address(), 0, size, is_master=True, wait_for_workers=False)


def node_address() -> str:
    """This machine's address as others reach it."""
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else socket.gethostbyname(socket.gethostname())
