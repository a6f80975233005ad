"""Denoising samplers: step rules without a loop. The loop belongs to the oracle and to each engine.

A module here has a frozen dataclass `Config` and

    schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule
    select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms: Callable[[str], Tensor [R, L]]) -> Commit

`uniforms(purpose)` gives keyed noise per row and canvas position, for rules that choose positions at random. Ties go to the lower
position, then to the lower token id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Uniforms = Callable[[str], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Blocks are denoised from left to right; step s of a block commits `transfer[s]` positions."""

    block_length: int
    num_blocks: int
    transfer: tuple[int, ...]

    @property
    def steps_per_block(self) -> int:
        return len(self.transfer)


@dataclass(frozen=True)
class RowStats:
    """What the model says of each canvas position, `[R, L]`; entries outside `CanvasState.eligible` are undefined."""

    token: Tensor  # int64, drawn from the tempered law
    logp_model: Tensor  # float64, of that token at temperature 1
    logp_sample: Tensor  # float64, of that token under the law that drew it
    entropy: Tensor  # float64, nats, at temperature 1
    margin: Tensor  # float64, probability of the best token minus that of the second
    deferred: Tensor  # bool, tokens that may only be committed when nothing else is left (EOS under `eos: last`)


@dataclass(frozen=True)
class CanvasState:
    """The rows being denoised; all of them are at the same step of the same block."""

    tokens: Tensor  # int64 [R, L]
    eligible: Tensor  # bool [R, L], masked positions of the active block
    step: int  # within the block


@dataclass(frozen=True)
class Commit:
    """Positions bool [R, L] to fill and the tokens int64 [R, L] to fill them with."""

    positions: Tensor
    tokens: Tensor


def transfer_schedule(canvas_length: int, steps: int, block_length: int) -> Schedule:
    """LLaDA's even schedule: each block gets steps / blocks steps, and the remainder of its tokens goes to the first ones.

    Raises:
        ValueError: the canvas is not a whole number of blocks, or steps is not a multiple of the number of blocks.
    """
    if canvas_length % block_length:
        raise ValueError(f"canvas length {canvas_length} is not a multiple of block length {block_length}")
    num_blocks = canvas_length // block_length
    if steps % num_blocks or steps < num_blocks:
        raise ValueError(f"{steps} steps cannot be split evenly over {num_blocks} blocks")
    per_block = steps // num_blocks
    base, extra = divmod(block_length, per_block)
    return Schedule(block_length, num_blocks, tuple(base + (step < extra) for step in range(per_block)))


def commit_best(score: Tensor, stats: RowStats, state: CanvasState, count: int) -> Commit:
    """Commit the `count` eligible positions with the highest score; ties go to the lower position."""
    score = score.masked_fill(stats.deferred, torch.finfo(score.dtype).min).masked_fill(~state.eligible, float("-inf"))
    order = score.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return Commit((rank < count) & state.eligible, stats.token)
