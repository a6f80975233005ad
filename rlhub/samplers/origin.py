"""Dream's `origin`: ancestral sampling in linear time from 1 to `eps`, where the last step unmasks the rest (arXiv 2508.15487)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.samplers import CanvasState, Schedule, Uniforms, check_eps, unmask_shares
from rlhub.samplers.ancestral import bernoulli, bernoulli_schedule

RECORDS = ()
LOG_PROBS = "given_order"


@dataclass(frozen=True)
class Config:
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_eps(self.eps)


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return bernoulli_schedule(canvas_length, steps, block_length)


def choose(state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config, deferred: Tensor | None = None) -> Tensor:
    return bernoulli(state, uniforms, unmask_shares(schedule.steps_per_block, eps=config.eps), deferred)
