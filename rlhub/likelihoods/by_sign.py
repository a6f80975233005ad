"""SPG's sandwich: the lower bound where the advantage is positive, towards the upper bound elsewhere (arXiv 2510.09541).

Advantage times this estimate never exceeds advantage times log-likelihood (as far as the bounds hold), so raising it is safe for either
sign. A sample's value is (1 - omega) ELBO + omega EUBO with the omega of its sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.likelihoods import sequence_draws
from rlhub.likelihoods.eubo import upper_bound
from rlhub.types import Credit, LogLikelihood, Views


@dataclass(frozen=True)
class Config:
    omega: float = 0.5  # share of the EUBO where the advantage is 0 or less: 1 is SPG with EUBO, between is SPG with mixture
    omega_positive: float = 0.0  # the same where the advantage is above 0
    beta: float = 1.5
    rescale: bool = True  # see `eubo`


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """A bound in nats whose side depends on the sign of the advantage [B]; `draws` are those of the ELBO.

    Raises:
        ValueError: the advantages are not one per sample.
    """
    if credit.advantages.dim() != 1:
        raise ValueError(f"by_sign needs one advantage per sample, got shape {list(credit.advantages.shape)}")
    draws = sequence_draws(log_prob, views)
    lower, upper = draws.mean(1), upper_bound(log_prob, views, config.beta, config.rescale)
    omega = torch.full_like(lower, config.omega).masked_fill(credit.advantages > 0, config.omega_positive)
    return LogLikelihood(lower + omega * (upper - lower), "proxy", "sequence", views.scored_length, draws=draws)
