"""The best and the worst completion of each group as a preference pair (online DPO, arXiv 2402.04792)."""

from dataclasses import dataclass

import numpy as np
import torch

from rlhub.advantages import without_lonely
from rlhub.types import Batch, Credit

GROUP = True


@dataclass(frozen=True)
class Config:
    margin: float = 0.0  # a group gives a pair when its rewards differ by more


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """`pairs` int64 [N, 2] (chosen, rejected) as sample indices; `labels` and the advantages are 1, -1 or 0 (in no pair).

    At a tie the lower uid stands for the others.
    """
    rewards = without_lonely(rewards)
    best = np.where(np.isnan(rewards), -np.inf, rewards).argmax(1)
    worst = np.where(np.isnan(rewards), np.inf, rewards).argmin(1)
    sample = np.full(rewards.shape, -1)
    sample[batch.group, batch.member] = np.arange(len(batch))
    row = np.arange(len(rewards))
    differs = rewards[row, best] - rewards[row, worst] > config.margin  # False where the group has no signal
    pairs = np.stack([sample[row, best], sample[row, worst]], axis=1)[differs]
    labels = torch.zeros(len(batch), dtype=torch.float64)
    labels[pairs[:, 0]], labels[pairs[:, 1]] = 1.0, -1.0
    return Credit(labels, torch.from_numpy(batch.valid), labels=labels, pairs=torch.from_numpy(pairs))
