"""The weighted cross-entropy of what the views hide, for supervised training whose weights make no ELBO, or with another denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.likelihoods import sequence_draws
from rlhub.types import Credit, LogLikelihood, Views


@dataclass(frozen=True)
class Config:
    count: str = "scored"  # what `scored_length` counts. scored: all of them; masked: tokens that were hidden, on average over draws

    def __post_init__(self) -> None:
        if self.count not in ("scored", "masked"):
            raise ValueError(f"count must be scored or masked, got {self.count!r}")


def estimate(log_prob: Tensor, views: Views, credit: Credit, config: Config) -> LogLikelihood:
    """Nats, negative: the mean over draws of the weighted log-probs of each sample."""
    draws = sequence_draws(log_prob, views)
    scored_length = views.scored_length
    if config.count == "masked":
        hidden = torch.bincount(views.score_sample, minlength=views.num_samples)
        scored_length = (hidden.to(draws.dtype) / views.num_draws).clamp(min=1e-9)  # 0 of 0 is 0
    return LogLikelihood(draws.mean(1), "proxy", "sequence", scored_length, draws=draws)
