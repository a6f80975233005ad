"""Labels of unpaired samples: +1 where the reward is above a threshold, else -1 (for KTO, arXiv 2402.01306)."""

from dataclasses import dataclass

import numpy as np
import torch

from rlhub.types import Batch, Credit

UNPAIRED = True


@dataclass(frozen=True)
class Config:
    threshold: float = 0.5


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """`labels` and advantages [B] of 1 and -1; 0 where the grade is invalid."""
    value = rewards[batch.group, batch.member]
    labels = np.where(batch.valid, np.where(value > config.threshold, 1.0, -1.0), 0.0)
    return Credit(torch.from_numpy(labels), torch.from_numpy(batch.valid), labels=torch.from_numpy(labels))
