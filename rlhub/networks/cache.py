"""Stored keys and values: exact for a clean prefix under block-causal attention, an approximation under full attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1  # block id of a position that holds nothing


class KeyValueCache:
    """Keys and values of all layers in slots, one slot for each sequence that is being generated.

    Attributes:
        keys, values: [layers, slots, max_length, kv_heads, head_dim], keys with their positions applied.
        blocks: int32 [slots, max_length], the attention block of each stored position, `EMPTY` where nothing is stored.

    Example:
        >>> cache = network.new_cache(num_slots=8, max_length=256)                             # doctest: +SKIP
        >>> network.denoise(tokens, layout, cache=CacheView(cache, torch.tensor([3])))         # doctest: +SKIP
        >>> cache.copy(3, torch.tensor([4, 5]), length=64)                                     # doctest: +SKIP
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_length: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_slots, max_length, num_heads, head_dim)
        # Zeros, because attention multiplies what it must not see by 0, and uninitialised memory may hold NaN.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.blocks = torch.full((num_slots, max_length), EMPTY, dtype=torch.int32, device=device)

    @property
    def num_slots(self) -> int:
        return self.blocks.shape[0]

    @property
    def max_length(self) -> int:
        return self.blocks.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.values.nbytes + self.blocks.nbytes

    def clear(self, slots: Tensor) -> None:
        """Forget what the slots [N] hold."""
        self.blocks[slots] = EMPTY

    def copy(self, source_slot: int, slots: Tensor, length: int) -> None:
        """Make the slots [N] hold the first `length` positions of `source_slot` and nothing else: a group shares its prompt."""
        for store in (self.keys, self.values):
            store[:, slots, :length] = store[:, source_slot, None, :length]
        self.clear(slots)
        self.blocks[slots, :length] = self.blocks[source_slot, :length]


@dataclass(frozen=True)
class CacheView:
    """Row n of a layout reads and writes slot `slots[n]`, int64 [N]; no slot twice."""

    cache: KeyValueCache
    slots: Tensor
