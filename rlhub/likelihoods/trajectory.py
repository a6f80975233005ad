"""Log-probs of the rollout's own decisions, per token or summed per slice of steps, from trajectory views.

With one row per denoising step this is exactly the log-prob of the tokens that each step drew, given the positions it chose (DiRL, arXiv
2512.22234; AGRPO, arXiv 2510.04019). Merged steps ignore what was committed in between (TraceRL, arXiv 2509.06949): a proxy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.likelihoods import token_means
from rlhub.types import Credit, LogLikelihood, Views

SCORES = "own_steps"


@dataclass(frozen=True)
class Config:
    granularity: str = "token"  # token: [B, L]; step: [B, S], the sum over the tokens of a slice at the slice's first step
    merged: bool = False  # the views merge steps (shrink, segments), so the value is a proxy and not exact


def merges_steps(config: Config) -> bool:
    return config.merged


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """Nats; `mask` marks the tokens or steps that were scored, `scored_length` counts the scored tokens. S follows step advantages [B, S].

    Raises:
        ValueError: the views replay no steps.
    """
    if views.step is None:
        raise ValueError("the trajectory likelihood needs views that replay steps: use the views `trajectory`")
    kind = "proxy" if config.merged else "exact"
    value, _ = token_means(log_prob, views)
    scored = torch.zeros(value.shape, dtype=torch.bool)
    scored[views.score_sample, views.score_token] = True
    scored_length = scored.sum(1).clamp(min=1)
    if config.granularity == "token":
        return LogLikelihood(value, kind, "token", scored_length, mask=scored)
    width = credit.advantages.shape[1] if credit.advantages.dim() == 2 else int(views.step.max()) + 1
    flat = views.score_sample * width + views.step[views.score_row]
    weighted = log_prob * views.score_weight.to(log_prob.dtype)
    value = torch.zeros(views.num_samples * width, dtype=log_prob.dtype).index_add(0, flat, weighted)
    mask = torch.zeros(views.num_samples, width, dtype=torch.bool)
    mask[views.sample, views.step] = True
    return LogLikelihood(value.view(views.num_samples, width), kind, "step", scored_length, mask=mask)
