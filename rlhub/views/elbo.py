"""The l-form of the ELBO: l ~ U{1..L} positions masked, weight L / l (LLaDA, arXiv 2502.09992, Eq. 6; ESPO, arXiv 2512.03759, Eq. 3).

A block-causal model draws l for each of its blocks, and a draw is the sum over blocks (BD3-LM, arXiv 2503.09573, Eq. 7, in the l-form).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws, draw_masks
from rlhub.views._rows import NoisyRow, build_views

EXACT_ON_BLOCKS = True
LOG_LIKELIHOOD = "draws"


@dataclass(frozen=True)
class Config:
    draws: int = 2
    levels: str = "independent"  # independent | stratified: how the levels of one sample choose l
    masks_per_level: int = 1  # n_y masks for each l; draws / masks_per_level levels

    def __post_init__(self) -> None:
        check_draws(self.draws, self.masks_per_level)


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw."""
    rows = []
    for sample in range(len(batch)):
        for draw in range(config.draws):
            drawn = draw_masks(noise, batch, sample, draw, config.draws, update, profile, config.levels, 1, config.masks_per_level)
            rows.append(NoisyRow(sample, draw, drawn.masked, weight=drawn.size / drawn.count, clean_before=True))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
