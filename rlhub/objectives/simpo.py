"""Preference optimization without a reference (SimPO, arXiv 2405.14734, Eq. 6): log-likelihood per token, and a target margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlhub.objectives import by_pair, pair_metrics
from rlhub.types import Credit, Scores

ADVANTAGES = False


@dataclass(frozen=True)
class Config:
    beta: float = 2.0  # the paper uses 2 to 10
    gamma: float = 1.0  # the target margin; the paper uses gamma / beta of 0.1 to 0.8


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """-mean over `credit.pairs` of log sigmoid(beta (L_chosen / length - L_rejected / length) - gamma); 0 without pairs.

    Raises:
        ValueError: the credit holds no pairs, or the likelihood is not one of sequences.
    """
    reward = config.beta * scores.policy.value / scores.policy.scored_length
    chosen, rejected = by_pair(reward, scores, credit, "simpo")
    margin = chosen - rejected - config.gamma
    return -F.logsigmoid(margin).sum() / max(len(margin), 1), pair_metrics("simpo", chosen, rejected)
