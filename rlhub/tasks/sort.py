"""Sort digits: the prompt is a row of digits, the answer the same digits in ascending order.

Demonstrations are a mixture: ascending with probability `correct_fraction`, else descending or the even digits before the odd ones (each
ascending). A model fine-tuned on them does all three, and reinforcement learning has to concentrate on the one that the reward verifies.
So this task shows the re-weighting of what the model can do already, not a new skill.

Rows are held out by multiset: no row of training digits is a permutation of a row of test digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rlhub.noise import Noise, Stream
from rlhub.tasks import Split, Task, first_accepted, first_distinct, held_out
from rlhub.tasks._vocabulary import word_level
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Config:
    digits: int = 8  # per prompt
    correct_fraction: float = 0.3  # of the demonstrations
    test_size: int = 512  # distinct prompts of the test split

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits must be at least 1, got {self.digits}")
        if not 0 <= self.correct_fraction <= 1:
            raise ValueError(f"correct_fraction must be in [0, 1], got {self.correct_fraction}")


def build(config: Config, split: Split, seed: int) -> Task:
    """An infinite train split, or `test_size` distinct test prompts. Columns: `answer`."""
    noise = Noise(seed)
    draw = partial(_draw, noise.stream(f"data/sort/{split}"), config.digits, split == "test")
    example = partial(_example, noise.stream(f"data/sort/{split}/demonstration"), config.correct_fraction)
    if split == "train":
        return Task("sort", split, f"generated, rows of {config.digits} digits", lambda index: example(index, draw(index)))
    rows = first_distinct(draw, config.test_size, f"held-out rows of {config.digits} digits")
    return Task("sort", split, f"generated, {len(rows)} held-out problems", lambda index: example(index, rows[index]), len(rows))


def tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """One token per digit."""
    return word_level([str(digit) for digit in range(10)])


def is_held_out(digits: tuple[int, ...]) -> bool:
    """Whether rows of these digits, in any order, are test rows."""
    return held_out(_text(sorted(digits)), HELD_OUT_ONE_IN)


def _draw(stream: Stream, size: int, test: bool, uid: int) -> tuple[int, ...]:
    def attempt(draw: int) -> tuple[int, ...] | None:
        digits = tuple((stream.uniform(size, uid=uid, draw=draw) * 10).astype(int).tolist())
        return digits if is_held_out(digits) == test else None

    return first_accepted(attempt, f"{'test' if test else 'training'} row of {size} digits")


def _example(stream: Stream, correct_fraction: float, index: int, digits: tuple[int, ...]) -> Example:
    ascending = sorted(digits)
    u = stream.uniform(1, uid=index)[0]
    if u < correct_fraction:
        demonstration = ascending
    elif u < (1 + correct_fraction) / 2:
        demonstration = ascending[::-1]
    else:
        demonstration = sorted(digits, key=lambda digit: (digit % 2, digit))
    return Example(index, _text(digits), {"answer": _text(ascending)}, _text(demonstration))


def _text(digits: tuple[int, ...] | list[int]) -> str:
    return " ".join(map(str, digits))
