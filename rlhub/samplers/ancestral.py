"""Ancestral sampling: each masked position is unmasked on its own with probability 1 - ratio(s) / ratio(t) (RADD, arXiv 2406.03736).

A row that unmasks nothing keeps the model's output, so the step costs no forward: n linear steps on L tokens cost n (1 - (1 - 1/n)^L)
forwards on average (their Eq. 3.6). The mask ratio may follow another curve of time (eMIGM, arXiv 2503.07197, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.curves import check_curve
from rlhub.samplers import CanvasState, Schedule, Uniforms, transfer_schedule, unmask_shares

RECORDS = ()
LOG_PROBS = "given_order"


@dataclass(frozen=True)
class Config:
    curve: str = "linear"  # linear | cosine | exponential | log_exponential

    def __post_init__(self) -> None:
        check_curve(self.curve)


def schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule:
    return bernoulli_schedule(canvas_length, steps, block_length)


def choose(state: CanvasState, schedule: Schedule, uniforms: Uniforms, config: Config, deferred: Tensor | None = None) -> Tensor:
    return bernoulli(state, uniforms, unmask_shares(schedule.steps_per_block, config.curve), deferred)


def bernoulli_schedule(canvas_length: int, steps: int, block_length: int) -> Schedule:
    """A step may unmask nothing; the last one unmasks the rest."""
    even = transfer_schedule(canvas_length, steps, block_length)
    return Schedule(block_length, even.num_blocks, (*[0] * (even.steps_per_block - 1), block_length))


def bernoulli(state: CanvasState, uniforms: Uniforms, shares: Tensor, deferred: Tensor | None) -> Tensor:
    """bool [R, W], each masked position with the probability [S] of the row's step. Deferred ones wait while others are masked."""
    chosen = (uniforms("position") < shares.to(state.step.device)[state.step][:, None]) & state.masked
    if deferred is None:
        return chosen
    waits = (state.masked & ~deferred).any(1) & (state.step < len(shares) - 1)
    return chosen & ~(deferred & waits[:, None])
