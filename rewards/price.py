"""Price: what a completion cost, as a negative value. A part of `combine`, since alone it teaches silence.

value = -per_token * tokens - per_character * characters - per_forward * forwards, with tokens through the first EOS and the denoising
forwards that produced the completion.

Columns: `rollout`, which rlhub fills in (`{"num_tokens", "num_forwards"}`); not needed where the prices per token and forward are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rewards import Prompt, column
from rlhub.types import RewardResult


@dataclass(frozen=True)
class Config:
    """Prices in units of reward, each at least 0. `free_tokens` come without a price."""

    per_token: float = 0.0
    per_character: float = 0.0
    per_forward: float = 0.0
    free_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("per_token", "per_character", "per_forward", "free_tokens"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0, got {value}; a price is subtracted")


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """Minus the cost; see the module.

    Raises:
        ValueError: a price per token or forward is set and the row has no column `rollout`.
    """
    tokens = forwards = 0
    if config.per_token or config.per_forward:
        rollout = column(row, "rollout")
        tokens, forwards = column(rollout, "num_tokens"), column(rollout, "num_forwards")
    charged = max(tokens - config.free_tokens, 0)
    cost = config.per_token * charged + config.per_character * len(completion) + config.per_forward * forwards
    return RewardResult(-cost, detail=f"{tokens} tokens, {len(completion)} characters, {forwards} forwards")
