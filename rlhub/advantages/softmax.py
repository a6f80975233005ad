"""wd1's signed sample weights: softmax(psi r) - softmax(-psi r) within a group (arXiv 2507.08838).

They are not advantages around a baseline but weights of log-likelihoods: `weighted_likelihood` raises the samples with the larger first
term and lowers the others. A shift of the rewards changes nothing. They are multiplied by the number of valid members, so that the
objective's mean over samples is the published sum over each group, averaged over groups.
"""

from dataclasses import dataclass

import numpy as np

from rlhub.advantages import masked_mean, to_credit, without_lonely
from rlhub.types import Batch, Credit

GROUP = True


@dataclass(frozen=True)
class Config:
    psi: float = 1.0  # inverse temperature of the rewards


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """n (softmax(psi r)_i - softmax(-psi r)_i) over the n valid members of the group; they sum to 0."""
    rewards = without_lonely(rewards)
    centred = config.psi * (rewards - masked_mean(rewards))
    return to_credit(_normalised_exp(centred) - _normalised_exp(-centred), batch)


def _normalised_exp(logits: np.ndarray) -> np.ndarray:
    """exp(logits) [P, G] divided by its mean over the valid members."""
    largest = np.where(np.isnan(logits), -np.inf, logits).max(1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0.0))
    return weights / masked_mean(weights)
