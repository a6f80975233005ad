"""The t-form of the ELBO: t ~ U(0, 1), each position masked with probability p, weight 1 / p (LLaDA, arXiv 2502.09992, Eq. 3).

p = (1 - epsilon) t + epsilon as in LLaDA's training code. It leaves out the levels below epsilon, a bias of order epsilon; the variance
of a single draw grows like log(1 / epsilon), so for reinforcement learning prefer `elbo` or `coupled`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws, mask_level
from rlhub.views._rows import NoisyRow, build_views

FORM = "time_form"


@dataclass(frozen=True)
class Config:
    draws: int = 2
    levels: str = "independent"  # independent | stratified: how the levels of one sample choose t
    masks_per_level: int = 1  # n_y masks for each t; draws / masks_per_level levels
    epsilon: float = 1e-3  # the lowest mask probability

    def __post_init__(self) -> None:
        check_draws(self.draws, self.masks_per_level)


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw; a draw that masks nothing contributes 0 and is left out."""
    rows, num_levels = [], config.draws // config.masks_per_level
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        for draw in range(config.draws):
            level = mask_level(noise, batch, sample, draw // config.masks_per_level, num_levels, update, config.levels)
            probability = (1 - config.epsilon) * level + config.epsilon
            masked = noise.uniform(scored_length, uid=int(batch.uid[sample]), epoch=batch.epoch, update=update, draw=draw) < probability
            if masked.any():
                rows.append(NoisyRow(sample, draw, masked, weight=1 / probability))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
