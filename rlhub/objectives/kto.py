"""Kahneman-Tversky optimization over likelihood estimates, from unpaired samples labelled good or bad (KTO, arXiv 2402.01306, Eq. 8).

The reference point z0 stands for KL(policy || reference). The paper estimates it on mismatched prompts and completions; here it is the
mean log-ratio of the batch's own labelled samples, clamped at 0, which costs no forward. Like the paper's it carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.types import Credit, Scores

NEEDS = ("reference",)
ADVANTAGES = False


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # the paper's
    desirable_weight: float = 1.0  # of samples labelled +1; the paper keeps weight times count within a factor 4 / 3 between the labels
    undesirable_weight: float = 1.0  # of samples labelled -1


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Mean over valid samples with a label y = +-1 of w_y (1 - sigmoid(y beta (D - z0))), D = log policy - log reference.

    Raises:
        ValueError: the credit holds no labels, or the likelihood is not one of sequences.
    """
    if credit.labels is None:
        raise ValueError("kto needs labels of +1 and -1: use an advantage that makes them, such as best_worst")
    if scores.policy.granularity != "sequence":
        raise ValueError(f"kto needs a sequence likelihood, got one per {scores.policy.granularity}")
    label = credit.labels.sign() * credit.valid
    counted = label != 0
    gain = scores.policy.value - scores.reference.value.detach()
    number = counted.sum().clamp(min=1)
    reference_point = ((gain.detach() * counted).sum() / number).clamp(min=0)
    weight = config.desirable_weight * label.clamp(min=0) + config.undesirable_weight * (-label).clamp(min=0)
    shortfall = torch.sigmoid(-label * config.beta * (gain - reference_point))
    metrics = {
        "kto/reference_point": reference_point.item(),
        "kto/desirable": float((label > 0).sum()),
        "kto/labelled": float(counted.sum()),
    }
    if counted.any():
        metrics["kto/accuracy"] = ((gain - reference_point) * label > 0)[counted].double().mean().item()
    return (weight * shortfall).sum() / number, metrics
