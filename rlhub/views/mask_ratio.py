"""Masks along a curve of time, for masked image generation (eMIGM, arXiv 2503.07197, section 3.1 and table 1).

t ~ U(t_min, 1), each token masked with probability gamma(t); its log-prob is weighted by gamma'(t) / gamma(t), which is the ELBO for every
curve (t_min 0), or by 1 as in MaskGIT. The prompt, a class, is hidden with probability `drop_prompt`, for classifier-free guidance with
the mask as the unconditional class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rlhub.curves import MASK_RATIO, check_curve
from rlhub.networks.profile import Profile
from rlhub.noise import Quantity, Stream
from rlhub.types import Batch, Credit, Views
from rlhub.views import check_draws
from rlhub.views._rows import NoisyRow, build_views

LOG_SLOPE = {
    "linear": lambda time: 1 / time,
    "cosine": lambda time: math.pi / 2 * math.tan(math.pi / 2 * (1 - time)),
    "exponential": lambda time: 5 / math.expm1(5 * time),
    "log_exponential": lambda time: math.expm1(5) / ((1 + math.expm1(5) * time) * math.log1p(math.expm1(5) * time)),
}
"""Derivative of the logarithm of `MASK_RATIO`."""


@dataclass(frozen=True)
class Config:
    draws: int = 1
    curve: str = "exponential"  # linear | cosine | exponential | log_exponential
    weight: str = "plain"  # plain: 1 | elbo: gamma' / gamma
    t_min: float = 0.0
    drop_prompt: float = 0.0

    def __post_init__(self) -> None:
        check_draws(self.draws)
        check_curve(self.curve)
        if self.weight not in ("plain", "elbo"):
            raise ValueError(f"weight must be plain or elbo, got {self.weight!r}")
        if not 0 <= self.t_min < 1 or not 0 <= self.drop_prompt <= 1:
            raise ValueError(f"t_min must be in [0, 1) and drop_prompt in [0, 1], got {self.t_min} and {self.drop_prompt}")


def make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views:
    """One row per draw; a draw that masks nothing contributes 0 and is left out."""
    rows = []
    for sample, scored_length in enumerate(batch.scored_length.tolist()):
        prompt = len(batch.prompts[sample])
        for draw in range(config.draws):
            key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "draw": draw}
            level, drop = noise.uniform(2, **key, quantity=Quantity.LEVEL)
            time = config.t_min + (1 - config.t_min) * level
            masked = noise.uniform(scored_length, **key) < MASK_RATIO[config.curve](time)
            if masked.any():
                weight = LOG_SLOPE[config.curve](time) if config.weight == "elbo" else 1.0
                hidden = np.ones(prompt, dtype=bool) if drop < config.drop_prompt else None
                rows.append(NoisyRow(sample, draw, masked, weight, prompt_masked=hidden))
    return build_views(batch, rows, config.draws, profile)


def rows_per_sample(config: Config, steps: int) -> int:
    return config.draws
