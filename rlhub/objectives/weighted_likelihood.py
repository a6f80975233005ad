"""Advantage-weighted log-likelihood per scored token, without a ratio: supervised learning when every advantage is 1 (LLaDA, sec. 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import valid_mean, weighted_mean
from rlhub.types import Credit, Scores


@dataclass(frozen=True)
class Config:
    pass


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """-(1/B) sum_i A_i L_i / length_i."""
    return -valid_mean(weighted_mean(credit, scores.policy), credit), {}
