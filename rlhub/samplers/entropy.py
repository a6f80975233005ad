"""Dream's `entropy`: confidence is the negative entropy of the law that tokens are drawn from (arXiv 2508.15487)."""

from __future__ import annotations

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms
from rlhub.samplers._dream import Config, commit, log_probs, schedule

__all__ = ["LOG_PROBS", "NEEDS", "RECORDS", "Config", "log_probs", "schedule", "select"]

RECORDS = ()
LOG_PROBS = "exact"
NEEDS = ("law_entropy",)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    return commit(-stats.law_entropy, stats, state, schedule, uniforms, config)
