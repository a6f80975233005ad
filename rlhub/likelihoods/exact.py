"""The chain rule, log p(y) = sum_k log p(y_k | y_<k), from `prefix` views (JustGRPO, arXiv 2601.15165) or `chain` views in any order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.likelihoods import sequence_draws, token_means
from rlhub.types import Credit, LogLikelihood, Views

SCORES = "left_to_right"


@dataclass(frozen=True)
class Config:
    granularity: str = "token"  # token: [B, L]; sequence: [B], their sum


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """log p(y | x) in nats, without error, of generation in the order of the views."""
    if config.granularity == "token":
        value, mask = token_means(log_prob, views)
        return LogLikelihood(value, "exact", "token", views.scored_length, mask=mask)
    draws = sequence_draws(log_prob, views)
    return LogLikelihood(draws.mean(1), "exact", "sequence", views.scored_length, draws=draws)
