"""DiffuCoder's three views: everything masked, a random mask and its complement (coupled-GRPO, arXiv 2506.20639).

Each token is scored twice, fully masked and in its half, and averages the two: weight 1/2 for the full mask, 1 / (2 t) in the mask of
ratio t and 1 / (2 (1 - t)) in the complement. As published, the weights of a token add up to 3/2 in the mean, so with the likelihood
`mean_field` this is a proxy and not an ELBO.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Quantity, Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views._rows import NoisyRow, build_views


@dataclass(frozen=True)
class Config:
    draws: int = 1  # triples; each costs three forwards
    low: float = 0.2  # the mask ratio is uniform on [low, high]
    high: float = 0.8


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """Three rows per draw; an empty half is left out."""
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        for draw in range(config.draws):
            key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "draw": draw}
            ratio = config.low + (config.high - config.low) * float(noise.uniform(1, **key, quantity=Quantity.LEVEL)[0])
            masked = noise.uniform(scored_length, **key) < ratio
            rows.append(NoisyRow(sample, draw, np.ones(scored_length, dtype=bool), weight=0.5))
            for half, share in ((masked, ratio), (~masked, 1 - ratio)):
                if half.any():
                    rows.append(NoisyRow(sample, draw, half, weight=0.5 / share))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return 3 * config.draws
