"""Clipped token-level objective (GRPO, arXiv 2402.03300; with mean-field log-probs it is diffu-GRPO, d1, arXiv 2504.12216).

With a likelihood per step it is step-level GRPO: one ratio per denoising step, with one advantage per sample or per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import clipped_surrogate, ratio_metrics, spread, token_mean, valid_mean
from rlhub.types import Credit, Scores

NEEDS = ("proximal",)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.2
    clip_high: float = 0.2


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Negative mean over valid samples of the mean over tokens (or steps) of the clipped surrogate."""
    log_ratio = scores.policy.value - scores.proximal.value.detach()
    advantage = spread(credit, scores.policy)
    surrogate = clipped_surrogate(log_ratio, advantage, config.clip_low, config.clip_high)
    counted = scores.policy.mask & credit.valid[:, None]
    metrics = ratio_metrics(log_ratio, advantage, counted, config.clip_low, config.clip_high)
    return -valid_mean(token_mean(surrogate, scores.policy), credit), metrics
