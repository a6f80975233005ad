"""Replay of the rollout: one row per slice of denoising steps, scored at the tokens that the slice committed.

The state before a slice has every position masked that was committed in it or later; positions that were never filled stay masked and
are never scored. `shrink` merges neighbouring steps (TraceRL, arXiv 2509.06949), `segments` cuts the steps into equal parts instead
(d2-StepMerge, arXiv 2509.21474; one segment is diffu-GRPO's full mask), and `top` keeps the slices with the largest step advantages
(MDPO, arXiv 2508.13148). `Views.step` is the first step of each slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import NEVER, Batch, Credit, Views
from rlhub.views._rows import NoisyRow, build_views

EXACT_ON_BLOCKS = True
REPLAYS = True


@dataclass(frozen=True)
class Config:
    shrink: int = 1  # steps per slice
    segments: int = 0  # slices per sample instead of `shrink`; 0: off
    top: int = 0  # slices kept per sample, those with the largest |advantage|; 0: all


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """A row for each slice that committed a scored token; all of a sample's rows are its draw 0.

    Raises:
        ValueError: the batch holds no unmask steps, or `top` is set and the advantages are not per step.
    """
    if batch.unmask_step is None:
        raise ValueError("trajectory views replay the rollout, but the batch has no unmask_step")
    if config.top and credit.advantages.dim() != 2:
        raise ValueError("top chooses slices by step advantages [B, S]; use an advantage that makes them, such as step_difference")
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        steps = batch.unmask_step[sample][:scored_length].astype(np.int64)
        starts = slice_starts(steps, config)
        used = np.unique(starts[steps != NEVER])
        if config.top:
            size = credit.advantages[sample].abs().numpy()[used]
            used = np.sort(used[np.argsort(-size, kind="stable")[: config.top]])
        for first in used.tolist():
            masked = (steps == NEVER) | (steps >= first)
            rows.append(NoisyRow(sample, 0, masked, scored=(steps != NEVER) & (starts == first), step=first))
    return build_views(batch, rows, 1, profile)


def slice_starts(steps: np.ndarray, config: Config) -> np.ndarray:
    """int64 [scored_length], first step of the slice that each position was committed in; meaningless where it was never filled."""
    if not config.segments:
        return steps // config.shrink * config.shrink
    total = int(steps.max(initial=0)) + 1
    return -(-(steps * config.segments // total) * total // config.segments)


def rows_per_sample(config: Config, steps: int) -> int:
    slices = min(config.segments, steps) if config.segments else -(-steps // config.shrink)
    return min(config.top, slices) if config.top else slices


def merges_steps(config: Config) -> bool:
    return config.shrink > 1 or config.segments > 0
