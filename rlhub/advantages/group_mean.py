"""Reward minus the mean of its group, without dividing by the spread (ESPO, arXiv 2512.03759; Dr. GRPO)."""

from dataclasses import dataclass

import numpy as np

from rlhub.advantages import masked_mean, to_credit, without_lonely
from rlhub.types import Batch, Credit

GROUP = True


@dataclass(frozen=True)
class Config:
    pass


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """A_i = r_i - mean of the valid members of the group."""
    rewards = without_lonely(rewards)
    return to_credit(rewards - masked_mean(rewards), batch)
