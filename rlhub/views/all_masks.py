"""Every mask once, so that the ELBO has no error: sum over non-empty sets S of (|S| - 1)! (L - |S|)! / L! times the log-probs of S.

The weights are those of Shapley values; each token's add up to 1. The 2^L - 1 forwards make this a way for short completions and tests. The
blocks of a block-causal model are enumerated side by side, in 2^(longest block) - 1 forwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import model_blocks
from rlhub.views._rows import NoisyRow, build_views

EXACT_ON_BLOCKS = True
LOG_LIKELIHOOD = "value"


@dataclass(frozen=True)
class Config:
    max_tokens: int = 12  # of a completion, or of a block of it


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """All rows of a sample are its draw 0.

    Raises:
        ValueError: there are more than `max_tokens` tokens to be masked together.
    """
    rows = [row for sample in range(len(batch)) for row in _rows(batch, sample, config.max_tokens, profile)]
    return build_views(batch, rows, 1, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return 2 ** min(steps, config.max_tokens) - 1


def _rows(batch: Batch, sample: int, max_tokens: int, profile: Profile) -> Iterator[NoisyRow]:
    """The 2^L - 1 masks of the longest block, of the others as many as they have; weights 1 / (l C(L, l)) make the sum the exact ELBO.

    Raises:
        ValueError: a block is longer than `max_tokens`.
    """
    blocks, scored_length = model_blocks(batch, sample, profile), int(batch.scored_length[sample])
    longest = max(block.stop - block.start for block in blocks)
    if longest > max_tokens:
        raise ValueError(
            f"all_masks takes all 2^L masks and stops at {max_tokens} tokens, the completion has {longest}; use the views elbo"
        )
    for number in range(1, 2**longest):
        masked, weight = np.zeros(scored_length, dtype=bool), np.ones(scored_length)
        for block in blocks:
            tokens = block.stop - block.start
            if number < 2**tokens:
                masked[block] = number >> np.arange(tokens)[::-1] & 1
                size = int(masked[block].sum())
                weight[block] = 1 / (size * math.comb(tokens, size))
        yield NoisyRow(sample, 0, masked, weight, clean_before=True)
