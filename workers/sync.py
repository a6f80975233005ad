"""Weights in flight: flat byte buckets, and receipts that prove both sides hold the same.

A bucket is the concatenated bytes of whole tensors in state-dict order, cut at `bucket_bytes`; the receiver knows names, shapes and
dtypes from its own copy of the network, so only bytes travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xxhash
from torch import Tensor

from rlhub.errors import SyncError
from rlhub.networks.decoder import Decoder
from rlhub.networks.layout import pack_layout, to_device
from rlhub.networks.lora import training_state
from rlhub.types import Receipt

CANARY_TOKENS = 8


def bucket_plan(state: dict[str, Tensor], bucket_bytes: int) -> list[list[str]]:
    """Names of the tensors of each bucket; a tensor larger than a bucket has one of its own."""
    plan: list[list[str]] = []
    room = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if not plan or size > room:
            plan.append([])
            room = bucket_bytes
        plan[-1].append(name)
        room -= size
    return plan


def to_bytes(tensor: Tensor) -> Tensor:
    """uint8 view of a tensor's memory, flat, on its device."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def buckets_of(state: dict[str, Tensor], bucket_bytes: int) -> Iterator[np.ndarray]:
    """uint8 arrays of the buckets, on the CPU."""
    for names in bucket_plan(state, bucket_bytes):
        yield torch.cat([to_bytes(state[name]) for name in names]).cpu().numpy()


@torch.no_grad()
def load_buckets(state: dict[str, Tensor], buckets: Iterable[np.ndarray], bucket_bytes: int) -> None:
    """Copy buckets into the tensors of a state dict, in place.

    Raises:
        SyncError: number or size of the buckets differs from what the state dict calls for.
    """
    plan = bucket_plan(state, bucket_bytes)
    buckets = list(buckets)
    if len(buckets) != len(plan):
        raise SyncError(f"received {len(buckets)} buckets, expected {len(plan)}: the sides disagree on the model or on bucket_megabytes")
    for names, bucket in zip(plan, buckets, strict=True):
        sizes = [state[name].numel() * state[name].element_size() for name in names]
        if sum(sizes) != len(bucket):
            raise SyncError(f"a bucket has {len(bucket)} bytes, expected {sum(sizes)} for {names[0]} to {names[-1]}")
        # Received arrays may be read-only shared memory; torch only reads from them here.
        flat = torch.frombuffer(bucket, dtype=torch.uint8) if bucket.flags.writeable else torch.from_numpy(bucket.copy())
        for name, part in zip(names, torch.split(flat, sizes), strict=True):
            target = state[name]
            target.copy_(part.to(target.device).view(target.dtype).view(target.shape))


@torch.no_grad()
def receipt_of(network: Decoder, version: int, bucket_bytes: int) -> Receipt:
    """Hash every bucket and run a fixed canvas, so that bytes and computation are both compared.

    The hash guards against faults, not forgery, so it is the fast one (XXH3, 128 bits).
    """
    state = training_state(network)
    hashes, total = [], 0
    for bucket in buckets_of(state, bucket_bytes):
        hashes.append(xxhash.xxh3_128_hexdigest(bucket.data))
        total += bucket.nbytes
    device = next(network.parameters()).device
    tokens = torch.full((CANARY_TOKENS,), network.mask_id, device=device)
    hidden = network.denoise(tokens, to_device(pack_layout([CANARY_TOKENS]), device))
    logits = network.head(hidden, torch.arange(CANARY_TOKENS, device=device)).float().nan_to_num()  # NaN does not equal itself
    return Receipt(version, len(state), total, tuple(hashes), tuple(logits.amax(-1).tolist()))
