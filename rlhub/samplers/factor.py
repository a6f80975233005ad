"""Parallel decoding by a factor: the n surest tokens for the largest n with (n + 1) (1 - c_n) <= factor (Fast-dLLM, arXiv 2505.22618).

c_n is the n-th highest probability at temperature 1 of a drawn token. Under factor 1 greedy parallel decoding equals greedy decoding one
by one (their Theorem 1). Where too few tokens pass, the surest ones fill the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_over, ranks, transfer_schedule

RECORDS = ()
LOG_PROBS = "none"


@dataclass(frozen=True)
class Config:
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor must be above 0, got {self.factor}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    n = ranks(stats.logp_model, state, stats.deferred) + 1
    passed = stats.logp_model.exp() >= 1 - config.factor / (n + 1)
    return commit_over(passed, stats.logp_model, stats, state, state.counts(schedule))
