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
from functools import lru_cache, partial
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rewards.countdown import evaluate
from rlhub.errors import DataError
from rlhub.noise import Noise, Stream
from rlhub.tasks import Split, Task, first_accepted, first_distinct, held_out
from rlhub.tasks._vocabulary import word_level
from rlhub.tasks.jsonl import read_jsonl
from rlhub.types import Example, Prompt

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
    answers: str = "random"  # right demonstrations. random: any right expression | first: always the first one of an enumeration
    mistakes: str = "random"  # wrong ones. random: any expression | descending: numbers in descending order | flipped: an operator off
    test_size: int = 512  # problems of the test split when it is generated

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if self.answers not in ("random", "first"):
            raise ValueError(f"answers must be random or first, got {self.answers!r}")
        if self.mistakes not in ("random", "descending", "flipped"):
            raise ValueError(f"mistakes must be random, descending or flipped, got {self.mistakes!r}")
        if (self.answers, self.mistakes) != ("random", "random") and (self.style != "short" or self.numbers > 4):
            raise ValueError("answers: first and mistakes other than random need style: short and at most 4 numbers")
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
        description = f"published {Path(config.path).name}, {len(problems)} problems"
    else:
        problems = first_distinct(draw, config.test_size, "held-out problems", key=partial(identity, style="published"))
        description = f"generated, {len(problems)} held-out problems"
    return Task("countdown", split, description, lambda index: example(index, problems[index]), len(problems))


def tokenizer(config: Config) -> PreTrainedTokenizerFast | None:
    """Numbers, operators, `=` and `:` for the short style; None for the published one, which is text for the model's tokenizer."""
    if config.style == "published":
        return None
    numbers = range(max(config.max_number, config.max_target) + 1)
    return word_level([*map(str, numbers), *config.operators, "=", ":"])


def render(problem: Problem, expression: str | None, config: Config) -> tuple[Prompt, str | None]:
    """The prompt of a problem and the completion that gives `expression` (None where there is none): the whole format of both styles."""
    if config.style == "short":
        return f"{' '.join(map(str, problem.numbers))} = {problem.target} :", expression
    operators = " ".join(config.operators)
    prompt = INSTRUCTION.format(numbers=list(problem.numbers), target=problem.target, operators=operators)
    answer = expression and f"<reasoning>\n{expression} = {evaluate(expression)}\n</reasoning>\n<answer>\n{expression}\n</answer>"
    return [{"role": "user", "content": prompt}], answer


def identity(problem: Problem, style: str) -> str:
    """What makes two problems the same in a split: the numbers in any order, and the target too in the published style."""
    numbers = ",".join(map(str, sorted(problem.numbers)))
    return numbers if style == "short" else f"{numbers}={problem.target}"


def read_problems(path: str) -> list[Problem]:
    """The problems of a file in the published format.

    Raises:
        DataError: the file is missing or a row is malformed.
    """
    problems = []
    for number, row in read_jsonl(path):
        try:
            problems.append(Problem(tuple(int(value) for value in str(row["input"]).split(",")), int(row["output"])))
        except (KeyError, ValueError) as error:
            raise DataError(f'{path}, row {number}: expected {{"input": "30,100,93", "output": "23"}}, got {row}') from error
    if not problems:
        raise DataError(f"{path}: no problems")
    return problems


def _membership(config: Config, published: list[Problem], split: Split) -> Callable[[Problem], bool]:
    """Whether a generated problem may appear in this split."""
    if published:
        excluded = {identity(problem, config.style) for problem in published}
        return lambda problem: identity(problem, config.style) not in excluded
    return lambda problem: held_out(identity(problem, config.style), HELD_OUT_ONE_IN) == (split == "test")


def _draw(stream: Stream, config: Config, belongs: Callable[[Problem], bool], uid: int) -> Problem:
    def attempt(draw: int) -> Problem | None:
        u = stream.uniform(4 * config.numbers, uid=uid, draw=draw)
        numbers = tuple((u[: config.numbers] * config.max_number + 1).astype(int).tolist())
        expression = _expression(u[config.numbers :], numbers, config)
        value = evaluate(expression)
        if value is None or value.denominator != 1 or not 1 <= value <= config.max_target:
            return None
        problem = Problem(numbers, int(value), expression)
        return problem if belongs(problem) else None

    return first_accepted(attempt, "problem")


def _demonstration(stream: Stream, config: Config, index: int, problem: Problem) -> str | None:
    """The text to imitate for one problem, right with probability `correct_fraction`; None where the published problem has no solution.

    Raises:
        DataError: no wrong expression was found.
    """
    if problem.expression is None:
        return None
    answer = problem.expression
    if config.answers == "first":
        answer = first_right(problem.numbers, problem.target, config.operators)
    if stream.uniform(1, uid=index)[0] < config.correct_fraction:
        return answer
    if config.mistakes == "flipped":
        return flipped(answer, problem.target, config.operators)

    def attempt(draw: int) -> str | None:
        u = stream.uniform(3 * config.numbers, uid=index, draw=draw + 1)
        if config.mistakes == "descending":
            u[: config.numbers] = -np.array(problem.numbers)
        expression = _expression(u, problem.numbers, config)
        value = evaluate(expression)
        return expression if value is not None and value != problem.target else None

    return first_accepted(attempt, f"wrong expression over {list(problem.numbers)} with {config.operators}")


@lru_cache(maxsize=1 << 16)
def first_right(numbers: tuple[int, ...], target: int, operators: str) -> str:
    """The first right expression in short style: numbers in the order of the prompt if possible, operators in the order given.

    Raises:
        ValueError: there is none.
    """
    for order in permutations(numbers):
        for signs in product(operators, repeat=len(numbers) - 1):
            expression = " ".join([str(order[0]), *(text for pair in zip(signs, map(str, order[1:]), strict=True) for text in pair)])
            if evaluate(expression) == target:
                return expression
    raise ValueError(f"no expression over {list(numbers)} with {operators} has the value {target}")


@lru_cache(maxsize=1 << 16)
def flipped(expression: str, target: int, operators: str) -> str:
    """A slip: the expression with its last operator replaced so that it misses the target, or an earlier one where that cannot be."""
    tokens = expression.split()
    for place in range(len(tokens) - 2, 0, -2):
        for operator in operators:
            wrong = " ".join([*tokens[:place], operator, *tokens[place + 1 :]])
            if evaluate(wrong) not in (None, target):
                return wrong
    return expression


def _expression(u: np.ndarray, numbers: tuple[int, ...], config: Config) -> str:
    """A random expression over all numbers: `u` `[3 n]` gives their order, the operators and (published style) the parentheses."""
    count = len(numbers)
    parts = [str(numbers[place]) for place in np.argsort(u[:count], kind="stable")]
    operators = [config.operators[int(draw * len(config.operators))] for draw in u[count : 2 * count - 1]]
    if config.style == "short":
        return " ".join([parts[0], *(text for pair in zip(operators, parts[1:], strict=True) for text in pair)])
    for operator, draw in zip(operators, u[2 * count :], strict=False):
        place = int(draw * (len(parts) - 1))
        parts[place : place + 2] = [f"({parts[place]}{operator}{parts[place + 1]})"]
    return parts[0][1:-1]
