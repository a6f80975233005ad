"""Clipped sequence-level objective with the length-normalised ratio exp((L_policy - L_proximal) / length).

ESPO (arXiv 2512.03759, Eq. 8); with exact likelihoods it is GSPO (arXiv 2507.18071).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import clipped_surrogate, ratio_metrics, valid_mean
from rlhub.types import Credit, Scores

NEEDS = ("proximal",)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.2
    clip_high: float = 0.2


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Negative mean of the clipped surrogate over valid samples."""
    log_ratio = (scores.policy.value - scores.proximal.value.detach()) / scores.policy.scored_length
    surrogate = clipped_surrogate(log_ratio, credit.advantages, config.clip_low, config.clip_high)
    metrics = ratio_metrics(log_ratio, credit.advantages, credit.valid, config.clip_low, config.clip_high)
    return -valid_mean(surrogate, credit), metrics
