"""The evidence lower bound as the mean over draws, for the sequence or split over its tokens (ESPO, arXiv 2512.03759, Eqs. 3 and 8)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.likelihoods import sequence_draws, token_means
from rlhub.types import Credit, LogLikelihood, Views


@dataclass(frozen=True)
class Config:
    granularity: str = "sequence"  # sequence: [B]; token: [B, L], the cell "token-level ELBO" of ESPO's ablation


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """Lower bound of log p(y | x) in nats, unbiased for the ELBO."""
    if config.granularity == "token":
        value, mask = token_means(log_prob, views)
        return LogLikelihood(value, "lower", "token", views.scored_length, mask=mask)
    draws = sequence_draws(log_prob, views)
    return LogLikelihood(draws.mean(1), "lower", "sequence", views.scored_length, draws=draws)
