"""From rollouts to batches, from masks to packed views, from views to micro-batches and to shards of learners."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhub.types import Batch, RewardResult, Rollout, Views


def sequence_batch(
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    uid: Sequence[int],
    *,
    rewards: np.ndarray | None = None,
    response_length: np.ndarray | None = None,
    scored_length: np.ndarray | None = None,
    **fields: Any,
) -> Batch:
    """Sequences that are no rollouts, in the order given: groups of equal size, whole completions where nothing else is said.

    Args:
        prompts, completions: int [Lp] and int [L] each.
        rewards: float64 [P, G], groups of G neighbours; None: every sequence is a group of its own with reward 1.
        response_length: int64 [B], tokens through the first EOS; None: all of the completion.
        scored_length: int64 [B], tokens that a likelihood counts; None: the response's.
        fields: others of `Batch`.
    """
    rewards = np.ones((len(completions), 1)) if rewards is None else rewards
    num_groups, group_size = rewards.shape
    if response_length is None:
        response_length = np.array([len(completion) for completion in completions])
    return Batch(
        uid=np.array(uid, dtype=np.uint64),
        group=np.repeat(np.arange(num_groups), group_size),
        prompts=[np.asarray(prompt, dtype=np.int32) for prompt in prompts],
        completions=[np.asarray(completion, dtype=np.int32) for completion in completions],
        response_length=response_length,
        scored_length=response_length if scored_length is None else scored_length,
        rewards=rewards,
        member=np.tile(np.arange(group_size), num_groups),
        **fields,
    )


def make_batch(rollouts: Sequence[Rollout], *, scored_length: str, block_length: int = 0, on_invalid: str = "drop_sample") -> Batch:
    """Arrange graded rollouts in uid order.

    Args:
        scored_length: `canvas` scores every canvas token, `response` the tokens through the first EOS (`algorithm.length`).
        on_invalid: what an invalid grade does: `drop_sample`, `drop_group`, or `value:x` which grades it x.

    Raises:
        ValueError: a rollout has no grade, or `scored_length` or `on_invalid` is unknown.
    """
    if on_invalid not in ("drop_sample", "drop_group") and not on_invalid.startswith("value:"):
        raise ValueError(f"on_invalid must be drop_sample, drop_group or value:x, got {on_invalid!r}")
    if scored_length not in ("canvas", "response"):
        raise ValueError(f"scored_length must be canvas or response, got {scored_length!r}")
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
        rewards[row, column] = _graded_value(grade_of(rollout), on_invalid)
    if on_invalid == "drop_group":
        failed = group[[not grade_of(rollout).valid for rollout in rollouts]]
        rewards[failed] = np.nan
    response_length = np.array([rollout.length for rollout in rollouts])
    canvas_length = np.array([len(rollout.completion_ids) for rollout in rollouts])
    batch = Batch(
        uid=np.array([rollout.uid for rollout in rollouts], dtype=np.uint64),
        group=group,
        prompts=[rollout.prompt_ids for rollout in rollouts],
        completions=[rollout.completion_ids for rollout in rollouts],
        response_length=response_length,
        scored_length=canvas_length if scored_length == "canvas" else response_length,
        rewards=rewards,
        member=member,
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


def grade_of(rollout: Rollout) -> RewardResult:
    """The grade of a rollout.

    Raises:
        ValueError: it has none.
    """
    if rollout.reward is None:
        raise ValueError(f"rollout {rollout.uid} has no grade")
    return rollout.reward


def _graded_value(reward: RewardResult, on_invalid: str) -> float:
    if reward.valid:
        return reward.value
    return float(on_invalid.removeprefix("value:")) if on_invalid.startswith("value:") else float("nan")


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
