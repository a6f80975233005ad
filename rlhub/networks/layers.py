"""Norms and rotary embedding, on packed rows `[T, ...]`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Measured with torch 2.13 and one thread: on an Intel Xeon with AVX-512 products of up to 2 rows (depth 64) to 15 (512 and more) round
# in their own way, on an AMD EPYC of 1 row, at a depth of 512 of up to 14. Several threads may split the depth, which no padding mends.
MIN_ROWS = 16


def enough_rows(rows: Tensor) -> Tensor:
    """[max(T, 16), D]: matrix products with fewer rows take other kernels, whose rounding differs from that of a batch."""
    return rows if len(rows) >= MIN_ROWS else F.pad(rows, (0, 0, 0, MIN_ROWS - len(rows)))


VECTOR = 32  # elements: torch's CPU kernels take two vectors of 16 numbers (AVX-512) at a time


def whole_vectors(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """An elementwise function of `values`, of any shape, whose rounding does not depend on how many there are.

    torch's CPU kernels compute the last elements, which fill no vector, with scalar functions that round SiLU and sigmoid in another way.
    """
    rest = values.numel() % VECTOR
    if not rest or values.device.type != "cpu":
        return function(values)
    return function(F.pad(values.flatten(), (0, VECTOR - rest)))[: values.numel()].view_as(values)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps).to(hidden.dtype)


def rotary_tables(position_ids: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, rotary_dim / 2]` in fp32 for rotate-half RoPE (Su et al. 2021)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids.device) / rotary_dim
    angles = position_ids.float()[:, None] * (theta**-exponent)[None]
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotate-half RoPE to `[T, H, head_dim]`: dimension i is paired with i + rotary_dim / 2, those beyond rotary_dim stay."""
    cos, sin = tables
    rotary_dim = 2 * cos.shape[-1]
    first, second = heads[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    return turned if rotary_dim == heads.shape[-1] else torch.cat((turned, heads[..., rotary_dim:]), dim=-1)
