"""First-hitting sampling: one uniformly chosen position a step, equal in law to infinitely many ancestral steps (arXiv 2409.02908)."""

from __future__ import annotations

from rlhub.samplers import Schedule, token_schedule
from rlhub.samplers.random import Config, choose

__all__ = ["LOG_PROBS", "RECORDS", "Config", "choose", "schedule"]

RECORDS = ()
LOG_PROBS = "given_order"


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return token_schedule(canvas_length, steps, block_length, "first_hitting")
