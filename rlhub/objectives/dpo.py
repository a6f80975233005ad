"""Direct preference optimization over likelihood estimates (arXiv 2305.18290, Eq. 7; with ELBOs it is VRPO's DPO-E, arXiv 2505.19223).

The draws of an estimate are averaged before the logistic function, and policy and reference see the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlhub.objectives import by_pair, pair_metrics
from rlhub.types import Credit, Scores

NEEDS = ("reference",)
ADVANTAGES = False


@dataclass(frozen=True)
class Config:
    beta: float = 0.2  # VRPO's
    label_smoothing: float = 0.0  # probability that a label is wrong (cDPO)


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """-mean over `credit.pairs` of log sigmoid(beta (D_chosen - D_rejected)), D = log policy - log reference; 0 without pairs.

    Raises:
        ValueError: the credit holds no pairs, or the likelihood is not one of sequences.
    """
    gain = config.beta * (scores.policy.value - scores.reference.value.detach())
    chosen, rejected = by_pair(gain, scores, credit, "dpo")
    margin = chosen - rejected
    kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    per_pair = -(1 - config.label_smoothing) * kept - config.label_smoothing * flipped
    return per_pair.sum() / max(len(margin), 1), pair_metrics("dpo", chosen, rejected)
