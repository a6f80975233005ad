"""The chain rule in a given order: row k shows the first k tokens of the order, masks the rest and scores the next one.

An exact log-likelihood at the cost of one forward per token (RADD, arXiv 2406.03736, section 4; SMDM, arXiv 2410.18514, where left to
right serves some benchmarks better than the ELBO). `forward` is left to right, `backward` right to left, `random` a permutation of its own
for each sample and draw; the mean over random orders is the ELBO. A block-causal model follows the order within each of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws, model_blocks
from rlhub.views._rows import NoisyRow, build_views

ORDERS = ("forward", "backward", "random")
EXACT_ON_BLOCKS = True
LOG_LIKELIHOOD = "value"


@dataclass(frozen=True)
class Config:
    order: str = "forward"  # forward | backward | random
    draws: int = 1  # random orders of a sample; the others have one

    def __post_init__(self) -> None:
        check_draws(self.draws)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.draws > 1 and self.order != "random":
            raise ValueError(f"draws={self.draws} of order {self.order} would all be the same; set draws to 1 or order to random")


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per scored token and draw."""
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        for draw in range(config.draws):
            rank = _rank(config.order, batch, sample, profile, noise, update=update, draw=draw)
            rows += [NoisyRow(sample, draw, rank >= step, scored=rank == step, step=step) for step in range(scored_length)]
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws * steps


def _rank(order: str, batch: Batch, sample: int, profile: Profile, noise: Stream, **key: int) -> np.ndarray:
    """int64 [scored_length], when each token is revealed."""
    rank = np.arange(int(batch.scored_length[sample]))
    if order == "forward":
        return rank
    chance = noise.uniform(len(rank), uid=int(batch.uid[sample]), epoch=batch.epoch, **key)
    for block in model_blocks(batch, sample, profile):
        local = np.argsort(np.argsort(chance[block], kind="stable")) if order == "random" else np.arange(block.stop - block.start)[::-1]
        rank[block] = block.start + local
    return rank
