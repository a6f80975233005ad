"""Preference pairs as batches: tokens, order, and what cannot be used."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rlhub.algorithm.batching import sequence_batch
from rlhub.checkpoints.tokenizers import answer_end, encode_prompts
from rlhub.config.schema import Recipe
from rlhub.errors import DataError
from rlhub.noise import Noise, sample_uid
from rlhub.parts import load_part, part_config
from rlhub.phases import Phase
from rlhub.tasks.preferences import BadRow, Preference
from rlhub.types import Batch


@dataclass(frozen=True)
class Pairs:
    """Encoded preferences: pair i has prompt i and one or two responses, each with its EOS.

    Attributes:
        row: int64 [N], place of each in the data, which keys its noise.
        responses: G arrays int32 [L] for each pair, G = 1 (unpaired) or 2 (chosen, rejected).
        rewards: float64 [N, G].
        canvas: responses are padded with EOS to this length, and the padding counts; 0: no padding.
        phase: the phase field of uids: PAIRS, EVAL or SFT.
    """

    row: np.ndarray
    prompts: list[np.ndarray]
    responses: list[tuple[np.ndarray, ...]]
    rewards: np.ndarray
    mask_id: int
    eos_id: int
    canvas: int = 0
    phase: Phase = Phase.PAIRS

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        return int(self.rewards.shape[1])

    def batch(self, which: Sequence[int] | np.ndarray, epoch: int = 0) -> Batch:
        """The pairs of the given indices in ascending order, as groups of `group_size` samples."""
        which = sorted(map(int, which))
        size = self.group_size
        responses = [response for index in which for response in self.responses[index]]
        length = np.array([len(response) for response in responses])
        uids = [
            sample_uid(self.phase.number, row >> ROW_BITS, row & ((1 << ROW_BITS) - 1), member)
            for row in self.row[which].tolist()
            for member in range(size)
        ]
        return sequence_batch(
            [self.prompts[index] for index in which for _ in range(size)],
            [self._padded(response) for response in responses],
            uids,
            rewards=self.rewards[which],
            response_length=length,
            scored_length=np.maximum(length, self.canvas),
            epoch=epoch,
        )

    def _padded(self, response: np.ndarray) -> np.ndarray:
        return np.pad(response, (0, max(self.canvas - len(response), 0)), constant_values=self.eos_id)

    def demonstrations(self) -> Pairs:
        """The chosen or good responses alone, for supervised learning."""
        good = np.flatnonzero(self.rewards[:, 0] == 1)
        return Pairs(
            row=self.row[good],
            prompts=[self.prompts[index] for index in good],
            responses=[self.responses[index][:1] for index in good],
            rewards=np.ones((len(good), 1)),
            mask_id=self.mask_id,
            eos_id=self.eos_id,
            canvas=self.canvas,
            phase=Phase.SFT,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hex of rows, tokens and rewards, so of data and tokenizer together."""
        facts = [len(self), self.group_size, self.mask_id, self.eos_id, self.canvas, self.phase.number]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(self.row.tobytes())
        digest.update(self.rewards.tobytes())
        for prompt, responses in zip(self.prompts, self.responses, strict=True):
            for part in (prompt, *responses):
                digest.update(len(part).to_bytes(4, "big") + part.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class PairOrder:
    """Which pairs a step trains on: every epoch goes through all pairs once in an order of its own.

    The pairs of an epoch are spread over its steps as evenly as possible, so no batch is much smaller than the others.

    Args:
        noise_plans: epoch e looks through the noise of plan e modulo this; 0 for new noise every epoch.
    """

    num_pairs: int
    pairs_per_step: int
    noise_plans: int
    noise: Noise
    _last: list[Any] = field(default_factory=lambda: [-1, []], compare=False)  # the epoch that was asked for last, and its steps

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_pairs // self.pairs_per_step)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each step of an epoch (counted from 0), in ascending order within a step."""
        order = np.argsort(self.noise.uniform("data/pairs/order", self.num_pairs, epoch=epoch), kind="stable")
        edges = [self.num_pairs * place // self.steps_per_epoch for place in range(self.steps_per_epoch + 1)]
        return [np.sort(order[first:last]) for first, last in itertools.pairwise(edges)]

    def step(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, indices of pairs) of a step (counted from 1)."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._last[0] != epoch:
            self._last[:] = [epoch, self.epoch(epoch)]
        return epoch, self._last[1][place]

    def plan(self, epoch: int) -> int:
        """The noise plan of an epoch."""
        return epoch % self.noise_plans if self.noise_plans else epoch

    def needed(self, total_steps: int) -> dict[int, int]:
        """How many steps of `epoch(plan)`, from the front, a run of `total_steps` needs of each noise plan."""
        epochs, rest = divmod(total_steps, self.steps_per_epoch)
        wanted = dict.fromkeys(range(min(epochs, self.noise_plans)), self.steps_per_epoch)
        return wanted | ({epochs: rest} if rest and epochs < self.noise_plans else {})


def preference_source(recipe: Recipe) -> tuple[ModuleType, Any]:
    """The module that reads the preference data of a recipe and its Config: `pairs.data`, or the data of a task of that kind.

    Raises:
        KeyedError: an option is unknown or has a wrong value.
    """
    module = load_part("tasks", "preferences" if recipe.pairs.data else recipe.task.name)
    return module, part_config(module, recipe.pairs.data or recipe.task.train)


def pair_order(recipe: Recipe, num_pairs: int) -> PairOrder:
    """The order of a recipe's pairs. Noise is new in every epoch unless `fresh_views` is `epoch` or `never`."""
    plans = {"epoch": recipe.pairs.noise_plans, "never": 1}.get(recipe.algorithm.fresh_views, 0)
    return PairOrder(num_pairs, recipe.algorithm.prompts_per_step, plans, Noise(recipe.run.seed))


def encode(
    preferences: Sequence[Preference], tokenizer: Any, max_tokens: int, full: int = 0, canvas: int = 0, phase: Phase = Phase.PAIRS
) -> tuple[Pairs, list[BadRow]]:
    """Tokens of preferences, and the rows that are unusable as tokens: too long, equal, or with the mask token in them.

    Args:
        max_tokens: of prompt and response together.
        full: tokens of a response that fills the sampler's canvas and so has no EOS, as in rollouts; 0 where nothing is sampled.
        canvas: see `Pairs`.
    """
    prompts, bad = _encoded_prompts(preferences, tokenizer)
    texts = [text for one in preferences for text in one.responses]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else iter(())
    kept: list[tuple[Preference, np.ndarray, tuple[np.ndarray, ...]]] = []
    for preference, prompt in zip(preferences, prompts, strict=True):
        end = answer_end(tokenizer, preference.prompt)
        responses = tuple(_ended(next(encoded), end, full) for _ in preference.responses)
        if prompt is None:
            continue
        reason = _unusable(prompt, responses, end, tokenizer, max_tokens, canvas)
        if reason:
            bad.append(BadRow(preference.number, reason))
        else:
            kept.append((preference, prompt, responses))
    pairs = Pairs(
        row=np.array([preference.row for preference, *_ in kept], dtype=np.int64),
        prompts=[prompt for _, prompt, _ in kept],
        responses=[responses for *_, responses in kept],
        rewards=np.array([preference.rewards for preference, *_ in kept], dtype=np.float64),
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        canvas=canvas,
        phase=phase,
    )
    return pairs, bad


def _encoded_prompts(preferences: Sequence[Preference], tokenizer: Any) -> tuple[list[np.ndarray | None], list[BadRow]]:
    """Prompts as tokens; None where the tokenizer cannot encode one, which is a bad row."""
    try:
        return list(encode_prompts(tokenizer, [one.prompt for one in preferences])), []
    except DataError:
        prompts: list[np.ndarray | None] = []
        bad = []
        for preference in preferences:
            try:
                prompts += encode_prompts(tokenizer, [preference.prompt])
            except DataError as error:
                prompts.append(None)
                bad.append(BadRow(preference.number, str(error)))
        return prompts, bad


def _ended(tokens: list[int], end: list[int], full: int) -> np.ndarray:
    """int32 [L], a response with what follows an answer, as far as a sampler's canvas of `full` tokens goes."""
    ended = [*tokens, *end]
    return np.array(ended[:full] if full and len(tokens) <= full else ended, dtype=np.int32)


def _unusable(
    prompt: np.ndarray, responses: tuple[np.ndarray, ...], end: list[int], tokenizer: Any, max_tokens: int, canvas: int
) -> str | None:
    """Why a row cannot be trained on, in words; None when it can. `end` follows each response."""
    longest = len(prompt) + max(canvas, *map(len, responses))
    if longest > max_tokens:
        return f"{longest} tokens with the end of the response, the limit is {max_tokens}"
    if len(responses) == 2 and np.array_equal(*responses):
        return "chosen and rejected have the same tokens"
    if any(response[0] in end for response in responses):
        return "a response has no tokens"
    if canvas and max(map(len, responses)) > canvas:
        return f"a response has {max(map(len, responses))} tokens with its end, the canvas has {canvas} (sampler.length)"
    everything = np.concatenate([prompt, *responses])
    if (everything == tokenizer.mask_token_id).any():
        return f"the text holds the mask token {tokenizer.mask_token}"
    if tokenizer.unk_token_id is not None and (everything == tokenizer.unk_token_id).any():
        return f"the text has a word outside the tokenizer's vocabulary of {len(tokenizer)}"
    return None


def cache_folder(recipe: Recipe) -> Path | None:
    """Where the estimates of a recipe's reference are kept; None when they are not.

    Only a frozen reference that looks through noise which returns (`fresh_views: epoch` or `never`) has estimates to keep.
    """
    asked, algorithm = recipe.pairs.reference_cache, recipe.algorithm
    if asked == "none" or algorithm.reference != "frozen" or algorithm.fresh_views not in ("epoch", "never"):
        return None
    return Path(recipe.run.output_dir) / "reference_cache" if asked == "auto" else Path(asked)


ROW_BITS = 24  # of the row field of a uid
