"""Denoising samplers: step rules without a loop. The loop belongs to the oracle and to each engine.

A module here has a frozen dataclass `Config` and

    schedule(canvas_length: int, steps: int, block_length: int, config: Config) -> Schedule
    RECORDS: tuple[str, ...]    trace fields of the rollout that it always needs, from `TRACE`
    LOG_PROBS: str              what the recorded log-probs mean:
        exact         they multiply to the probability of the rollout under this sampler
        given_order   exact for the tokens given the positions, whose choice does not depend on the model
        none          positions depend on draws that are not recorded
      A module whose options decide has a function log_probs(config) -> str beside it.
    NEEDS: tuple[str, ...]      optional fields of `RowStats` that it reads; absent when it reads none
    EDITS: bool                 True when it may change tokens that are already there; absent otherwise
    ORDER: str                  the order of positions that it always follows, `left_to_right`; absent when it follows none

and one of

    choose(state: CanvasState, schedule: Schedule, uniforms, config: Config, deferred=None) -> bool [R, W]
        positions that are known before the model runs. The engine then runs the model only for rows that commit something, and head and
        noise only for what is committed. `deferred` bool [R, W] is given under `eos: last`, where everything masked is scored first.
    select(stats: RowStats, state: CanvasState, schedule: Schedule, uniforms, config: Config) -> Commit
        positions that depend on what the model says.

`R` rows are denoised together, each at a block and a step of its own; `[R, W]` is the active block of each, `W = block_length`.
`uniforms(purpose)` is float64 [R, W] in (0, 1), keyed by the row's uid and `state.number`: the slice of a stream over the canvas.
A token is drawn with the stream `token`, keyed by uid, number and canvas position. Ties go to the lower position, then to the lower
token id.

Under full attention block k of a row is the canvas from k * W. Under block-causal attention blocks are counted from the first token
of the prompt, so that the first active block may begin with the end of the prompt (`state.first` is negative then) and the last one may
reach beyond the canvas; such columns are never masked and nothing is committed there. A block ends when `Commit.done` says so, or,
where that is None, when nothing in it is masked; in any case after the last step of the schedule. `number` is
block * steps_per_block + step, so numbers are skipped where a block ends early.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhub.curves import MASK_RATIO
from rlhub.networks.profile import Profile
from rlhub.parts import title

if TYPE_CHECKING:
    from rlhub.config.schema import SamplerConfig

CONTRACT = (
    "Config",
    "schedule(canvas_length, steps, block_length, config)",
    ("choose(state, schedule, uniforms, config, deferred)", "select(stats, state, schedule, uniforms, config)"),
    "RECORDS",
    "LOG_PROBS",
)
Uniforms = Callable[[str], Tensor]

TRACE = ("entropy", "order", "predictions", "edits", "fallback")  # optional fields of a rollout; see rlhub.types.Rollout


@dataclass(frozen=True)
class Schedule:
    """Blocks are denoised from left to right; step s of a block commits at least `transfer[s]` tokens, as far as that many are masked."""

    block_length: int
    num_blocks: int
    transfer: tuple[int, ...]

    @property
    def steps_per_block(self) -> int:
        return len(self.transfer)


@dataclass(frozen=True)
class CanvasState:
    """The active block of each row."""

    tokens: Tensor  # int64 [R, W]
    masked: Tensor  # bool [R, W]
    step: Tensor  # int64 [R], within the block
    idle: Tensor  # int64 [R], earlier steps of this block that began with nothing masked
    block: Tensor  # int64 [R]
    number: Tensor  # int64 [R], step over the whole canvas; keys the noise
    first: Tensor  # int64 [R], canvas index of the block's first position
    prompt_length: Tensor  # int64 [R]

    def counts(self, schedule: Schedule) -> Tensor:
        """int64 [R], the least number of tokens that each row commits at this step."""
        return torch.tensor(schedule.transfer, device=self.step.device)[self.step]


@dataclass(frozen=True)
class RowStats:
    """What the model says of each position of the active block, `[R, W]`; undefined where nothing was scored.

    Scored are masked positions, and filled ones too where the module has `EDITS`. The law is the one that draws tokens: the model's without
    those that may not be drawn (the mask, under `eos: never` EOS), after temperature, top-k and top-p, in this order; at temperature 0
    without these three. What may not be drawn keeps its share of the model's law. Log-probs and entropies are in nats.
    """

    token: Tensor  # int64, drawn from the law; the most likely one at temperature 0
    logp_model: Tensor  # float64, of that token at temperature 1
    logp_sample: Tensor  # float64, of that token under the law that drew it; 0 at temperature 0
    deferred: Tensor  # bool, tokens that may only be committed when nothing else is left (EOS under `eos: last`)
    # The fields from here on exist only when the module names them in NEEDS.
    entropy: Tensor | None = None  # float64, of the model at temperature 1
    margin: Tensor | None = None  # float64, probability of the best token minus that of the second, at temperature 1
    top_logp: Tensor | None = None  # float64, log-prob of the best token at temperature 1
    law_logp: Tensor | None = None  # float64, of `token` under the law
    law_entropy: Tensor | None = None  # float64, of the law
    law_margin: Tensor | None = None  # float64, as `margin`, of the law


OPTIONAL_STATS = ("entropy", "margin", "top_logp", "law_logp", "law_entropy", "law_margin")


@dataclass(frozen=True)
class Commit:
    """What a step writes.

    Attributes:
        positions: bool [R, W], to write to; filled ones too where the module has `EDITS`.
        tokens: int64 [R, W], what to write there.
        done: bool [R], rows whose block is finished; None: when nothing in it is masked.
        fallback: bool [R], rows that committed only because a step must commit something (a threshold that nothing passed).
        order: int64 [R, W], rank of each position within the step, 0 first; None: from left to right.
    """

    positions: Tensor
    tokens: Tensor
    done: Tensor | None = None
    fallback: Tensor | None = None
    order: Tensor | None = None


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


def ranks(score: Tensor, state: CanvasState, deferred: Tensor | None = None) -> Tensor:
    """int64 [R, W], rank of each position by falling score [R, W]: masked ones first, deferred ones behind all others of them.

    Ties, and deferred positions among each other, go to the lower position.
    """
    if deferred is not None:
        score = score.masked_fill(deferred, torch.finfo(score.dtype).min)
    order = score.masked_fill(~state.masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def best_positions(score: Tensor, state: CanvasState, counts: Tensor, deferred: Tensor | None = None) -> Tensor:
    """bool [R, W], the `counts` [R] masked positions of each row with the highest score [R, W]; see `ranks`."""
    return (ranks(score, state, deferred) < counts[:, None]) & state.masked


def commit_best(score: Tensor, stats: RowStats, state: CanvasState, counts: Tensor) -> Commit:
    """Commit the `counts` [R] masked positions of each row with the highest score [R, W]; see `ranks`."""
    rank = ranks(score, state, stats.deferred)
    return Commit((rank < counts[:, None]) & state.masked, stats.token, order=rank)


def commit_over(passed: Tensor, score: Tensor, stats: RowStats, state: CanvasState, counts: Tensor) -> Commit:
    """Commit the positions that passed a threshold of the score, [R, W] both, and at least `counts` [R] with the highest score.

    `fallback` marks rows in which nothing passed.
    """
    passed = passed & state.masked & ~stats.deferred
    commit = commit_best(score, stats, state, torch.maximum(passed.sum(1), counts))
    return dataclasses.replace(commit, fallback=~passed.any(1))


def token_schedule(canvas_length: int, steps: int, block_length: int, sampler: str) -> Schedule:
    """One step for each token, for samplers whose number of steps is not a choice.

    Raises:
        ValueError: another number of steps was asked for, or the canvas is not a whole number of blocks.
    """
    if steps != canvas_length:
        raise ValueError(f"{sampler} has one step for each token of the canvas; use steps {canvas_length}, got {steps}")
    return transfer_schedule(canvas_length, steps, block_length)


"""Share of masked tokens at a time from 1 to 0 (eMIGM, arXiv 2503.07197, table 1)."""


def check_eps(eps: float) -> None:
    """Raises ValueError unless time can fall from 1 to `eps`."""
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps:g}")


def unmask_shares(steps: int, curve: str = "linear", eps: float = 0.0) -> Tensor:
    """float64 [steps], the share of the masked tokens that each step unmasks: 1 - ratio(s) / ratio(t) while time goes from 1 to `eps`.

    The last step unmasks the rest.
    """
    ratio = MASK_RATIO[curve]
    times = [1 - (1 - eps) * step / steps for step in range(steps)]
    shares = [1 - ratio(then) / ratio(now) for now, then in itertools.pairwise(times)]
    return torch.tensor([*shares, 1.0], dtype=torch.float64)


def share_counts(state: CanvasState, shares: Tensor, least: int) -> Tensor:
    """int64 [R], the whole tokens in each row's share [S] of what is masked in its block, and at least `least`."""
    share = shares.to(state.step.device)[state.step]
    return (state.masked.sum(1) * share + 1e-9).floor().long().clamp_min(least)  # gives back what rounding took from a whole number


def share_schedule(canvas_length: int, steps: int, block_length: int, curve: str, eps: float = 0.0, least: int = 0) -> Schedule:
    """Each block gets steps / blocks steps, of which step s commits its share of what is masked, rounded down; see `unmask_shares`.

    Raises:
        ValueError: the canvas is not a whole number of blocks, or steps is not a multiple of the number of blocks.
    """
    num_blocks = transfer_schedule(canvas_length, steps, block_length).num_blocks
    masked, transfer = block_length, []
    for share in unmask_shares(steps // num_blocks, curve, eps).tolist():
        transfer.append(min(masked, max(least, math.floor(masked * share + 1e-9))))
        masked -= transfer[-1]
    return Schedule(block_length, num_blocks, tuple(transfer))


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms in (0, 1)."""
    return -(-uniforms.log()).log()


def check_attention(settings: SamplerConfig, profile: Profile) -> None:
    """Raises ValueError where a sampler's settings do not fit the attention of a family."""
    if profile.attention != "block_causal":
        return
    if settings.cache != "exact":
        raise ValueError(f"sampler.cache: {settings.cache} approximates full attention, but this model's cache is exact anyway; use exact")
    if settings.block_length != profile.block_length:
        raise ValueError(f"sampler.block_length: got {settings.block_length}, but the model works in blocks of {profile.block_length}")


LOG_PROB_MEANINGS = ("exact", "given_order", "none")


def check_statements(sampler: ModuleType) -> None:
    """Raises ValueError where a sampler states something that nobody knows: a misspelled statistic would arrive as None."""
    stated = vars(sampler)
    for name, known in (("NEEDS", OPTIONAL_STATS), ("RECORDS", TRACE)):
        words = stated.get(name, ())
        if isinstance(words, str) or set(words) - set(known):
            raise ValueError(f"{name} of {title(sampler)} must be a tuple of {', '.join(known)}, got {words!r}")
    if stated.get("LOG_PROBS", "none") not in LOG_PROB_MEANINGS:
        raise ValueError(f"LOG_PROBS of {title(sampler)} must be one of {', '.join(LOG_PROB_MEANINGS)}, got {stated['LOG_PROBS']!r}")


def log_probs(sampler: ModuleType, config: Any, eos: str = "allow") -> str:
    """What the recorded log-probs mean under these options: `LOG_PROBS`, unless the module's own `log_probs(config)` says otherwise.

    Under `eos: last` positions wait for a draw, so they are never exact.
    """
    if eos == "last":
        return "none"
    return sampler.log_probs(config) if hasattr(sampler, "log_probs") else sampler.LOG_PROBS
