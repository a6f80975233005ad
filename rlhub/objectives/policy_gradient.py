"""Advantage times log-likelihood without a ratio, per scored token: REINFORCE over a likelihood estimate (SPG, arXiv 2510.09541)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import spread, valid_mean, weighted_mean
from rlhub.types import Credit, Scores


@dataclass(frozen=True)
class Config:
    normalize: str = "batch"  # batch: by the tokens of the whole batch, as SPG's code does, so long samples weigh more; sample: by its own


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """-sum_i A_i L_i / sum_i length_i (`batch`) or -(1/B) sum_i A_i L_i / length_i (`sample`), over valid samples.

    Raises:
        ValueError: `normalize` is unknown.
    """
    policy = scores.policy
    if config.normalize == "sample":
        return -valid_mean(weighted_mean(credit, policy), credit), {}
    if config.normalize != "batch":
        raise ValueError(f"normalize must be batch or sample, got {config.normalize!r}")
    weighted = spread(credit, policy) * policy.value
    total = weighted if policy.granularity == "sequence" else (weighted * policy.mask).sum(1)
    return -(total * credit.valid).sum() / (policy.scored_length * credit.valid).sum().clamp(min=1), {}
