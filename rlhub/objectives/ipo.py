"""Identity preference optimization over likelihood estimates (IPO, arXiv 2310.12036, Eq. 17): a margin to hit instead of one to grow.

The draws of an estimate are averaged before the square. Its noise adds the margin's variance to the loss, and the gradient of that
variance to the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import by_pair, pair_metrics
from rlhub.types import Credit, Scores

NEEDS = ("reference",)
ADVANTAGES = False


@dataclass(frozen=True)
class Config:
    tau: float = 0.1  # strength of the pull to the reference: the margin aims at 1 / (2 tau)
    normalize: str = "none"  # none: sums over tokens, as in the paper; length: nats per scored token, as in common implementations

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        if self.normalize not in ("none", "length"):
            raise ValueError(f"normalize must be none or length, got {self.normalize!r}")


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Mean over `credit.pairs` of (D_chosen - D_rejected - 1 / (2 tau))^2, D = log policy - log reference; 0 without pairs.

    Raises:
        ValueError: the credit holds no pairs, or the likelihood is not one of sequences.
    """
    gain = scores.policy.value - scores.reference.value.detach()
    if config.normalize == "length":
        gain = gain / scores.policy.scored_length
    chosen, rejected = by_pair(gain, scores, credit, "ipo")
    error = chosen - rejected - 1 / (2 * config.tau)
    return (error**2).sum() / max(len(error), 1), pair_metrics("ipo", chosen, rejected)
