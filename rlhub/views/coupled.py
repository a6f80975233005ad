"""ESPO's coupled pair: a mask and its complement as one draw (arXiv 2512.03759, appendix D).

l ~ U{0..L}, which makes L - l follow the same law; each half is weighted (L + 1) / l over its own masked positions, an empty half
contributes 0, and the draw is half their sum: unbiased for the ELBO.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.batching import Row, build_views
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import mask_count


@dataclass(frozen=True)
class Config:
    draws: int = 2  # pairs; each costs two forwards
    levels: str = "independent"  # independent | stratified: how the draws of one sample choose l


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int) -> Views:
    """Two rows per draw; the empty half of l = 0 or l = L is left out."""
    rows = []
    for sample, span in enumerate(batch.span.tolist()):
        for draw in range(config.draws):
            count = mask_count(noise, batch, sample, draw, config.draws, update, config.levels, low=0)
            masked = noise.subset(span, count, uid=int(batch.uid[sample]), epoch=batch.epoch, update=update, draw=draw)
            for half in (masked, ~masked):
                if half.any():
                    rows.append(Row(sample, draw, half, weight=0.5 * (span + 1) / int(half.sum())))
    return build_views(batch, rows, config.draws)


def rows_per_sample(config: Config, steps: int) -> int:
    return 2 * config.draws
