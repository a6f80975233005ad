"""Variance of ELBO estimates and of the preference score made from them: from repeated draws, and exactly for enumerated masks.

Notation of VRPO (arXiv 2505.19223): a draw is ell(y_t, t); an estimate averages n_y masks on each of n_t levels; the score of a pair is
s = beta [(B_policy - B_reference)(chosen) - (B_policy - B_reference)(rejected)] with an estimate B of each ELBO. By Lemma 5

    V[B] = V_t / n_t + V_y / (n_t n_y),    V_t = Var_t E[ell | t],    V_y = E_t Var[ell | t].

Under shared noise the draw is the difference of policy and reference; under independent noise the variances of the two add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def cell_values(draws: np.ndarray, num_levels: int, num_masks: int) -> np.ndarray:
    """Estimates [..., T // n_t, Y // n_y] from draws [..., T, Y] with Y masks on each of T levels; the last axis shares its levels."""
    *outer, levels, masks = draws.shape
    replicates, groups = levels // num_levels, masks // num_masks
    kept = draws[..., : replicates * num_levels, : groups * num_masks]
    return kept.reshape(*outer, replicates, num_levels, groups, num_masks).mean((-3, -1))


def replicate_variance(values: np.ndarray) -> np.ndarray:
    """Unbiased variance [...] over the replicates of values [..., R, groups], averaged over groups."""
    return values.var(-2, ddof=1).mean(-1)


def components(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased (V_t, V_y), each [...], from draws [..., T, Y]: one-way analysis of variance. V_t may come out below 0 by chance.

    Raises:
        ValueError: fewer than two levels or two masks, which do not show the components.
    """
    if draws.shape[-2] < 2 or draws.shape[-1] < 2:
        raise ValueError(f"components need at least 2 levels and 2 masks on each, got {draws.shape[-2]} and {draws.shape[-1]}")
    within = draws.var(-1, ddof=1).mean(-1)
    return draws.mean(-1).var(-1, ddof=1) - within / draws.shape[-1], within


def estimate_variance(by_level: np.ndarray | float, by_mask: np.ndarray | float, num_levels: int, num_masks: int) -> np.ndarray | float:
    """V_t / n_t + V_y / (n_t n_y) (Lemma 5)."""
    return by_level / num_levels + by_mask / (num_levels * num_masks)


def logistic_loss(score: np.ndarray) -> np.ndarray:
    """-log sigmoid(score), elementwise."""
    return np.logaddexp(0.0, -score)


def loss_excess(score: np.ndarray, center: np.ndarray) -> np.ndarray:
    """What noise adds to the loss, [N, ...]: loss(score) above the loss's tangent at `center` [N], the score without noise.

    Its mean is E[loss(score)] - loss(center), since the tangent's mean is loss(center); every entry lies between 0 and
    (score - center)^2 / 8, since the loss is convex and its second derivative at most 1/4.
    """
    center = center.reshape(-1, *[1] * (score.ndim - 1))
    slope = -1 / (1 + np.exp(center))
    return logistic_loss(score) - logistic_loss(center) - slope * (score - center)


def best_edges(draws: np.ndarray, levels: np.ndarray, num_cells: int, bins: int = 32) -> list[float]:
    """The edges of least variance for the views `adaptive`, on a grid of `bins` equal bins of the level.

    The variance of a draw in a cell is that of each sample's draws whose level lies in it, pooled over samples; the sum of squared widths
    times these variances is minimised over all cuts by dynamic programming.

    Args:
        draws: [B, K], draws of each sample at independent levels.
        levels: [B, K], the level of each, in (0, 1).

    Raises:
        ValueError: more cells than bins.
    """
    if num_cells > bins:
        raise ValueError(f"{num_cells} cells do not fit {bins} bins")
    place = (levels * bins).astype(int)
    moments = np.zeros((3, len(draws), bins + 1))
    for power in range(3):
        for row, where in enumerate(place):
            np.add.at(moments[power, row], where + 1, draws[row] ** power)
    count, first, second = moments.cumsum(-1)
    cost = np.full((bins + 1, bins + 1), np.inf)  # of a cell between two edges; infinite where its variance is unknown
    for low, high in itertools.combinations(range(bins + 1), 2):
        number, total, square = (part[:, high] - part[:, low] for part in (count, first, second))
        known = number > 1
        if known.any():
            freedom = (number[known] - 1).sum()
            spread = (square[known] - total[known] ** 2 / number[known]).sum()
            cost[low, high] = ((high - low) / bins) ** 2 * max(spread, 0.0) / freedom
    best, cut = cost[0], []
    for _ in range(num_cells - 1):
        totals = best[:, None] + cost
        cut.append(totals.argmin(0))
        best = totals.min(0)
    edges = [bins]
    for before in reversed(cut):
        edges.append(int(before[edges[-1]]))
    return [0.0, *(edge / bins for edge in reversed(edges))]


@dataclass(frozen=True)
class Exact:
    """The law of one draw of one sequence, from a value for each mask.

    Attributes:
        masks: bool [M, L], all M = 2^L - 1 non-empty masks.
        sums: float64 [M], the sum of log-probs over the masked positions (or the difference of two models' sums).
    """

    masks: np.ndarray
    sums: np.ndarray

    @property
    def length(self) -> int:
        return self.masks.shape[1]

    @property
    def draws(self) -> np.ndarray:
        """float64 [M], the l-form's draw (L / l) s(S)."""
        return self.length / self.masks.sum(1) * self.sums

    @property
    def chance(self) -> np.ndarray:
        """float64 [M], the l-form's law of S: l uniform on {1..L}, then S uniform."""
        sizes = self.masks.sum(1)
        return 1 / (self.length * np.array([math.comb(self.length, int(size)) for size in sizes]))

    @property
    def value(self) -> float:
        """The ELBO."""
        return float(self.chance @ self.draws)

    def by_level(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance [L] of a draw at l = 1..L."""
        sizes = self.masks.sum(1)
        inside = [self.draws[sizes == size] for size in range(1, self.length + 1)]
        return np.array([part.mean() for part in inside]), np.array([part.var() for part in inside])

    def components(self) -> tuple[float, float]:
        """V_t and V_y of the l-form."""
        mean, variance = self.by_level()
        return float(mean.var()), float(variance.mean())

    def stratified_variance(self, draws: int) -> float:
        """Of `draws` levels that share one offset u, at (u + k / n) mod 1; piecewise constant in u, so a sum over its pieces is exact."""
        mean, variance = self.by_level()
        pieces = math.lcm(draws, self.length)
        offsets = (np.arange(pieces) + 0.5) / pieces
        index = (((offsets[:, None] + np.arange(draws) / draws) % 1.0) * self.length).astype(int)
        return float(mean[index].mean(1).var() + variance[index].mean() / draws)

    def coupled_variance(self, pairs: int) -> float:
        """Of `pairs` independent pairs of a mask and its complement, l uniform on {0..L} and weights (L + 1) / l."""
        length, sums = self.length, {mask.tobytes(): value for mask, value in zip(self.masks, self.sums, strict=True)}
        masks = np.concatenate([self.masks, np.zeros((1, length), dtype=bool)])
        values, chances = np.zeros(len(masks)), np.zeros(len(masks))
        for number, mask in enumerate(masks):
            halves = [half for half in (mask, ~mask) if half.any()]
            values[number] = sum(0.5 * (length + 1) / half.sum() * sums[half.tobytes()] for half in halves)
            chances[number] = 1 / ((length + 1) * math.comb(length, int(mask.sum())))
        return float(chances @ values**2 - (chances @ values) ** 2) / pairs

    def adaptive_variance(self, cells: Sequence[tuple[float, float]]) -> float:
        """Of one draw in each cell of the views `adaptive`: the sum over cells of width^2 times the variance inside."""
        mean, variance = self.by_level()
        bounds = np.arange(self.length + 1) / self.length
        total = 0.0
        for low, high in cells:
            share = np.clip(np.minimum(high, bounds[1:]) - np.maximum(low, bounds[:-1]), 0, None) / (high - low)
            total += (high - low) ** 2 * float(share @ (variance + mean**2) - (share @ mean) ** 2)
        return total
