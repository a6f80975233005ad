"""A worker's place in the process group through which weights are broadcast; `workers.transports._collective` forms it.

The group lives beside DeepSpeed's default one and outside torch's registry of groups, so neither can address the other's ranks. It has
a generation number: when a member was lost, the survivors leave and a new generation forms without it.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from workers.sync import bucket_plan, to_bytes


class Member:
    """One rank of one generation of the group, held by a learner (rank 0) or a receiver."""

    def __init__(self, backend: str, store: dist.Store, rank: int, size: int, generation: int, timeout: timedelta) -> None:
        self.group: dist.ProcessGroupNCCL | dist.ProcessGroupGloo
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
        cast(Any, self.group).broadcast([buffer], options).wait()

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
        for name, part in zip(names, torch.split(buffer, sizes), strict=True):
            state[name].copy_(part.view(state[name].dtype).view(state[name].shape))


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
        assert self.weight_store is not None, "rank 0 has opened it"
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

    return str(cast(Any, ray.util).get_node_ip_address()) if ray.is_initialized() else socket.gethostbyname(socket.gethostname())
