"""Dream's `maskgit_plus`: confidence is the probability of the drawn token under the law that drew it (arXiv 2508.15487)."""

from __future__ import annotations

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms
from rlhub.samplers._dream import Config, commit, schedule

__all__ = ["LOG_PROBS", "NEEDS", "RECORDS", "Config", "schedule", "select"]

RECORDS = ()
LOG_PROBS = "none"
NEEDS = ("law_logp",)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    return commit(stats.law_logp.exp(), stats, state, schedule, uniforms, config)
