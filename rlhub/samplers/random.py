"""Random remasking: the positions to commit are drawn uniformly (LLaDA, arXiv 2502.09992, appendix A.3)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_best, transfer_schedule


@dataclass(frozen=True)
class Config:
    pass


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms) -> Commit:
    return commit_best(uniforms("position"), stats, state, schedule.transfer[state.step])
