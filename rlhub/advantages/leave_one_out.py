"""Reward minus the mean of the others in its group (RLOO; what ESPO's released code computes): G / (G - 1) times the group mean's."""

from dataclasses import dataclass

import numpy as np

from rlhub.advantages import masked_mean, to_credit, without_lonely
from rlhub.types import Batch, Credit

GROUP = True


@dataclass(frozen=True)
class Config:
    pass


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """A_i = r_i - mean over valid j != i of r_j."""
    rewards = without_lonely(rewards)
    count = (~np.isnan(rewards)).sum(1, keepdims=True).astype(float)
    scale = np.divide(count, count - 1, out=np.ones_like(count), where=count > 1)
    return to_credit(scale * (rewards - masked_mean(rewards)), batch)
