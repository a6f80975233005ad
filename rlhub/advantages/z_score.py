"""Reward standardised within its group (GRPO, arXiv 2402.03300)."""

from dataclasses import dataclass

import numpy as np

from rlhub.advantages import standardised, to_credit, without_lonely
from rlhub.types import Batch, Credit

GROUP = True


@dataclass(frozen=True)
class Config:
    epsilon: float = 1e-4  # added to the standard deviation


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """A_i = (r_i - mean) / (std + epsilon), with the sample standard deviation (n - 1)."""
    return to_credit(standardised(without_lonely(rewards), config.epsilon), batch)
