"""Dream's `topk_margin`: confidence is how far the best token leads the second in probability (arXiv 2508.15487; 2502.06768)."""

from __future__ import annotations

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms
from rlhub.samplers._dream import Config, commit, log_probs, schedule

__all__ = ["LOG_PROBS", "NEEDS", "RECORDS", "Config", "log_probs", "schedule", "select"]

RECORDS = ()
LOG_PROBS = "exact"
NEEDS = ("law_margin",)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    return commit(stats.law_margin, stats, state, schedule, uniforms, config)
