"""Everything masked, one forward: the mean-field proxy of diffu-GRPO (d1, arXiv 2504.12216), with random masking of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views._rows import NoisyRow, build_views


@dataclass(frozen=True)
class Config:
    draws: int = 1
    prompt_mask: float = 0.15  # probability that a prompt token is hidden


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw, every completion token scored with weight 1."""
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        for draw in range(config.draws):
            hidden = noise.uniform(len(batch.prompts[sample]), uid=int(batch.uid[sample]), epoch=batch.epoch, update=update, draw=draw)
            rows.append(NoisyRow(sample, draw, np.ones(scored_length, dtype=bool), prompt_masked=hidden < config.prompt_mask))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
