"""From rollouts to batches, from masks to packed views, from views to micro-batches and to shards of learners."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhub.types import Attention, Batch, Layout, RewardResult, Rollout, Views


def make_batch(rollouts: Sequence[Rollout], *, mask_id: int, span: str, block_length: int = 0, on_invalid: str = "drop_sample") -> Batch:
    """Arrange graded rollouts in uid order.

    Args:
        span: `canvas` scores every canvas token, `response` the tokens through the first EOS.
        on_invalid: what an invalid grade does: `drop_sample`, `drop_group`, or `value:x` which grades it x.

    Raises:
        ValueError: a rollout has no grade, or `span` or `on_invalid` is unknown.
    """
    if on_invalid not in ("drop_sample", "drop_group") and not on_invalid.startswith("value:"):
        raise ValueError(f"on_invalid must be drop_sample, drop_group or value:x, got {on_invalid!r}")
    if span not in ("canvas", "response"):
        raise ValueError(f"span must be canvas or response, got {span!r}")
    rollouts = sorted(rollouts, key=lambda rollout: rollout.uid)
    groups = sorted({rollout.group_uid for rollout in rollouts})
    index = {group: position for position, group in enumerate(groups)}
    group = np.array([index[rollout.group_uid] for rollout in rollouts])
    member = np.zeros(len(rollouts), dtype=np.int64)
    seen = np.zeros(len(groups), dtype=np.int64)
    for position, row in enumerate(group):
        member[position] = seen[row]
        seen[row] += 1
    rewards = np.full((len(groups), int(seen.max())), np.nan)
    for rollout, row, column in zip(rollouts, group, member, strict=True):
        if rollout.reward is None:
            raise ValueError(f"rollout {rollout.uid} has no grade")
        rewards[row, column] = _graded_value(rollout.reward, on_invalid)
    if on_invalid == "drop_group":
        failed = group[[not rollout.reward.valid for rollout in rollouts]]
        rewards[failed] = np.nan
    length = np.array([rollout.length for rollout in rollouts])
    canvas = np.array([len(rollout.completion_ids) for rollout in rollouts])
    batch = Batch(
        uid=np.array([rollout.uid for rollout in rollouts], dtype=np.uint64),
        group=group,
        prompts=[rollout.prompt_ids for rollout in rollouts],
        completions=[rollout.completion_ids for rollout in rollouts],
        length=length,
        span=canvas if span == "canvas" else length,
        rewards=rewards,
        member=member,
        mask_id=mask_id,
        unmask_step=[rollout.unmask_step for rollout in rollouts],
        logp_model=[rollout.logp_model for rollout in rollouts],
        block_length=block_length,
    )
    return with_step_rewards(batch, rollouts, on_invalid) if rollouts[0].step_rewards else batch


def with_step_rewards(batch: Batch, rollouts: Sequence[Rollout], on_invalid: str = "drop_sample") -> Batch:
    """The batch of these rollouts with their `step_rewards` [P, G, S]; a sample with one invalid step is treated as `on_invalid` says.

    Raises:
        ValueError: the rollouts have different numbers of step rewards.
    """
    rollouts = sorted(rollouts, key=lambda rollout: rollout.uid)
    counts = {len(rollout.step_rewards) for rollout in rollouts}
    if len(counts) != 1:
        raise ValueError(f"every rollout needs the same number of step rewards, got {sorted(counts)}")
    steps = np.full((*batch.rewards.shape, *counts), np.nan)
    for rollout, row, column in zip(rollouts, batch.group, batch.member, strict=True):
        steps[row, column] = [_graded_value(grade, on_invalid) for grade in rollout.step_rewards]
    steps[np.isnan(steps).any(2)] = np.nan
    if on_invalid == "drop_group":
        failed = batch.group[np.isnan(steps[batch.group, batch.member, 0])]
        steps[failed] = np.nan
    return replace(batch, step_rewards=steps, rewards=np.where(np.isnan(steps[:, :, -1]), np.nan, batch.rewards))


def _graded_value(reward: RewardResult, on_invalid: str) -> float:
    if reward.valid:
        return reward.value
    return float(on_invalid.removeprefix("value:")) if on_invalid.startswith("value:") else float("nan")


@dataclass(frozen=True)
class Row:
    """One noisy row of a sample, in terms of its completion.

    Args:
        masked: bool [span], positions that the model does not see.
        scored: bool [span], positions whose true token is scored; None scores the masked ones.
        weight: weight of each score, one number or float [span].
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


def build_views(batch: Batch, rows: Iterable[Row], num_draws: int, attention: Attention = "full") -> Views:
    """Pack noisy rows; the rows of a sample must be contiguous and in sample order.

    On a block-causal model (`batch.model_block`) rows end with the last block that is scored, and a row with `clean_before` is
    [clean | noisy]: a clean copy of the blocks before, then the noisy blocks of the completion.

    Raises:
        ValueError: the batch has packed documents and the model is block-causal.
    """
    rows = list(rows)
    if batch.model_block and batch.segments is not None:
        raise ValueError("packed documents need a model with full attention, this one is block-causal")
    tokens, grids, starts = [], [], []
    score_row, score_position, score_target, score_weight = [], [], [], []
    for number, row in enumerate(rows):
        prompt, span = batch.prompts[row.sample], int(batch.span[row.sample])
        completion = batch.completions[row.sample][:span]
        if row.prompt_masked is not None:
            prompt = np.where(row.prompt_masked, batch.mask_id, prompt)
        noisy = np.concatenate([prompt, np.where(row.masked, batch.mask_id, completion)])
        positions = np.flatnonzero(row.masked if row.scored is None else row.scored)
        start = len(prompt)
        if batch.model_block:
            last = start + int(positions[-1]) if len(positions) else len(noisy) - 1
            noisy, start, *grid = _on_blocks(np.concatenate([prompt, completion]), noisy, start, last, batch.model_block, row.clean_before)
            grids.append(grid)
        elif batch.segments is not None:
            grids.append(_in_segments(batch.segments[row.sample][:span]))
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
        layout=_layout(batch, rows, [len(row) for row in tokens], grids, attention),
        completion_start=torch.tensor(starts),
        score_row=torch.from_numpy(np.concatenate(score_row).astype(np.int64)),
        score_position=torch.from_numpy(np.concatenate(score_position).astype(np.int64)),
        score_target=torch.from_numpy(np.concatenate(score_target).astype(np.int64)),
        score_weight=torch.from_numpy(np.concatenate(score_weight).astype(np.float32)),
        num_samples=len(batch),
        num_draws=num_draws,
        canvas_length=max(len(completion) for completion in batch.completions),
        length=torch.from_numpy(np.asarray(batch.span, dtype=np.int64)),
        step=None if any(step is None for step in steps) else torch.tensor(steps),
    )


def fit_blocks(batch: Batch, network: Any) -> Batch:
    """The batch with the blocks of a block-causal network, along which its views are made; as it is for full attention."""
    profile = network.profile
    return replace(batch, model_block=profile.block_length) if profile.attention == "block_causal" else batch


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


def _layout(batch: Batch, rows: list[Row], lengths: list[int], grids: list[Any], attention: Attention) -> Layout:
    layout = pack_layout(lengths, attention)
    if not grids:
        return layout
    position, segment = (torch.from_numpy(np.concatenate(part).astype(np.int32)) for part in zip(*grids, strict=True))
    blocks = position // batch.model_block if batch.model_block else layout.block_ids
    attention = "block_diffusion" if any(row.clean_before for row in rows) else attention
    return replace(layout, position_ids=position, segment_ids=segment, block_ids=blocks, attention=attention)


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


@dataclass(frozen=True)
class MicroBatch:
    """A contiguous run of rows and of their scores."""

    first_row: int
    last_row: int  # exclusive
    first_score: int
    last_score: int  # exclusive


def micro_batches(views: Views, max_tokens: int, first_row: int = 0, last_row: int | None = None) -> list[MicroBatch]:
    """Cut rows into runs of at most `max_tokens` tokens; a longer single row forms a run of its own.

    The scores of a row must be contiguous and ordered by row, as `build_views` makes them.
    """
    last_row = views.num_rows if last_row is None else last_row
    offsets = views.layout.row_offsets.numpy()
    scores = torch.searchsorted(views.score_row, torch.arange(views.num_rows + 1)).numpy()
    runs, start = [], first_row
    for row in range(first_row, last_row):
        if row > start and offsets[row + 1] - offsets[start] > max_tokens:
            runs.append((start, row))
            start = row
    if last_row > start:
        runs.append((start, last_row))
    return [MicroBatch(first, last, int(scores[first]), int(scores[last])) for first, last in runs]


def shard_rows(views: Views, num_shards: int) -> list[tuple[int, int]]:
    """Row ranges of each shard: consecutive whole samples, cut so that row tokens are as even as that allows.

    Raises:
        ValueError: there are fewer samples than shards.
    """
    starts = np.flatnonzero(np.diff(views.sample.numpy(), prepend=-1))
    if len(starts) < num_shards:
        raise ValueError(f"{len(starts)} samples cannot be shared by {num_shards} learners; lower roles.learners")
    before = views.layout.row_offsets.numpy().astype(np.int64)[starts]
    total = int(views.layout.row_offsets[-1])
    cuts = [0]
    for shard in range(1, num_shards):
        nearest = int(np.abs(before - total * shard / num_shards).argmin())
        cuts.append(min(max(nearest, cuts[-1] + 1), len(starts) - num_shards + shard))
    edges = [*starts[cuts].tolist(), views.num_rows]
    return list(itertools.pairwise(edges))
