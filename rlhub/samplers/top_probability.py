"""Top-probability positions: commit where the model's best token is likeliest, with a token drawn from the law ("Low-Confidence Remasking
Traps Flexibility", 2026).

low_confidence draws everywhere first and keeps the likeliest draws, which nearly undoes the temperature; here positions are chosen before
anything is drawn, so the tokens keep their law and the log-probs are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_best, transfer_schedule

RECORDS = ()
LOG_PROBS = "exact"
NEEDS = ("top_logp",)


@dataclass(frozen=True)
class Config:
    pass


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    return commit_best(stats.top_logp, stats, state, state.counts(schedule))
