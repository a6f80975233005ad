"""MaskGIT's decoding: a share of the masked positions in each step, at least one, the surest first (Chang et al. 2022, arXiv 2202.04200).

The confidence is the log-probability at temperature 1 of the drawn token, plus Gumbel noise that cools down to 0 at the last step.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.curves import check_curve
from rlhub.samplers import (
    CanvasState,
    Commit,
    RowStats,
    Schedule,
    Uniforms,
    commit_best,
    gumbel,
    share_counts,
    share_schedule,
    unmask_shares,
)

RECORDS = ()
LOG_PROBS = "none"


@dataclass(frozen=True)
class Config:
    curve: str = "cosine"  # linear | cosine | exponential | log_exponential
    choice_temperature: float = 0.0  # of the noise in the first step; MaskGIT's images use 4.5

    def __post_init__(self) -> None:
        check_curve(self.curve)
        if self.choice_temperature < 0:
            raise ValueError(f"choice_temperature must be 0 or more, got {self.choice_temperature}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return share_schedule(canvas_length, steps, block_length, config.curve, least=1)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    score = stats.logp_model
    if config.choice_temperature > 0:
        cooled = config.choice_temperature * (1 - (state.step + 1) / schedule.steps_per_block)
        score = score + cooled[:, None] * gumbel(uniforms("position"))
    counts = share_counts(state, unmask_shares(schedule.steps_per_block, config.curve), least=1)
    return commit_best(score, stats, state, counts)
