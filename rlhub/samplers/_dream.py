"""What Dream's confidence-based algorithms share (arXiv 2508.15487, and its released code).

In time from 1 to `eps` a step commits int(masked * (1 - s / t)) tokens, counted for each row alone, and the last step the rest. Confidence
is a property of the law that tokens are drawn from. With `alg_temp` the positions are drawn without replacement from
softmax(confidence / alg_temp), which is Gumbel noise on the scores (Kool et al. 2019, arXiv 1903.06059).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.samplers import (
    CanvasState,
    Commit,
    RowStats,
    Schedule,
    Uniforms,
    check_eps,
    commit_best,
    gumbel,
    share_counts,
    share_schedule,
    unmask_shares,
)


@dataclass(frozen=True)
class Config:
    eps: float = 1e-3
    alg_temp: float = 0.0  # temperature of the choice of positions; 0: the most confident ones

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if self.alg_temp < 0:
            raise ValueError(f"alg_temp must be 0 or more, got {self.alg_temp}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return share_schedule(canvas_length, steps, block_length, "linear", config.eps)


def commit(confidence: Tensor, stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    """Commit the positions with the highest confidence [R, W]."""
    score = confidence + config.alg_temp * gumbel(uniforms("position")) if config.alg_temp > 0 else confidence
    counts = share_counts(state, unmask_shares(schedule.steps_per_block, eps=config.eps), least=0)
    return commit_best(score, stats, state, counts)


def log_probs(config: Config) -> str:
    """Of a confidence that depends on the law alone: exact while the positions are not drawn."""
    return "none" if config.alg_temp > 0 else "exact"
