"""Strictly left to right, one position after the other: the order under which JustGRPO's log-probs are exact (arXiv 2601.15165)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhub.samplers import CanvasState, Commit, RowStats, Schedule, Uniforms, commit_best, transfer_schedule


@dataclass(frozen=True)
class Config:
    pass


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return transfer_schedule(canvas_length, steps, block_length)


def select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Uniforms) -> Commit:
    position = torch.arange(state.tokens.shape[1], dtype=torch.float64)
    return commit_best(-position.expand(state.tokens.shape), stats, state, schedule.transfer[state.step])
