"""SPG's evidence upper bound (arXiv 2510.09541): (1 / beta) sum_i log mean over draws of [w m_i p_i^beta].

By Jensen it is never below the ELBO of the same weights. It bounds log p from above when the model's conditionals agree with one joint
law, and for any model when beta >= L (Hoelder); otherwise the paper's theorem holds up to a constant that does not depend on the model.
All of this is about the mean over all masks: the log of a mean over few draws is biased downwards and can fall below their ELBO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.types import Credit, LogLikelihood, Views


@dataclass(frozen=True)
class Config:
    beta: float = 1.5  # larger is a looser bound; the paper uses 1.0 to 2.0
    rescale: bool = False  # stretch the covered tokens to the whole length, as the mean over covered tokens in the released code does


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """Upper bound of log p(y | x) in nats."""
    value = upper_bound(log_prob, views, config.beta, config.rescale)
    return LogLikelihood(value, "upper", "sequence", views.scored_length)


def upper_bound(log_prob: Tensor, views: Views, beta: float, rescale: bool) -> Tensor:
    """[B] from log-probs [M].

    A token that no draw masked has no estimate and contributes 0, which is still above its log-prob; `rescale` gives it the mean of
    the others instead.
    """
    flat = views.score_sample * views.canvas_length + views.score_token
    exponent = views.score_weight.to(log_prob.dtype).log() + beta * log_prob
    size = views.num_samples * views.canvas_length
    # The largest term is taken out so that p^beta cannot underflow; it cancels, so it carries no gradient.
    peak = torch.zeros(size, dtype=log_prob.dtype).scatter_reduce(0, flat, exponent.detach(), "amax", include_self=False)
    total = torch.zeros_like(peak).index_add(0, flat, (exponent - peak[flat]).exp())
    covered = total > 0
    mean = total.where(covered, 1.0).log() + peak - math.log(views.num_draws)
    value = (mean / beta * covered).view(views.num_samples, -1).sum(1)
    if rescale:
        value = value * views.scored_length / covered.view(views.num_samples, -1).sum(1).clamp(min=1)
    return value
