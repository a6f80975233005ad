"""Process rewards: a checkpoint scores every step of a completion, and one number is made of the scores.

Steps are the parts of the completion between `separator`s, blank ones left out. `head` says how the checkpoint scores them:

- `token`: a token-classification checkpoint reads the prompt and then each step followed by `marker` (None: the separator), and its
  output at the last token of each marker is the step's score, as TRL's PRMTrainer trains it. The prompt goes through the
  tokenizer's chat template with the assistant's turn begun, where it has one.
- `sequence`: a sequence-classification checkpoint scores each prefix of steps as `rewards.reward_model` would: one forward pass a step.

Scores of steps and ways to reduce them: Lightman et al., "Let's verify step by step" (arXiv 2305.20050). The detail of a result holds
the scores as JSON, `{"steps": [0.9, 0.2]}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewards import Item, Prompt
from rewards.answers.text import Unusable, check_text, plain
from rewards.reward_model import (
    Checkpoint,
    Encoded,
    chat_ids,
    check_labels,
    check_model_options,
    encode,
    fit,
    load,
    messages,
    own_limits,
    scores,
    version,
)
from rlhub.types import RewardResult

__all__ = ["Config", "grade", "grade_batch", "own_limits", "prepare", "version"]

REDUCE = {"min": min, "mean": lambda steps: math.fsum(steps) / len(steps), "product": math.prod, "last": lambda steps: steps[-1]}
HEADS = {"token": "AutoModelForTokenClassification", "sequence": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Config:
    model: str = ""  # checkpoint folder in the Hugging Face layout, or a name on the Hub
    head: str = "token"  # or sequence
    step_separator: str = "\n\n"  # between the steps of a completion
    marker: str | None = None  # what the token head reads after each step; None: the separator
    reduce: str = "min"  # min | mean | product | last
    label: int | None = None  # index whose probability is a step's score; needed where the checkpoint has several labels
    sigmoid: bool = False  # of the logit of a checkpoint with one label
    separator: str | None = None  # between prompt and completion for the sequence head, see rewards.reward_model
    too_long: str = "reject"  # or truncate_left: cut the prompt's first tokens, and say how many in the result's detail
    max_tokens: int | None = None  # of one item; None: what tokenizer and checkpoint allow
    max_batch_tokens: int = 16384  # padded tokens of one forward pass
    dtype: str = "float32"  # or bfloat16
    device: str = "cpu"  # as torch names it
    backend: str = "transformers"  # or vllm, see rewards.reward_model

    def __post_init__(self) -> None:
        check_model_options(self)
        for name, choices in (("head", HEADS), ("reduce", REDUCE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {', '.join(choices)}; got {getattr(self, name)!r}")
        if not self.step_separator:
            raise ValueError("step_separator is empty, give the text between the steps of a completion")
        if self.reduce == "product" and self.label is None and not self.sigmoid:
            raise ValueError("a product needs probabilities: set sigmoid, or label where the checkpoint has several")


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """The reduced score of one completion, see `grade_batch`."""
    return grade_batch([(prompt, completion, row)], config)[0]


def grade_batch(items: Sequence[Item], config: Config) -> list[RewardResult]:
    """One result per item, in order.

    Raises:
        ValueError: the checkpoint cannot be loaded, lacks the head, or does not fit `label` and `sigmoid`.
    """
    checkpoint = load(HEADS[config.head], config)
    check_labels(checkpoint, config)
    read = partial(_read_once if config.head == "token" else _read_prefixes, checkpoint, config)
    results: list[RewardResult] = [RewardResult(math.nan, "rejected")] * len(items)
    read_items: dict[int, tuple[list[Encoded], list[int], int]] = {}
    for index, (prompt, completion, _) in enumerate(items):
        try:
            check_text(prompt, completion)
            steps = [step for step in completion.split(config.step_separator) if step.strip()]
            if not steps:
                raise Unusable("the completion has no step")
            read_items[index] = read(prompt, steps)
        except Unusable as error:
            results[index] = RewardResult(math.nan, "rejected", str(error))
    outputs = iter(checkpoint.outputs([row for rows, _, _ in read_items.values() for row in rows], config.max_batch_tokens))
    for index, (rows, ends, cut) in read_items.items():
        values = [scores(next(outputs), config) for _ in rows]
        steps = values[0][ends].tolist() if config.head == "token" else [value.item() for value in values]
        results[index] = _result(steps, cut, config)
    return results


def prepare(config: Config) -> None:
    """Loads the checkpoint; raises ValueError as `grade_batch` does."""
    check_labels(load(HEADS[config.head], config), config)


def _result(steps: list[float], cut: int, config: Config) -> RewardResult:
    detail = json.dumps({"steps": [round(step, 6) for step in steps]} | ({"prompt_tokens_cut": cut} if cut else {}))
    if not all(map(math.isfinite, steps)):
        return RewardResult(math.nan, "rejected", detail)
    return RewardResult(REDUCE[config.reduce](steps), detail=detail)


def _read_once(checkpoint: Checkpoint, config: Config, prompt: Prompt, steps: list[str]) -> tuple[list[Encoded], list[int], int]:
    """One row with every step, the positions of the steps' last tokens, and how many prompt tokens were cut."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.chat_template:
        ids = chat_ids(tokenizer, messages(prompt), add_generation_prompt=True)
    else:
        ids = tokenizer(plain(prompt))["input_ids"]
    marker = config.step_separator if config.marker is None else config.marker
    begin, ends = len(ids), []
    for step in steps:
        for text in (step, marker):
            ids = ids + tokenizer(text, add_special_tokens=False)["input_ids"]
        ends.append(len(ids) - 1)
    encoded, cut = fit(checkpoint, {"input_ids": ids}, len(ids) - begin, config)
    return [encoded], [end - cut for end in ends], cut


def _read_prefixes(checkpoint: Checkpoint, config: Config, prompt: Prompt, steps: list[str]) -> tuple[list[Encoded], list[int], int]:
    """A row for each prefix of steps; the longest one says how many prompt tokens were cut."""
    prefixes = [config.step_separator.join(steps[: count + 1]) for count in range(len(steps))]
    rows = [encode(checkpoint, prompt, prefix, config) for prefix in prefixes]
    return [encoded for encoded, _ in rows], [], rows[-1][1]
