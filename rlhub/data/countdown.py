"""Countdown: reach a target with the given numbers, each used exactly once.

`published` is the task of d1 and ESPO: one chat turn that asks for reasoning and an answer in tags. `short` is the same task for a small
model with a vocabulary of its own: `3 7 12 = 16 :` is answered by `12 + 7 - 3`, no parentheses, the usual precedence.

Generated problems come from random expressions over numbers drawn uniformly. Training and test problems differ in their numbers (short) or
in their numbers with the target (published). With `path` the test problems are those of the file and training avoids them; without it, a
hash holds out one problem in ten. Give `path` to both splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rewards.countdown import evaluate
from rlhub.data import Split, Task, first_accepted, first_distinct, held_out
from rlhub.data.jsonl import read_jsonl
from rlhub.errors import DataError
from rlhub.noise import Noise, Stream
from rlhub.tokenizers import Prompt, word_level
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT_ONE_IN = 10
STYLES = ("published", "short")
OPERATORS = "+-*/"

INSTRUCTION = """\
Write your answer in this format:
<reasoning>
how you get there
</reasoning>
<answer>
the expression and nothing else
</answer>

Find an arithmetic expression that uses each of the numbers {numbers} exactly once and has the value {target}. \
You may use {operators} and parentheses. For example, the numbers [2, 3, 4] reach 5 with 2*4-3."""


class Problem(NamedTuple):
    numbers: tuple[int, ...]
    target: int
    expression: str | None = None  # one that is right; None for problems of a file


@dataclass(frozen=True)
class Config:
    style: str = "published"  # published | short
    numbers: int = 3  # per problem
    max_number: int = 100  # numbers are drawn from 1..max_number
    max_target: int = 100  # targets lie in 1..max_target
    operators: str = OPERATORS
    path: str | None = None  # JSON lines {"input": "30,100,93", "output": "23"}: the test problems
    correct_fraction: float = 1.0  # of the demonstrations; the others are well-formed and have another value
    test_size: int = 512  # problems of the test split when it is generated

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if not self.operators or not set(self.operators) <= set(OPERATORS):
            raise ValueError(f"operators must be some of {OPERATORS}, got {self.operators!r}")
        if min(self.numbers - 1, self.max_number, self.max_target) < 1:
            raise ValueError(f"numbers must be at least 2 and the maxima 1, got {self.numbers}, {self.max_number}, {self.max_target}")
        if not 0 <= self.correct_fraction <= 1:
            raise ValueError(f"correct_fraction must be in [0, 1], got {self.correct_fraction}")


def build(config: Config, split: Split, seed: int) -> Task:
    """An infinite train split, or the test problems. Columns: `numbers` (list of int), `target` (int).

    Raises:
        DataError: the file is missing or malformed, or the options allow no problems.
    """
    published = [] if config.path is None else read_problems(config.path)
    noise = Noise(seed)
    demonstrate = partial(_demonstration, noise.stream(f"data/countdown/{split}/demonstration"), config)

    def example(index: int, problem: Problem) -> Example:
        columns = {"numbers": list(problem.numbers), "target": problem.target}
        prompt, answer = render(problem, demonstrate(index, problem), config)
        return Example(index, prompt, columns, answer)

    draw = partial(_draw, noise.stream(f"data/countdown/{split}"), config, _membership(config, published, split))
    if split == "train":
        return Task("countdown", split, f"generated, {config.style} style", lambda index: example(index, draw(index)))
    if published:
        problems = published
        description = f"published {config.path.replace(chr(92), '/').rsplit('/', 1)[-1]}, {len(problems)} problems"
    else:
        problems = first_distinct(draw, config.test_size, "held-out problems")
        description = f"generated, {len(problems)} held-out problems"
    return Task("countdown", split, description, lambda index: example(index, problems[index]), len(problems))
