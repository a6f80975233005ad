"""Layouts of packed rows: how tokens `[T]` of rows of different lengths lie and attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rlhub.types import Attention, Layout


def pack_layout(lengths: Sequence[int], attention: Attention = "full") -> Layout:
    """The layout of rows of the given lengths, one segment and one block each."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    positions = np.arange(total) - np.repeat(offsets[:-1], lengths)
    zeros = torch.zeros(total, dtype=torch.int32)
    return Layout(
        position_ids=torch.from_numpy(positions.astype(np.int32)),
        segment_ids=zeros,
        block_ids=zeros,
        row_offsets=torch.from_numpy(offsets.astype(np.int32)),
        attention=attention,
    )


def slice_layout(layout: Layout, first: int, last: int) -> Layout:
    """The layout of rows `first` to `last` (exclusive)."""
    begin, end = int(layout.row_offsets[first]), int(layout.row_offsets[last])
    return replace(
        layout,
        position_ids=layout.position_ids[begin:end],
        segment_ids=layout.segment_ids[begin:end],
        block_ids=layout.block_ids[begin:end],
        row_offsets=layout.row_offsets[first : last + 1] - begin,
    )


def to_device(layout: Layout, device: torch.device | str) -> Layout:
    """The same layout with its tensors on `device`."""
    return Layout(
        layout.position_ids.to(device),
        layout.segment_ids.to(device),
        layout.block_ids.to(device),
        layout.row_offsets.to(device),
        layout.attention,
    )
