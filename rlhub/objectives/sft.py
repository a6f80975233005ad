"""Supervised learning: minus the log-likelihood per scored token.

As `auxiliary: [{name: sft, weight: 0.05, on: chosen}]` it is the regulariser of VRPO (arXiv 2505.19223), through the draws that the
preference term has paid for.
"""

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import valid_mean
from rlhub.types import Credit, Scores

ADVANTAGES = False


@dataclass(frozen=True)
class Config:
    pass


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Mean over valid samples of -L / length, in nats per token.

    Raises:
        ValueError: the likelihood is not one of sequences.
    """
    if scores.policy.granularity != "sequence":
        raise ValueError(f"sft needs a sequence likelihood, got one per {scores.policy.granularity}")
    value = -valid_mean(scores.policy.value / scores.policy.scored_length, credit)
    return value, {"sft/per_token": value.item()}
