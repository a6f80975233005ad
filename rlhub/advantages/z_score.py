"""Reward standardised within its group (GRPO, arXiv 2402.03300)."""

from dataclasses import dataclass

import numpy as np

from rlhub.advantages import masked_mean, to_credit, without_lonely
from rlhub.types import Batch, Credit


@dataclass(frozen=True)
class Config:
    epsilon: float = 1e-4  # added to the standard deviation


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """A_i = (r_i - mean) / (std + epsilon), with the sample standard deviation (n - 1)."""
    rewards = without_lonely(rewards)
    centred = rewards - masked_mean(rewards)
    count = (~np.isnan(rewards)).sum(1, keepdims=True)
    variance = np.nansum(centred**2, axis=1, keepdims=True) / np.maximum(count - 1, 1)
    return to_credit(centred / (np.sqrt(variance) + config.epsilon), batch)
