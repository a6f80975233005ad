"""SPG's block-wise masks: clean blocks, one block partly masked, then everything masked (arXiv 2510.09541).

They imitate the states that a semi-autoregressive sampler visits. The released code scores every masked position with weight
L / (number masked), which is what `score: all` does: a surrogate, not an unbiased ELBO. `score: block` scores the random block only,
with weight blocks * length / (number masked in it); with `prompt_mask: 0` that is unbiased for the sum of the blocks' ELBOs, a lower
bound of the log-likelihood of block-wise generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Quantity, Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views._rows import NoisyRow, build_views


@dataclass(frozen=True)
class Config:
    draws: int = 2  # the blocks of one sample's draws differ until all of them were used
    block_length: int = 0  # 0: the sampler's blocks
    prompt_mask: float = 0.15  # probability that a token before the block, prompt or completion, is hidden as well
    score: str = "all"  # all: every masked position of the completion; block: those of the random block


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw.

    Raises:
        ValueError: `score` is unknown.
    """
    if config.score not in ("all", "block"):
        raise ValueError(f"score must be all or block, got {config.score!r}")
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        size = config.block_length or batch.block_length or scored_length
        num_blocks = -(-scored_length // size)
        key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update}
        order = np.argsort(noise.uniform(num_blocks, **key, quantity=Quantity.ORDER), kind="stable")
        for draw in range(config.draws):
            start = int(order[draw % num_blocks]) * size
            length = min(size, scored_length - start)
            count = 1 + noise.integer(length, **key, draw=draw, quantity=Quantity.LEVEL)
            block = np.zeros(scored_length, dtype=bool)
            block[start : start + length] = noise.subset(length, count, **key, draw=draw)
            hidden = noise.uniform(len(batch.prompts[sample]) + start, **key, draw=draw, quantity=Quantity.CONTEXT) < config.prompt_mask
            prompt_hidden, context_hidden = np.split(hidden, [len(batch.prompts[sample])])
            masked = block.copy()
            masked[:start] = context_hidden
            masked[start + length :] = True
            if config.score == "block":
                rows.append(NoisyRow(sample, draw, masked, num_blocks * length / count, scored=block, prompt_masked=prompt_hidden))
            else:
                rows.append(NoisyRow(sample, draw, masked, scored_length / int(masked.sum()), prompt_masked=prompt_hidden))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
