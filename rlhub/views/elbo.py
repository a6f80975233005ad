"""The l-form of the ELBO: l ~ U{1..L} positions masked, weight L / l (LLaDA, arXiv 2502.09992, Eq. 6; ESPO, arXiv 2512.03759, Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.batching import Row, build_views
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws, mask_count


@dataclass(frozen=True)
class Config:
    draws: int = 2
    levels: str = "independent"  # independent | stratified: how the levels of one sample choose l
    masks_per_level: int = 1  # n_y masks for each l; draws / masks_per_level levels

    def __post_init__(self) -> None:
        check_draws(self.draws, self.masks_per_level)


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int) -> Views:
    """One row per draw."""
    rows, num_levels = [], config.draws // config.masks_per_level
    for sample, span in enumerate(batch.span.tolist()):
        for draw in range(config.draws):
            level = draw // config.masks_per_level
            count = mask_count(noise, batch, sample, level, num_levels, update, config.levels, low=1)
            masked = noise.subset(span, count, uid=int(batch.uid[sample]), epoch=batch.epoch, update=update, draw=draw)
            rows.append(Row(sample, draw, masked, weight=span / count))
    return build_views(batch, rows, config.draws)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
