"""Attention of packed rows: who sees whom, and the kernels that compute it.

Rules, for tokens of the same row (Layout.attention):
    full              a token sees its own segment.
    block_causal      it sees its own segment up to its own block.
    block_diffusion   segment 0 is the clean copy of the row, segment 1 the noisy one. A clean token sees clean tokens up to its own
                      block, a noisy one the noisy tokens of its own block and the clean ones of earlier blocks (BD3-LM, arXiv
                      2503.09573, section 3).

Backends: `sdpa` (torch, everywhere), `flex` (torch FlexAttention, no padding and no mask in memory; compiled on a GPU), `flash`
(flash-attn's variable-length kernel, full attention on a GPU). One kernel serves with and without gradient, so that a policy and its
frozen copy agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as memoize
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhub.errors import UserError
from rlhub.networks.cache import EMPTY, CacheView
from rlhub.types import Layout

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    """The queries or the keys: tokens of each row, and what decides who sees them. Rows are packed in order."""

    lengths: Tensor  # int64 [N]
    segment: Tensor  # [T]
    block: Tensor  # [T]; EMPTY where a cache holds nothing

    @cached_property
    def row(self) -> Tensor:
        """int64 [T]"""
        return torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)

    def at(self, tokens: Tensor) -> Side:
        """Some of the tokens, int64 [M] in ascending order."""
        lengths = torch.bincount(self.row[tokens], minlength=len(self.lengths))
        return Side(lengths, self.segment[tokens], self.block[tokens])


def visible(rule: str, query_segment: Tensor, query_block: Tensor, key_segment: Tensor, key_block: Tensor) -> Tensor:
    """bool, may a query see a key of its row? Elementwise, so shapes broadcast."""
    stored = key_block > EMPTY
    if rule == "block_diffusion":
        own = torch.where(query_segment == 0, key_block <= query_block, key_block == query_block)
        return stored & torch.where(query_segment == key_segment, own, (key_segment == 0) & (key_block < query_block))
    return stored & (query_segment == key_segment) & ((key_block <= query_block) if rule == "block_causal" else stored)


class Attention:
    """Who sees whom in one forward, and the computation for each layer.

    Args:
        layout: of the tokens whose queries, keys and values are given to `attend`.
        backend: sdpa, flex or flash.
        dtype: of queries, keys and values.
        block_length: of a block-causal family, whose blocks are position_ids // block_length unless the layout brings blocks.
        cache: keys and values are stored there first, and come from there.

    Raises:
        ValueError: the backend is unknown or does not serve the rule, or a position is beyond the cache.
    """

    def __init__(
        self,
        layout: Layout,
        backend: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        block_length: int | None = None,
        cache: CacheView | None = None,
    ) -> None:
        if backend not in KERNELS:
            raise ValueError(f"attention {backend!r} is unknown; choose one of {', '.join(KERNELS)}")
        self.backend, self.dtype, self.cache = backend, dtype, cache
        self.rule = "block_causal" if block_length and layout.attention == "full" else layout.attention
        if self.rule == "full":
            block = torch.zeros_like(layout.block_ids)
        else:
            block = layout.position_ids // block_length if block_length and layout.attention != "block_causal" else layout.block_ids
        self.query = self.key = Side(layout.lengths, layout.segment_ids, block)
        if cache is not None:
            self._open(layout, block)
        elif self.rule == "full":
            self.query = self.key = _one_segment_rows(self.key)
        self.kernel = KERNELS[backend](self, self.query)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel | None = None) -> Tensor:
        """Heads [T, H, head_dim] -> [T, H * head_dim]; keys and values may have fewer heads, each serving a run of query heads.

        Args:
            kernel: of `kernel_for`, when there are queries of some tokens only.
        """
        if self.cache is not None:
            stores = (self.cache.cache.keys[layer], self.cache.cache.values[layer])
            for store, new in zip(stores, (key, value), strict=True):
                store[self._where] = new
            key, value = (store[self._slots, : self._width] for store in stores)
        return (kernel or self.kernel)(query, key, value)

    def kernel_for(self, tokens: Tensor) -> Kernel:
        """The kernel for the queries of some tokens, int64 [M] in ascending order, and the keys of all."""
        if not len(tokens):
            return lambda query, key, value: query.flatten(1)
        return KERNELS[self.backend](self, self.query.at(tokens))

    def _open(self, layout: Layout, block: Tensor) -> None:
        """Mark what this forward stores, and see what the slots hold then."""
        if layout.attention == "block_diffusion":
            raise ValueError("block_diffusion holds a row twice, which a cache cannot; give the layout of one copy")
        cache, slots = self.cache.cache, self.cache.slots
        positions = layout.position_ids.long()
        if int(positions.max()) >= cache.max_length:
            raise ValueError(f"position {int(positions.max())} is beyond the cache of {cache.max_length} positions; make a longer cache")
        self._where = (slots[self.query.row], positions)
        cache.blocks[self._where] = block.to(torch.int32)
        first = int(slots[0])
        neighbours = torch.equal(slots, torch.arange(first, first + len(slots), device=slots.device))
        self._slots = slice(first, first + len(slots)) if neighbours else slots
        blocks = cache.blocks[self._slots]
        self._width = int((blocks > EMPTY).any(0).nonzero().max()) + 1
        blocks = blocks[:, : self._width]
        # A token of a full family sees all that is stored, and everything there has block 0.
        self.rule = "block_causal"
        self.query = Side(self.query.lengths, torch.zeros_like(block), block)
        self.key = Side(torch.full_like(slots, self._width), torch.zeros_like(blocks).flatten(), blocks.flatten())


def _one_segment_rows(side: Side) -> Side:
    """Segments that lie in one piece become rows of their own, so that no kernel looks across them."""
    if not bool((side.segment != 0).any()):
        return side
    pairs = torch.stack([side.row, side.segment.long()])
    _, lengths = torch.unique_consecutive(pairs, dim=1, return_counts=True)
    if len(lengths) > torch.unique(pairs, dim=1).shape[1]:
        return side
    return Side(lengths, torch.zeros_like(side.segment), side.block)


# --------------------------------------------------------------------------------------------------------------------- sdpa


@dataclass(frozen=True)
class PaddedGrid:
    """Packed tokens as a padded `[N, W]` grid; without `gather` all rows have W tokens and nothing needs padding.

    `gather` [N * W] names the token of each cell (any token where the cell is padding), `scatter` [T] the cell of each token.
    """

    num_rows: int
    width: int
    gather: Tensor | None = None
    scatter: Tensor | None = None
    filled: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor) -> PaddedGrid:
        num_rows, width = len(lengths), int(lengths.max())
        column = torch.arange(width, device=lengths.device)
        filled = column < lengths[:, None]
        starts = (lengths.cumsum(0) - lengths).clamp(max=int(lengths.sum()) - 1)
        gather = torch.where(filled, starts[:, None] + column, starts[:, None])
        return cls(num_rows, width, gather.flatten(), filled.flatten().nonzero().squeeze(1), filled)

    @classmethod
    def fit(cls, lengths: Tensor) -> PaddedGrid:
        """Without padding where that is possible."""
        return cls(len(lengths), int(lengths[0])) if bool((lengths == lengths[0]).all()) else cls.of(lengths)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [N, W, ...]"""
        packed = packed if self.gather is None else packed[self.gather]
        return packed.view(self.num_rows, self.width, *packed.shape[1:])

    def pack(self, grid: Tensor) -> Tensor:
        """[N, W, ...] -> [T, ...]"""
        cells = grid.reshape(self.num_rows * self.width, *grid.shape[2:])
        return cells if self.scatter is None else cells[self.scatter]


@dataclass(frozen=True)
class RowGroup:
    """Rows that one call of the kernel serves: slices of the packed queries and keys, their grids and what to add to the scores."""

    queries: slice
    keys: slice
    query: PaddedGrid
    key: PaddedGrid | None  # None: keys come as a grid, from a cache
    bias: Tensor | None = None


def _sdpa(attention: Attention, query: Side) -> Kernel:
    """torch's scaled_dot_product_attention, a call for each run of equally long rows.

    Heads [T, H, head_dim] -> [T, H * head_dim]; rows of mixed lengths are padded with a bias that hides the padding.
    """
    groups = _groups(attention, query)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pieces = []
        for group in groups:
            keys = (key, value) if group.key is None else (group.key.pad(part[group.keys]) for part in (key, value))
            heads = (group.query.pad(query[group.queries]), *keys)
            mixed = F.scaled_dot_product_attention(
                *(part.transpose(1, 2) for part in heads), attn_mask=group.bias, enable_gqa=query.shape[-2] != key.shape[-2]
            )
            pieces.append(group.query.pack(mixed.transpose(1, 2).flatten(2)))
        return torch.cat(pieces)

    return kernel


def _groups(attention: Attention, query: Side) -> list[RowGroup]:
    """Runs of equally long rows need neither padding nor bias, as the draws of a sample are; else all rows form one padded group."""
    key = attention.key
    if attention.rule == "full" and not bool((key.segment != 0).any()):
        length, rows = torch.unique_consecutive(key.lengths, return_counts=True)
        # A call of the kernel for every row would cost more than the padding.
        if len(rows) == 1 or 2 * len(rows) <= len(key.lengths):
            return _runs(rows.tolist(), length.tolist(), query, key)
    cached, everything = attention.cache is not None, slice(None)
    query_grid = PaddedGrid.fit(query.lengths) if cached else PaddedGrid.of(query.lengths)
    key_grid = PaddedGrid.fit(key.lengths)
    seen = visible(
        attention.rule,
        *(query_grid.pad(mark)[:, :, None] for mark in (query.segment, query.block)),
        *(key_grid.pad(mark)[:, None, :] for mark in (key.segment, key.block)),
    )
    if key_grid.filled is not None:
        seen &= key_grid.filled[:, None, :]
    group = RowGroup(everything, everything, query_grid, None if cached else key_grid)
    if cached and bool(seen.all()):
        return [group]
    bias = torch.zeros(seen.shape, dtype=attention.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    if query_grid.filled is not None:
        # A padding query may see nothing; it must not produce NaN that would poison gradients.
        bias.masked_fill_(~query_grid.filled[:, :, None], 0.0)
    return [replace(group, bias=bias[:, None])]


def _runs(rows: list[int], lengths: list[int], query: Side, key: Side) -> list[RowGroup]:
    groups, row, first_key, first_query = [], 0, 0, 0
    counts = None if query is key else query.lengths
    for num_rows, length in zip(rows, lengths, strict=True):
        keys = num_rows * length
        queries = keys if counts is None else int(counts[row : row + num_rows].sum())
        if queries:
            key_grid = PaddedGrid(num_rows, length)
            query_grid = key_grid if counts is None else PaddedGrid.fit(counts[row : row + num_rows])
            spans = (slice(first_query, first_query + queries), slice(first_key, first_key + keys))
            groups.append(RowGroup(*spans, query_grid, key_grid))
        row, first_key, first_query = row + num_rows, first_key + keys, first_query + queries
    return groups


# ------------------------------------------------------------------------------------------------------------- flex and flash


def _flex(attention: Attention, query: Side) -> Kernel:
    """torch's FlexAttention over all packed rows at once; the rule is its block mask, so nothing is padded and no mask is kept.

    Heads [T, H, head_dim] -> [T, H * head_dim]. Compiled on a GPU.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key, device = attention.key, query.lengths.device

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        marks = (query.segment[q], query.block[q], key.segment[k], key.block[k])
        return (query.row[q] == key.row[k]) & visible(attention.rule, *marks)

    block_mask = create_block_mask(mask, None, None, len(query.row), len(key.row), device=device)
    flex = flex_attention if device.type == "cpu" else _compiled(flex_attention)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = (key, value) if attention.cache is None else (key.flatten(0, 1), value.flatten(0, 1))
        heads = (part.transpose(0, 1)[None] for part in (query, *keys))
        mixed = flex(*heads, block_mask=block_mask, enable_gqa=query.shape[1] != key.shape[1])
        return mixed[0].transpose(0, 1).flatten(1)

    return kernel


@memoize
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _flash(attention: Attention, query: Side) -> Kernel:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        raise UserError(
            "attention flash needs the flash-attn package on a GPU: pip install flash-attn, or set model.attention=sdpa"
        ) from None
    key = attention.key
    if attention.rule != "full" or bool((key.segment != 0).any()):
        raise ValueError("attention flash serves full attention without a cache; set model.attention to sdpa or flex")
    bounds = [F.pad(side.lengths.cumsum(0), (1, 0)).to(torch.int32) for side in (query, key)]
    longest = [int(side.lengths.max()) for side in (query, key)]
    return lambda query, key, value: flash_attn_varlen_func(query, key, value, *bounds, *longest).flatten(1)


KERNELS: dict[str, Callable[[Attention, Side], Kernel]] = {"sdpa": _sdpa, "flex": _flex, "flash": _flash}
