"""Block decoding of SDAR (arXiv 2510.06303) and LLaDA2.0 (arXiv 2512.15745), for models whose attention is block-causal, or any other.

static commits the surest tokens, the same number in each step; dynamic commits every token above the threshold, and at least that number.
The confidence is that of the drawn token under the law that drew it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_best, commit_over, transfer_schedule

RECORDS = ()
LOG_PROBS = "none"
NEEDS = ("law_logp",)


@dataclass(frozen=True)
class Config:
    mode: str = "dynamic"  # static | dynamic
    threshold: float = 0.95

    def __post_init__(self) -> None:
        if self.mode not in ("static", "dynamic"):
            raise ValueError(f"mode must be static or dynamic, got {self.mode!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    counts = state.counts(schedule)
    if config.mode == "static":
        return commit_best(stats.law_logp, stats, state, counts)
    return commit_over(stats.law_logp > math.log(config.threshold), stats.law_logp, stats, state, counts)
