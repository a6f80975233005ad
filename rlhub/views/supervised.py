"""Noise and loss weights of supervised training as the families publish them.

`masks` says how tokens are hidden at a noise level u ~ U(low, high), of each block on its own where the model is block-causal:

    count   l = 1 + floor(u L) of the L tokens (LLaDA, arXiv 2502.09992, Eq. 6): nothing is left unmasked by chance
    time    each token with probability p = (1 - epsilon) u + epsilon (LLaDA's training code)

and `loss_weight` what a hidden token counts in the loss:

    inverse_t   L / l or 1 / p: with low 0 and high 1 the ELBO
    plain       1: the cross-entropy of what is hidden (LLaDA2, arXiv 2512.15745, with levels in U(0.3, 0.8))
    cart        sum over visible tokens i of Geometric(|n - i|; p) / 2: more where more context is near (Dream, arXiv 2508.15487)

With levels in all of (0, 1), `count` and `inverse_t` these are the views `elbo`, draw by draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws, count_of, mask_level, model_blocks
from rlhub.views._rows import NoisyRow, build_views

NEGLIGIBLE = 1e-12  # a geometric weight below this share of the first one is left out
EXACT_ON_BLOCKS = True


@dataclass(frozen=True)
class Config:
    draws: int = 1
    masks: str = "count"  # count | time
    loss_weight: str = "inverse_t"  # inverse_t | plain | cart
    low: float = 0.0  # the range of noise levels
    high: float = 1.0
    epsilon: float = 1e-3  # of masks: time, the lowest mask probability
    geometric: float = 0.3  # p of cart

    def __post_init__(self) -> None:
        check_draws(self.draws)
        if self.masks not in ("count", "time"):
            raise ValueError(f"masks must be count or time, got {self.masks!r}")
        if self.loss_weight not in ("inverse_t", "plain", "cart"):
            raise ValueError(f"loss_weight must be inverse_t, plain or cart, got {self.loss_weight!r}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"noise levels must have 0 <= low < high <= 1, got {self.low} and {self.high}")
        if not 0 < self.geometric < 1 or not 0 < self.epsilon < 1:
            raise ValueError(f"geometric and epsilon must lie between 0 and 1, got {self.geometric} and {self.epsilon}")


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw, also where `masks: time` hides nothing."""
    rows = []
    for sample in range(len(batch)):
        for draw in range(config.draws):
            masked, weight = _draw(batch, config, noise, sample, draw, update, profile)
            rows.append(NoisyRow(sample, draw, masked, weight, clean_before=True))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws


def context_weights(visible: np.ndarray, geometric: float) -> np.ndarray:
    """float64 [N]: for each position the sum over visible others at distance d of p (1 - p)^(d - 1) / 2.

    Args:
        visible: bool [N].
        geometric: p, the larger the more local.
    """
    reach = min(int(np.log(NEGLIGIBLE) / np.log1p(-geometric)) + 1, len(visible))
    side = 0.5 * geometric * (1 - geometric) ** np.arange(reach)
    return np.convolve(visible.astype(np.float64), np.concatenate([side[::-1], [0.0], side]))[reach:][: len(visible)]


def _draw(
    batch: Batch, config: Config, noise: Stream, sample: int, draw: int, update: int, profile: Profile
) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [scored_length] and weights float64 [scored_length] of one row."""
    scored_length, prompt = int(batch.scored_length[sample]), len(batch.prompts[sample])
    masked, weight = np.zeros(scored_length, dtype=bool), np.ones(scored_length)
    key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "draw": draw}
    for number, block in enumerate(model_blocks(batch, sample, profile)):
        tokens = block.stop - block.start
        level = config.low + (config.high - config.low) * mask_level(
            noise, batch, sample, draw, config.draws, update, "independent", number
        )
        if config.masks == "count":
            count = count_of(level, tokens)
            masked[block] = noise.subset(tokens, count, **key, block=number)
            inverse = tokens / count
        else:
            probability = (1 - config.epsilon) * level + config.epsilon
            masked[block] = noise.uniform(tokens, **key, block=number) < probability
            inverse = 1 / probability
        if config.loss_weight == "inverse_t":
            weight[block] = inverse
        elif config.loss_weight == "cart":
            visible = np.concatenate([np.ones(prompt + block.start, dtype=bool), ~masked[block]])
            weight[block] = context_weights(visible, config.geometric)[prompt + block.start :]
    return masked, weight
