"""Block decoding with edits, LLaDA2.1's joint mask-to-token and token-to-token steps (arXiv 2602.08676).

Masked positions are filled as `block` does in its dynamic mode. In the same step a filled position of the block, the prompt's excepted, is
overwritten when another token is drawn there with a probability above `editing_threshold`. The block ends with a step that found nothing
masked and changed nothing, at the latest after `max_post_steps` that found nothing masked.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_over, transfer_schedule

RECORDS = ("edits",)
LOG_PROBS = "none"
NEEDS = ("law_logp",)
EDITS = True


@dataclass(frozen=True)
class Config:
    threshold: float = 0.95
    editing_threshold: float = 0.9
    max_post_steps: int = 16

    def __post_init__(self) -> None:
        for name in ("threshold", "editing_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.max_post_steps < 0:
            raise ValueError(f"max_post_steps must be 0 or more, got {self.max_post_steps}")


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    even = transfer_schedule(canvas_length, steps, block_length)
    return dataclasses.replace(even, transfer=(*even.transfer, *[0] * config.max_post_steps))


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config) -> Commit:
    fill = commit_over(stats.law_logp > math.log(config.threshold), stats.law_logp, stats, state, state.counts(schedule))
    column = state.first[:, None] + torch.arange(state.tokens.shape[1], device=state.tokens.device)
    editable = ~state.masked & (column >= 0) & (column < schedule.num_blocks * schedule.block_length)
    edits = editable & (stats.token != state.tokens) & (stats.law_logp > math.log(config.editing_threshold)) & ~stats.deferred
    filled = ~state.masked.any(1)
    done = filled & (~edits.any(1) | (state.idle + 1 >= config.max_post_steps))
    if config.max_post_steps == 0:
        done = (fill.positions == state.masked).all(1)
    order = torch.where(state.masked, fill.order, fill.positions.sum(1, keepdim=True) + edits.cumsum(1) - 1)
    return Commit(fill.positions | edits, stats.token, done=done, fallback=fill.fallback & ~filled & ~edits.any(1), order=order)
