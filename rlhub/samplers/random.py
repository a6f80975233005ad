"""Random remasking: the positions to commit are drawn uniformly (LLaDA, arXiv 2502.09992, appendix A.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.samplers import CanvasState, Schedule, Uniforms, best_positions, transfer_schedule

RECORDS = ()
LOG_PROBS = "given_order"


@dataclass(frozen=True)
class Config:
    pass


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def choose(state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config, deferred: Tensor | None = None) -> Tensor:
    return best_positions(uniforms("position"), state, state.counts(schedule), deferred)
