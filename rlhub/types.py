"""The records that travel between the parts of rlhub.

Shape letters, used everywhere: `P` prompts, `G` completions per prompt, `B = P * G` sequences, `L` canvas (completion) length,
`K` noise draws, `N` noisy rows, `T` packed tokens of all rows, `M` scored positions, `S` denoising steps, `V` vocabulary, `D` hidden.

Data flow: `Example` -> `Request` -> `Rollout` -> graded `Rollout` -> `Batch` -> `Views` -> log-probs `[M]` -> `LogLikelihood` -> `Scores`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # graders import this module in processes that must start fast
    import numpy as np
    from torch import Tensor

Attention = Literal["full", "block_causal", "block_diffusion"]  # see rlhub.networks.attention
Kind = Literal["exact", "lower", "upper", "proxy"]
Granularity = Literal["sequence", "token", "step"]
RewardStatus = Literal["ok", "unparsed", "timeout", "crashed", "rejected"]

Prompt = str | list[dict[str, str]]  # text, or chat messages `[{"role": ..., "content": ...}]`

NEVER = -1  # unmask_step of a position that was never filled


@dataclass(frozen=True)
class Example:
    """One row of a task's data.

    Attributes:
        row: position of the example in its split; with the split's name it identifies the example.
        prompt: plain text, or chat messages `[{"role": ..., "content": ...}]`.
        columns: what graders need (numbers and target, puzzle and solution, ...).
        demonstration: text of a completion to imitate (SFT), or None.
    """

    row: int
    prompt: str | list[dict[str, str]]
    columns: dict[str, Any]
    demonstration: str | None = None


@dataclass(frozen=True)
class Request:
    """One completion to be generated: `uid` keys all of its randomness, `group_uid` names its prompt's group."""

    uid: int
    group_uid: int
    prompt_ids: np.ndarray  # int32 [Lp]


@dataclass(frozen=True)
class RewardResult:
    """A grade. `value` counts only when `status` is `ok` or `unparsed`; anything else is a failure of the grader, never a zero.

    `parts` holds the grades that were combined, by label and the main one first; `cached` says that the value was looked up.
    """

    value: float
    status: RewardStatus = "ok"
    detail: str = ""
    parts: dict[str, RewardResult] = field(default_factory=dict)
    cached: bool = False

    @property
    def valid(self) -> bool:
        return self.status in ("ok", "unparsed")

    @property
    def accurate(self) -> bool:
        """Is the answer right? The value of the main part, or the value itself where nothing was combined, is 1.0."""
        main = next(iter(self.parts.values()), None)
        return self.valid and (self.value == 1.0 if main is None else main.accurate)


@dataclass(frozen=True)
class Rollout:
    """One generated completion with what is needed to train on it and to replay it.

    `completion_ids` is the whole canvas, with the mask id where a position was never filled; `length` is that of the response, the tokens
    through the first EOS. `logp_sample` is the log-prob of each token under the law that drew it (tempered), `logp_model` under the model
    at temperature 1 over the whole vocabulary, as training computes it, both at the step that committed it; NaN where never filled.

    The trace fields are there when the sampler or `sampler.records` asks for them. Where a sampler edits tokens, `unmask_step` keeps the
    step that first filled a position, and the log-probs, `entropy` and `order` are those of the token that stands.

    Attributes:
        policy_version: of the weights that wrote each token that stands; where never filled, of those that ended the row. A rollout that
            spans versions counts as its oldest.
        entropy: nats, of the model's law at temperature 1 at the step that committed the token; NaN where never filled.
        order: rank of each token among those committed in the same step, the sampler's first choice being 0; NEVER where never filled.
        predictions: the canvas as it was predicted at each step: drawn tokens where it was masked, the token that stood elsewhere;
            NEVER where nothing was predicted (steps without a forward, blocks that a block-causal model has not reached).
        edits: (step, position, old token, new token) of each token that was replaced, in order.
        fallback: tokens committed only because a step must commit something.
    """

    uid: int
    group_uid: int
    prompt_ids: np.ndarray  # int32 [Lp]
    completion_ids: np.ndarray  # int32 [L]
    length: int
    unmask_step: np.ndarray  # int16 [L], NEVER where never filled
    logp_sample: np.ndarray  # float32 [L]
    logp_model: np.ndarray  # float32 [L]
    policy_version: np.ndarray  # int32 [L]
    num_forwards: int
    sampler: dict[str, Any] = field(default_factory=dict)
    reward: RewardResult | None = None
    step_rewards: tuple[RewardResult, ...] = ()  # [S], grades of the states between; empty where they are not graded
    entropy: np.ndarray | None = None  # float32 [L]
    order: np.ndarray | None = None  # int16 [L]
    predictions: np.ndarray | None = None  # int32 [S, L]
    edits: tuple[tuple[int, int, int, int], ...] | None = None
    fallback: np.ndarray | None = None  # bool [L]

    def graded(self, reward: RewardResult) -> Rollout:
        """A copy with its grade."""
        return dataclasses.replace(self, reward=reward)


@dataclass(frozen=True)
class Batch:
    """The sequences of one training step in uid order.

    A sample whose grade is invalid stays in the batch with `valid` False and reward NaN: it gives no gradient and is counted.
    """

    uid: np.ndarray  # uint64 [B]
    group: np.ndarray  # int64 [B], 0-based index of the prompt group
    prompts: list[np.ndarray]  # int32 [Lp] each
    completions: list[np.ndarray]  # int32 [L] each, whole canvas
    response_length: np.ndarray  # int64 [B], tokens through the first EOS
    scored_length: np.ndarray  # int64 [B], tokens that a likelihood counts: those of the canvas or of the response
    rewards: np.ndarray  # float64 [P, G], NaN where invalid or missing
    member: np.ndarray  # int64 [B], column of each sample in `rewards`
    unmask_step: list[np.ndarray] | None = None  # int16 [L] each
    logp_model: list[np.ndarray] | None = None  # float32 [L] each
    block_length: int = 0  # sampler block; 0 when the canvas is one block
    step_rewards: np.ndarray | None = None  # float64 [P, G, S], grades of intermediate states
    epoch: int = 0
    segments: list[np.ndarray] | None = None  # int32 [scored_length] each: packed documents, which do not see each other

    def __len__(self) -> int:
        return len(self.uid)

    @property
    def valid(self) -> np.ndarray:
        """bool [B]: samples with a usable grade."""
        import numpy as np

        return ~np.isnan(self.rewards[self.group, self.member])


@dataclass(frozen=True)
class Credit:
    """What the reward says of each sample: advantages `[B]`, `[B, S]` or `[B, L]`; labels `[B]` and pairs `[N, 2]` for preferences."""

    advantages: Tensor  # float64, 0 where invalid
    valid: Tensor  # bool [B], samples that count in the objective's mean
    labels: Tensor | None = None
    pairs: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How packed rows attend. Rows never see each other; `row_offsets` `[N + 1]` bounds them in the packed `[T]` axis."""

    position_ids: Tensor  # int32 [T]
    segment_ids: Tensor  # int32 [T]; tokens of a row attend only within their segment
    block_ids: Tensor  # int32 [T]; used by block_causal and block_diffusion attention (block-causal families count their own)
    row_offsets: Tensor  # int32 [N + 1]
    attention: Attention = "full"

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each row."""
        offsets = self.row_offsets.long()
        return offsets[1:] - offsets[:-1]


@dataclass(frozen=True)
class Views:
    """Noisy rows to be scored; the rows of a sample are contiguous and its draws are numbered from 0.

    Score m asks for `log p(score_target[m])` at position `score_position[m]` of row `score_row[m]` and enters the likelihood with
    `score_weight[m]`. Positions count from the row's first token (the prompt's), `completion_start` says where completions begin.
    """

    sample: Tensor  # int64 [N]
    draw: Tensor  # int64 [N]
    tokens: Tensor  # int32 [T]
    layout: Layout
    completion_start: Tensor  # int64 [N]
    score_row: Tensor  # int64 [M]
    score_position: Tensor  # int64 [M]
    score_target: Tensor  # int64 [M]
    score_weight: Tensor  # float32 [M]
    num_samples: int
    num_draws: int
    canvas_length: int  # the widest canvas of the batch
    scored_length: Tensor  # int64 [B], tokens that a likelihood counts
    step: Tensor | None = None  # int64 [N], denoising step that the row replays (trajectory views)

    @property
    def num_rows(self) -> int:
        return len(self.sample)

    @property
    def score_sample(self) -> Tensor:
        """int64 [M], sample of each score."""
        return self.sample[self.score_row]

    @property
    def score_draw(self) -> Tensor:
        """int64 [M], draw of each score."""
        return self.draw[self.score_row]

    @property
    def score_token(self) -> Tensor:
        """int64 [M], index of each score in the completion."""
        return self.score_position - self.completion_start[self.score_row]

    @property
    def target_rows(self) -> Tensor:
        """int64 [M], index of each scored position in the packed `[T]` axis."""
        return self.layout.row_offsets.long()[self.score_row] + self.score_position


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood estimates in nats: a sum over tokens for sequences, one value per token or step otherwise.

    `draws` `[B, K]` keeps the single draws of a sequence estimate for error bars; `mask` `[B, L]` marks the entries of a token or
    step estimate that exist; `scored_length` `[B]` counts tokens (the normaliser of ratios).
    """

    value: Tensor  # [B], [B, L] or [B, S]
    kind: Kind
    granularity: Granularity
    scored_length: Tensor  # int64 [B]; a mean over draws, float64, where what was hidden is counted
    draws: Tensor | None = None
    mask: Tensor | None = None

    def detach(self) -> LogLikelihood:
        return dataclasses.replace(self, value=self.value.detach(), draws=None if self.draws is None else self.draws.detach())


@dataclass(frozen=True)
class Scores:
    """The same estimate under each policy that an objective may compare; absent ones are None.

    `policy` is trained, `proximal` is the weights that began this batch, `behavior` the ones that generated, `reference` is frozen.
    """

    policy: LogLikelihood
    proximal: LogLikelihood | None = None
    behavior: LogLikelihood | None = None
    reference: LogLikelihood | None = None


@dataclass(frozen=True)
class Receipt:
    """Proof of a weight update: both sides hash what they hold and run the same canvas."""

    version: int
    num_tensors: int
    num_bytes: int
    bucket_hashes: tuple[str, ...]
    canary: tuple[float, ...]

    def mismatch(self, other: Receipt) -> str | None:
        """What differs, in words; None when the receipts agree."""
        for name in ("version", "num_tensors", "num_bytes", "bucket_hashes", "canary"):
            if getattr(self, name) != getattr(other, name):
                return f"{name}: published {getattr(self, name)!r}, received {getattr(other, name)!r}"
        return None
