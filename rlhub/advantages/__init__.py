"""Credit assignment: from rewards `[P, G]` to advantages.

A module here has a frozen dataclass `Config` and

    assign(rewards: float64 [P, G] or [P, G, S], batch: Batch, config: Config) -> Credit

and may state

    GROUP: bool            it compares a completion with others of its prompt, so that one alone has no advantage. Default: False
    STEP_REWARDS: bool     it needs rewards [P, G, S], the grades of intermediate states (`task.state_rewards`). Default: False
    UNPAIRED: bool         of preference data it takes labelled samples rather than pairs, as `plan` expects before the data is there.
                           Default: False

Rewards are NaN where a grade is invalid; such samples get advantage 0 and count in no mean. A group with fewer than two valid members
has no signal and gets zeros.
"""

import numpy as np
import torch

from rlhub.types import Batch, Credit

CONTRACT = ("Config", "assign(rewards, batch, config)")


def to_credit(matrix: np.ndarray, batch: Batch) -> Credit:
    """Credit with one advantage per sample, or per step of it, from a matrix [P, G] or [P, G, S] that may hold NaN."""
    advantages = np.nan_to_num(matrix[batch.group, batch.member], nan=0.0)
    return Credit(advantages=torch.from_numpy(advantages), valid=torch.from_numpy(batch.valid))


def without_lonely(rewards: np.ndarray) -> np.ndarray:
    """The rewards [P, G] or [P, G, S] with groups of fewer than two valid members set to NaN."""
    lonely = (~np.isnan(rewards)).sum(1) < 2
    return np.where(lonely[:, None], np.nan, rewards)


def masked_mean(rewards: np.ndarray) -> np.ndarray:
    """float64 [P, 1] or [P, 1, S], mean over the valid members of each group; NaN where there are none.

    Of equal members it is their value to the bit, which their sum over their number need not be: three times 0.1 is not 0.3.
    """
    valid = ~np.isnan(rewards)
    count = valid.sum(1, keepdims=True)
    total = np.where(valid, rewards, 0.0).sum(1, keepdims=True)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    lowest, highest = np.where(valid, rewards, np.inf).min(1, keepdims=True), np.where(valid, rewards, -np.inf).max(1, keepdims=True)
    return np.where(lowest == highest, highest, mean)


def standardised(rewards: np.ndarray, epsilon: float) -> np.ndarray:
    """(r - mean) / (std + epsilon) within each group, with the sample standard deviation (n - 1) over the valid members."""
    centred = rewards - masked_mean(rewards)
    count = (~np.isnan(rewards)).sum(1, keepdims=True)
    variance = np.nansum(centred**2, axis=1, keepdims=True) / np.maximum(count - 1, 1)
    spread = np.sqrt(variance) + epsilon
    return np.divide(centred, spread, out=np.where(np.isnan(centred), np.nan, 0.0), where=spread > 0)
