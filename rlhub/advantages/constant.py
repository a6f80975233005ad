"""Advantage 1 for every valid sample: with `weighted_likelihood` this is supervised learning."""

from dataclasses import dataclass

import numpy as np
import torch

from rlhub.types import Batch, Credit


@dataclass(frozen=True)
class Config:
    pass


def assign(rewards: np.ndarray, batch: Batch, config: Config) -> Credit:
    """1 where the grade is valid, whatever it is."""
    valid = torch.from_numpy(batch.valid)
    return Credit(advantages=valid.double(), valid=valid)
