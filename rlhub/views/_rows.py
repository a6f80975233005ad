"""From masks to packed views: what every module of this folder returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhub.networks.layout import pack_layout
from rlhub.networks.profile import Profile
from rlhub.types import Attention, Batch, Layout, Views


@dataclass(frozen=True)
class NoisyRow:
    """One noisy row of a sample, in terms of its completion.

    Args:
        masked: bool [scored_length], positions that the model does not see.
        scored: bool [scored_length], positions whose true token is scored; None scores the masked ones.
        weight: weight of each score, one number or float [scored_length].
        prompt_masked: bool [Lp], prompt positions hidden as well.
        step: denoising step that the row replays.
        clean_before: every block of a block-causal model sees the blocks before it clean. Without it they are seen as `masked` says,
            which replays a state of the sampler.
    """

    sample: int
    draw: int
    masked: np.ndarray
    weight: float | np.ndarray = 1.0
    scored: np.ndarray | None = None
    prompt_masked: np.ndarray | None = None
    step: int | None = None
    clean_before: bool = False


def build_views(batch: Batch, rows: Iterable[NoisyRow], num_draws: int, profile: Profile) -> Views:
    """Pack noisy rows; the rows of a sample must be contiguous and in sample order.

    On a block-causal model rows end with the last block that is scored, and a row with `clean_before` is
    [clean | noisy]: a clean copy of the blocks before, then the noisy blocks of the completion.

    Raises:
        ValueError: the batch has packed documents and the model is block-causal.
    """
    rows, block_length = list(rows), profile.block_length
    if block_length and batch.segments is not None:
        raise ValueError("packed documents need a model with full attention, this one is block-causal")
    tokens, grids, starts = [], [], []
    score_row, score_position, score_target, score_weight = [], [], [], []
    for number, row in enumerate(rows):
        prompt, scored_length = batch.prompts[row.sample], int(batch.scored_length[row.sample])
        completion = batch.completions[row.sample][:scored_length]
        if row.prompt_masked is not None:
            prompt = np.where(row.prompt_masked, profile.mask_id, prompt)
        noisy = np.concatenate([prompt, np.where(row.masked, profile.mask_id, completion)])
        positions = np.flatnonzero(row.masked if row.scored is None else row.scored)
        start = len(prompt)
        if block_length:
            last = start + int(positions[-1]) if len(positions) else len(noisy) - 1
            noisy, start, *grid = _on_blocks(np.concatenate([prompt, completion]), noisy, start, last, block_length, row.clean_before)
            grids.append(grid)
        elif batch.segments is not None:
            grids.append(_in_segments(batch.segments[row.sample][:scored_length]))
        tokens.append(noisy)
        starts.append(start)
        score_row.append(np.full(len(positions), number))
        score_position.append(positions + start)
        score_target.append(completion[positions])
        weight = row.weight if np.isscalar(row.weight) else row.weight[positions]
        score_weight.append(np.broadcast_to(np.asarray(weight, dtype=np.float32), len(positions)))
    steps = [row.step for row in rows]
    return Views(
        sample=torch.tensor([row.sample for row in rows]),
        draw=torch.tensor([row.draw for row in rows]),
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int32)),
        layout=_layout(rows, [len(row) for row in tokens], grids, block_length),
        completion_start=torch.tensor(starts),
        score_row=torch.from_numpy(np.concatenate(score_row).astype(np.int64)),
        score_position=torch.from_numpy(np.concatenate(score_position).astype(np.int64)),
        score_target=torch.from_numpy(np.concatenate(score_target).astype(np.int64)),
        score_weight=torch.from_numpy(np.concatenate(score_weight).astype(np.float32)),
        num_samples=len(batch),
        num_draws=num_draws,
        canvas_length=max(len(completion) for completion in batch.completions),
        scored_length=torch.from_numpy(np.asarray(batch.scored_length, dtype=np.int64)),
        step=None if any(step is None for step in steps) else torch.tensor(steps),
    )


def _on_blocks(
    clean: np.ndarray, noisy: np.ndarray, start: int, last: int, size: int, clean_before: bool
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Tokens, index of the completion's first token, position ids and segment ids of a row whose last scored position is `last`."""
    end = min(len(noisy), (last // size + 1) * size)  # nothing sees the blocks behind
    position = np.arange(end)
    if not clean_before:
        return noisy[:end], start, position, np.zeros(end)
    first, before = start // size * size, (end - 1) // size * size
    tokens = np.concatenate([clean[:before], noisy[first:end]])
    return tokens, before - first + start, np.concatenate([position[:before], position[first:]]), np.repeat([0, 1], [before, end - first])


def _in_segments(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position ids, which start again with every document, and segment ids."""
    index = np.arange(len(segments))
    begins = np.diff(segments, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(begins, index, 0)), segments


def _layout(rows: list[NoisyRow], lengths: list[int], grids: list[Any], block_length: int | None) -> Layout:
    """Of packed rows; `grids` holds their position and segment ids where these do not simply count up."""
    layout = pack_layout(lengths)
    if not grids:
        return layout
    position, segment = (torch.from_numpy(np.concatenate(part).astype(np.int32)) for part in zip(*grids, strict=True))
    layout = replace(layout, position_ids=position, segment_ids=segment)
    if not block_length:
        return layout
    attention: Attention = "block_diffusion" if any(row.clean_before for row in rows) else "full"
    return replace(layout, block_ids=position // block_length, attention=attention)
