"""eMIGM's sampling: a share of the masked positions in each step, at least one, in random order (arXiv 2503.07197, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.curves import check_curve
from rlhub.samplers import CanvasState, Schedule, Uniforms, best_positions, share_counts, share_schedule, unmask_shares

RECORDS = ()
LOG_PROBS = "given_order"


@dataclass(frozen=True)
class Config:
    curve: str = "exponential"  # linear | cosine | exponential | log_exponential

    def __post_init__(self) -> None:
        check_curve(self.curve)


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return share_schedule(canvas_length, steps, block_length, config.curve, least=1)


def choose(state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config, deferred: Tensor | None = None) -> Tensor:
    counts = share_counts(state, unmask_shares(schedule.steps_per_block, config.curve), least=1)
    return best_positions(uniforms("position"), state, counts, deferred)
