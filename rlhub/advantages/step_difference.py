"""MDPO's step advantages: what a step gained plus what came after it, standardised per step within the group (arXiv 2508.13148)."""

from dataclasses import dataclass

import numpy as np

from rlhub.advantages import standardised, to_credit, without_lonely
from rlhub.types import Batch, Credit

GROUP = True
STEP_REWARDS = True


@dataclass(frozen=True)
class Config:
    epsilon: float = 1e-4  # added to the standard deviation


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """[B, S] from step rewards [P, G, S], the grade of what was predicted at each step.

    a_s = (r_s - r_{s-1}) + mean of r_{s+1..S-1}, with r_{-1} = 0 and the last step's own reward as its future. A sample with one
    invalid step is invalid.

    Raises:
        ValueError: the rewards are not per step.
    """
    if rewards.ndim != 3:
        raise ValueError(f"step_difference needs rewards [P, G, S] of every step, got shape {list(rewards.shape)}")
    rewards = np.where(np.isnan(rewards).any(2, keepdims=True), np.nan, rewards)
    steps = rewards.shape[2]
    gain = np.diff(rewards, axis=2, prepend=0.0)
    after = np.cumsum(rewards[:, :, :0:-1], axis=2)[:, :, ::-1] / np.arange(steps - 1, 0, -1)
    future = np.concatenate([after, rewards[:, :, -1:]], axis=2)
    return to_credit(standardised(without_lonely(gain + future), config.epsilon), batch)
