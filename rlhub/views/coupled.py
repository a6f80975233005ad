"""ESPO's coupled pair: a mask and its complement as one draw (arXiv 2512.03759, appendix D).

l ~ U{0..L}, which makes L - l follow the same law; each half is weighted (L + 1) / l over its own masked positions, an empty half
contributes 0, and the draw is half their sum: unbiased for the ELBO. A block-causal model has an l and a complement in each of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import draw_masks
from rlhub.views._rows import NoisyRow, build_views

EXACT_ON_BLOCKS = True
LOG_LIKELIHOOD = "draws"


@dataclass(frozen=True)
class Config:
    draws: int = 2  # pairs; each costs two forwards
    levels: str = "independent"  # independent | stratified: how the draws of one sample choose l


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """Two rows per draw; the empty half of l = 0 or l = L is left out."""
    rows = []
    for sample in range(len(batch)):
        for draw in range(config.draws):
            drawn = draw_masks(noise, batch, sample, draw, config.draws, update, profile, config.levels, 0)
            for half, count in ((drawn.masked, drawn.count), (~drawn.masked, drawn.size - drawn.count)):
                if half.any():
                    weight = 0.5 * (drawn.size + 1) / np.maximum(count, 1)  # a block of which the half has nothing is not scored
                    rows.append(NoisyRow(sample, draw, half, weight, clean_before=True))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return 2 * config.draws
