"""Parallel decoding by a threshold: commit every token that the model gives at least this probability (Fast-dLLM, arXiv 2505.22618).

The confidence is that of the drawn token at temperature 1. Where too few tokens pass, the surest ones fill the step: with steps equal to
the canvas length, at least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_over, transfer_schedule

RECORDS = ()
LOG_PROBS = "none"


@dataclass(frozen=True)
class Config:
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    passed = stats.logp_model >= math.log(config.threshold)
    return commit_over(passed, stats.logp_model, stats, state, state.counts(schedule))
