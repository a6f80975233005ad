"""Entropy-guided initialization: the first token goes where the model's entropy is highest, the others as in `top_probability`
("Low-Confidence Remasking Traps Flexibility", 2026).

Completions of a prompt thus part at the place where the model is least decided.
"""

from __future__ import annotations

import torch

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, best_positions, commit_best
from rlhub.samplers.top_probability import Config, schedule

__all__ = ["LOG_PROBS", "NEEDS", "RECORDS", "Config", "schedule", "select"]

RECORDS = ()
LOG_PROBS = "exact"
NEEDS = ("entropy", "top_logp")


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    first = best_positions(stats.entropy, state, (state.number == 0).long(), stats.deferred)
    return commit_best(stats.top_logp.masked_fill(first, torch.inf), stats, state, state.counts(schedule))
