"""Likelihood estimators: from token log-probs of views to log-likelihoods.

A module here has a frozen dataclass `Config` and

    estimate(log_prob: Tensor [M], views: Views, credit: Credit, config: Config) -> LogLikelihood

and may state

    SCORES: str     the generation whose log-probability it is: `own_steps`, the rollout's own denoising steps, or an order of positions
                    that a sampler states as its `ORDER`, such as `left_to_right`. Recorded log-probs can stand for it then
                    (`behavior: rollout`, corrections of stale rollouts). Default: none, it is a bound or a proxy
    merges_steps(config) -> bool    whether several denoising steps count as one, which makes `own_steps` a proxy. Default: no

It is differentiable in `log_prob` and touches samples one by one: the value of a sample depends on its own rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhub.types import Views

CONTRACT = ("Config", "estimate(log_prob, views, credit, config)")


def sequence_draws(log_prob: Tensor, views: Views) -> Tensor:
    """[B, K], weighted sums of the log-probs of each draw."""
    flat = views.score_sample * views.num_draws + views.score_draw
    zeros = torch.zeros(views.num_samples * views.num_draws, dtype=log_prob.dtype)
    weighted = log_prob * views.score_weight.to(log_prob.dtype)
    return zeros.index_add(0, flat, weighted).view(views.num_samples, views.num_draws)


def token_means(log_prob: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """([B, L], bool [B, L]): weighted log-probs per completion token averaged over draws, and which tokens are counted at all."""
    flat = views.score_sample * views.canvas_length + views.score_token
    zeros = torch.zeros(views.num_samples * views.canvas_length, dtype=log_prob.dtype)
    weighted = log_prob * views.score_weight.to(log_prob.dtype) / views.num_draws
    value = zeros.index_add(0, flat, weighted).view(views.num_samples, views.canvas_length)
    return value, torch.arange(views.canvas_length) < views.scored_length[:, None]
