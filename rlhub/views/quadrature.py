"""Gauss-Legendre levels over time, random masks within each: GDPO's semi-deterministic Monte Carlo (arXiv 2510.08554).

ELBO = integral over t in (0, 1) of f(t), f(t) = E[sum of masked log-probs] / t with Bernoulli(t) masks. f is a polynomial of degree
L - 1, so n points leave no bias up to L = 2 n and a small one beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views._rows import NoisyRow, build_views


@dataclass(frozen=True)
class Config:
    points: int = 3  # levels; the paper uses 2 or 3
    draws: int = 1  # masks per level; each draw costs one forward per level


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """`points` rows per draw, weighted by the quadrature weight over t; a level that masks nothing contributes 0 and is left out."""
    nodes, weights = np.polynomial.legendre.leggauss(config.points)
    levels, weights = (nodes + 1) / 2, weights / 2
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        for draw in range(config.draws):
            for point, (level, weight) in enumerate(zip(levels, weights, strict=True)):
                key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "draw": draw * config.points + point}
                masked = noise.uniform(scored_length, **key) < level
                if masked.any():
                    rows.append(NoisyRow(sample, draw, masked, weight=weight / level))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.points * config.draws
