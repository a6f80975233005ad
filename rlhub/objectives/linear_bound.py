"""BGPO's bound of the ratio that is linear in the Monte-Carlo draws (arXiv 2510.11683).

With delta_j the difference of draw j to the proximal policy and delta their mean, exp(delta) is replaced by 1 + delta where A >= 0
(tangent) and by the mean of exp(delta_j) where A < 0 (Jensen). Either way A times the bound is at most A exp(delta), with equal value and
gradient at delta_j = 0. The paper wants it for constant memory, which the two-pass gradient gives to every objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.objectives import ratio_metrics, valid_mean
from rlhub.types import Credit, Scores

NEEDS = ("proximal",)


@dataclass(frozen=True)
class Config:
    normalize: str = "length"  # length: delta per scored token, as in ESPO; none: of the whole sequence


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Negative mean over valid samples of A times the bound.

    Raises:
        ValueError: `normalize` is unknown, or the likelihood keeps no draws.
    """
    if config.normalize not in ("length", "none"):
        raise ValueError(f"normalize must be length or none, got {config.normalize!r}")
    policy, proximal = scores.policy, scores.proximal
    if policy.draws is None:
        raise ValueError("linear_bound needs the single draws of a sequence likelihood, such as elbo")
    scale = policy.scored_length if config.normalize == "length" else torch.ones_like(policy.scored_length)
    delta = (policy.value - proximal.value.detach()) / scale
    per_draw = (policy.draws - proximal.draws.detach()) / scale[:, None]
    rewarded = credit.advantages >= 0
    # Filled before exp: an overflow in the branch that is not taken would still turn the gradient into NaN.
    bound = torch.where(rewarded, 1 + delta, per_draw.masked_fill(rewarded[:, None], 0.0).exp().mean(1))
    metrics = ratio_metrics(delta, credit.advantages, credit.valid, 1.0, float("inf"))
    return -valid_mean(credit.advantages * bound, credit), {key: value for key, value in metrics.items() if key.startswith("ratio/")}
