"""Sum of one-step token log-probs: the product of marginals that diffu-GRPO uses as a proxy (d1, arXiv 2504.12216)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.likelihoods import sequence_draws, token_means
from rlhub.types import Credit, LogLikelihood, Views


@dataclass(frozen=True)
class Config:
    granularity: str = "token"  # token: [B, L]; sequence: [B], their sum


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """A proxy in nats: neither a bound nor unbiased."""
    if config.granularity == "token":
        value, mask = token_means(log_prob, views)
        return LogLikelihood(value, "proxy", "token", views.scored_length, mask=mask)
    draws = sequence_draws(log_prob, views)
    return LogLikelihood(draws.mean(1), "proxy", "sequence", views.scored_length, draws=draws)
