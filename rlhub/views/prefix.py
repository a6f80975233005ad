"""Left-to-right prefixes: row k shows the first k tokens of the completion, masks the rest and scores token k (JustGRPO, arXiv 2601.15165).

For a sampler that commits one token a step from left to right, log p(y_k | prefix, rest masked) is the law that drew it, so the
likelihood is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views._rows import NoisyRow, build_views

EXACT_ON_BLOCKS = True


@dataclass(frozen=True)
class Config:
    pass


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per scored token; all of a sample's rows are its draw 0."""
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        position = np.arange(scored_length)
        rows += [NoisyRow(sample, 0, position >= token, scored=position == token, step=token) for token in range(scored_length)]
    return build_views(batch, rows, 1, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return steps
