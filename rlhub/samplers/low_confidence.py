"""LLaDA's low-confidence remasking: commit the tokens that the model is surest of (arXiv 2502.09992, section 2.4 and appendix A.3).

The draw is tempered, the confidence is not: it is the probability at temperature 1 of the drawn token.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_best, transfer_schedule

RECORDS = ()
LOG_PROBS = "none"


@dataclass(frozen=True)
class Config:
    pass


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    return commit_best(stats.logp_model, stats, state, state.counts(schedule))
