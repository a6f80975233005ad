"""Layers shared by the model families. All work on packed rows: `[T, D]` with a `Layout` that says which tokens attend to which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.types import Layout


@dataclass(frozen=True)
class PaddedRows:
    """How packed rows map to a padded `[N, W]` grid; computed once per forward and shared by all layers.

    `gather` `[N * W]` names the packed token of each grid cell (any token where the cell is padding), `scatter` `[T]` the grid cell of
    each packed token. `bias` `[N, 1, W, W]` is 0 where a query may see a key and -inf elsewhere. Where rows see all of themselves and
    many neighbours are equally long, as the draws of a sample are, `runs` holds (rows, length) of each run of such neighbours instead:
    runs need neither padding nor bias.
    """

    num_rows: int
    width: int
    gather: Tensor | None = None
    scatter: Tensor | None = None
    bias: Tensor | None = None
    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, layout: Layout) -> PaddedRows:
        lengths = layout.lengths
        num_rows, width = len(lengths), int(lengths.max())
        run_length, run_rows = torch.unique_consecutive(lengths, return_counts=True)
        # A call of the attention kernel for every row would cost more than the padding.
        worthwhile = len(run_rows) == 1 or 2 * len(run_rows) <= num_rows
        if worthwhile and layout.attention == "full" and bool((layout.segment_ids == 0).all()):
            return cls(num_rows, width, runs=tuple(zip(run_rows.tolist(), run_length.tolist(), strict=True)))
        device = lengths.device
        column = torch.arange(width, device=device)
        filled = column < lengths[:, None]
        starts = layout.row_offsets.long()[:-1]
        gather = torch.where(filled, starts[:, None] + column, starts[:, None])
        scatter = filled.flatten().nonzero().squeeze(1)
        segment = layout.segment_ids.long()[gather]
        visible = filled[:, None, :] & (segment[:, :, None] == segment[:, None, :])
        if layout.attention == "block_causal":
            block = layout.block_ids.long()[gather]
            visible &= block[:, None, :] <= block[:, :, None]
        bias = torch.zeros(num_rows, 1, width, width, device=device).masked_fill_(~visible[:, None], float("-inf"))
        # A padding query sees nothing; it must not produce NaN that would poison gradients.
        bias.masked_fill_(~filled[:, None, :, None], 0.0)
        return cls(num_rows, width, gather.flatten(), scatter, bias)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [N, W, ...]."""
        return packed[self.gather].view(self.num_rows, self.width, *packed.shape[1:])

    def pack(self, grid: Tensor) -> Tensor:
        """[N, W, ...] -> [T, ...]."""
        return grid.reshape(self.num_rows * self.width, *grid.shape[2:])[self.scatter]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps).to(hidden.dtype)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, head_dim / 2]` in fp32 for rotate-half RoPE (Su et al. 2021)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[:, None] * (theta**-exponent)[None]
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotate-half RoPE to `[T, H, head_dim]`: dimension i is paired with i + head_dim / 2."""
    cos, sin = tables
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, rows: PaddedRows) -> Tensor:
    """Scaled dot-product attention of packed heads `[T, H, head_dim]` -> `[T, H * head_dim]`.

    One kernel with and without gradient, so that a policy and its frozen copy agree bit for bit.
    """
    if rows.runs:
        tokens = [count * length for count, length in rows.runs]
        pieces = zip(*(part.split(tokens) for part in (query, key, value)), rows.runs, strict=True)
        return torch.cat([_attend_equal(*heads, count) for *heads, (count, _) in pieces])
    query, key, value = (rows.pad(part).transpose(1, 2) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=rows.bias.to(query.dtype))
    return rows.pack(mixed.transpose(1, 2).flatten(2))


def _attend_equal(query: Tensor, key: Tensor, value: Tensor, num_rows: int) -> Tensor:
    """Attention within each of `num_rows` rows of equal length."""
    query, key, value = (part.unflatten(0, (num_rows, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)
