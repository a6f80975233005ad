"""The l-form with its draws spent where the estimate varies most: one draw in each of n unequal cells of the noise level.

The level u in (0, 1) becomes the mask count l = 1 + floor(u L), so the ELBO is the integral of m(u) = E[draw | u] over u. Cut (0, 1) into
cells of widths w_1 + ... + w_n = 1 and draw one level uniformly within each. Then, for any cells,

    E[sum_k w_k draw_k] = sum_k (integral of m over cell k) = ELBO,        Var = sum_k w_k^2 Var[draw | level in cell k].

Narrow cells where a draw varies much are Neyman's allocation (Neyman 1934), without the rounding of counts and with the variation of m
inside a cell counted in. The weights of a sample add up to 1 whatever was drawn, unlike those of importance sampling, so what does not
depend on the level adds no variance. Equal cells are stratified sampling with one independent draw per stratum.

The edges are data in the recipe, so draws stay a pure function of their keys and runs can be resumed; `rlhub bench variance` finds the
edges of least variance and writes them as a recipe fragment. A single draw is not an estimate of its own: standard errors from the spread
of the draws are too wide.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from rlhub.networks.profile import Profile
from rlhub.noise import Quantity, Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws
from rlhub.views._rows import NoisyRow, build_views


@dataclass(frozen=True)
class Config:
    draws: int = 8
    edges: list[float] = field(default_factory=list)  # draws + 1 numbers that ascend from 0 to 1; empty: equal cells

    def __post_init__(self) -> None:
        check_draws(self.draws)
        ascending = all(low < high for low, high in itertools.pairwise(self.edges))
        if self.edges and not (len(self.edges) == self.draws + 1 and self.edges[0] == 0 and self.edges[-1] == 1 and ascending):
            raise ValueError(f"edges must be {self.draws + 1} numbers (draws + 1) that ascend from 0 to 1, got {self.edges}")

    @property
    def cells(self) -> list[tuple[float, float]]:
        """Both edges of each cell."""
        return list(itertools.pairwise(self.edges or [place / self.draws for place in range(self.draws + 1)]))


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw."""
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        for draw, (low, high) in enumerate(config.cells):
            key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "draw": draw}
            level = low + (high - low) * float(noise.uniform(1, **key, quantity=Quantity.LEVEL)[0])
            count = 1 + min(int(level * scored_length), scored_length - 1)
            masked = noise.subset(scored_length, count, **key)
            rows.append(NoisyRow(sample, draw, masked, weight=config.draws * (high - low) * scored_length / count))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
