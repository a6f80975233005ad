"""Threshold-parallel decoding that forks at the leftmost mask (ForkGRPO, "Fork-dLLM: Avoiding the Flexibility Trap", 2026).

A step commits every position whose best token has at least the threshold's probability at temperature 1, whatever is drawn there; where
there is none, it commits the leftmost masked position alone and marks it as `fallback`. Positions thus never depend on a draw that is not
recorded, so the log-probs are exact; at the fallback steps the model was unsure, and ForkGRPO scores these only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, best_positions, token_schedule

RECORDS = ("fallback",)
LOG_PROBS = "exact"
NEEDS = ("top_logp",)


@dataclass(frozen=True)
class Config:
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return token_schedule(canvas_length, steps, block_length, "fork")


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    sure = (stats.top_logp >= math.log(config.threshold)) & state.masked & ~stats.deferred
    fallback = ~sure.any(1)
    leftward = -torch.arange(state.tokens.shape[1], dtype=torch.float64, device=state.tokens.device).expand(state.tokens.shape)
    leftmost = best_positions(leftward, state, fallback.long(), stats.deferred)
    return Commit(sure | leftmost, stats.token, fallback=fallback)
