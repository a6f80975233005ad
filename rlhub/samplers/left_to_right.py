"""Strictly left to right, one position after the other: the order under which JustGRPO's log-probs are exact (arXiv 2601.15165)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.samplers import CanvasState, Schedule, Uniforms, best_positions, transfer_schedule

RECORDS = ()
LOG_PROBS = "exact"
ORDER = "left_to_right"


@dataclass(frozen=True)
class Config:
    pass


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def choose(state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config, deferred: Tensor | None = None) -> Tensor:
    position = torch.arange(state.tokens.shape[1], dtype=torch.float64, device=state.tokens.device)
    return best_positions(-position.expand(state.tokens.shape), state, state.counts(schedule), deferred)
