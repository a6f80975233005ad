r"""Mathematics: is the final answer of the completion equal to the gold answer?

The answer is found by `rewards.answers.final_answer` (`\boxed{}`, `####`, `<answer>`, "the answer is", "A:", last number in prose).
Numbers, with thousands, currency, percent, units, fractions and LaTeX around them, are compared exactly by `rewards.answers.numbers`;
lists, sets, tuples, intervals and assignments element by element; expressions and equations exactly by `rewards.answers.symbolic`.
Deadlines are the reward pool's business; expressions whose evaluation could explode are not evaluated.

Columns: `answer`, the gold answer: text or a number; a worked solution that ends in `#### 42` or `\boxed{42}` is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as package_version
from typing import Any

from rewards import Prompt, column
from rewards.answers.final_answer import MAX_ANSWER, MAX_PROSE, Found, boxed, final_answer
from rewards.answers.numbers import first_number, last_number, parse_number, same_number
from rewards.answers.reading import Answer, is_words, key, read
from rewards.answers.symbolic import RELATION, Unreadable, equals_number, refusal, symbolically_equal
from rewards.answers.words import choice
from rlhub.types import RewardResult

__all__ = ["Config", "equal", "grade", "prepare", "read", "read_gold", "refusal", "version"]

COLUMNS = ("answer",)


@dataclass(frozen=True)
class Config:
    """No options."""


def prepare(config: Config) -> None:
    """Loads sympy and math-verify, a second on a slow machine."""
    symbolically_equal(r"\sqrt{8}", r"2\sqrt{2}")


def version(config: Config) -> str:
    """The release of math-verify, on which symbolic verdicts depend."""
    return package_version("math-verify")


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """1 for an equal answer, else 0; `unparsed` where the completion has none that can be read.

    Raises:
        ValueError: the gold answer is missing or cannot be read.
    """
    gold = read_gold(column(row, "answer"))
    found = _found(completion, gold)
    if found.text is None:
        return RewardResult(0.0, "unparsed", found.reason)
    shown = f"answer {' '.join(found.text.split())[:80]}"
    try:
        answer = read(found.text, words=gold.number is None)
        if gold.number is not None and answer.number is None:
            if found.form == "whole" and not re.search(r"\d", found.text):
                raise Unreadable("no number")
            answer = _as_number(answer, found.form)
        return RewardResult(float(equal(gold, answer)), detail=shown)
    except Unreadable as error:
        return RewardResult(0.0, "unparsed", f"{error}: {shown}")


def _found(completion: str, gold: Answer) -> Found:
    """The answer of the completion; where the gold is the letter of a choice, also a letter in prose."""
    found = final_answer(completion, numeric=gold.number is not None)
    if found.form == "number" and (gold.kind == "union" or gold.kind[:1] in ("(", "[")):  # "between 2 and 5"
        return Found(re.split(r"[.!?。](?:\s|$)|\n", completion[-MAX_ANSWER:].rstrip(" .!。\n"))[-1], "sentence")
    if re.fullmatch(r"\(?[A-J]\)?", gold.text) and found.form not in ("boxed", "hash", "tags"):
        letter = choice((found.text if found.form == "phrase" else None) or completion[-MAX_PROSE:]) or choice(completion[-MAX_PROSE:])
        return Found(letter, "phrase") if letter else found
    return found


def read_gold(answer: Any) -> Answer:
    """The gold answer, read once per text.

    Raises:
        ValueError: it is no text or number, empty, unbalanced or too long.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the column 'answer' must be text or a number, got {type(answer).__name__}")
    return _read_gold(str(answer))


@lru_cache(maxsize=1 << 16)
def _read_gold(answer: str) -> Answer:
    text: str | None = answer
    if "####" in answer:
        text = answer.rpartition("####")[2]
    elif "\\boxed" in answer:
        text = boxed(answer)
    try:
        return read(text or "")
    except Unreadable as error:
        raise ValueError(f"the gold answer {answer[-80:]!r} cannot be read: {error}") from error


def equal(gold: Answer, answer: Answer) -> bool:
    """Whether two answers are the same.

    Raises:
        Unreadable: `answer` is no mathematics, or too large to be evaluated.
    """
    if gold.kind == "~" or answer.kind == "~":
        return equal(_exact_or_rounded(gold, answer), _exact_or_rounded(answer, gold))
    if _differently_named(gold, answer) or _differently_qualified(gold, answer):
        return False
    if gold.number is not None and answer.number is not None:
        return same_number(gold.number, answer.number)
    if key(gold.text) == key(answer.text) and gold.kind == answer.kind:
        return True
    if gold.kind and answer.kind:
        return _same_parts(gold, answer)
    if answer.kind == "list" and all(equal(gold, part) for part in answer.parts):
        return True
    if (gold.kind or answer.kind) and not (RELATION.search(gold.text) or RELATION.search(answer.text)):
        return False
    if re.fullmatch(r"[A-J]", gold.text) and re.match(r"\(?[A-J](?:\)|[.:]\s|$)", answer.text):
        return answer.text.strip("(")[0] == gold.text
    equations = _equation(gold, answer), _equation(answer, gold)
    if equations != (gold.text, answer.text) and symbolically_equal(*equations):
        return True
    if is_words(gold.text) or is_words(answer.text):
        return False
    if gold.number is not None:
        return equals_number(gold.number, answer.text, answer.text)
    if answer.number is not None:
        return equals_number(answer.number, gold.text, answer.text)
    return symbolically_equal(gold.text, answer.text)


def _exact_or_rounded(answer: Answer, other: Answer) -> Answer:
    """Of an answer that is given exactly and rounded the part to compare with `other`."""
    if answer.kind != "~":
        return answer
    return answer.parts[1] if other.number is not None and other.number.place else answer.parts[0]


def _differently_named(gold: Answer, answer: Answer) -> bool:
    return bool(gold.name and answer.name) and key(gold.name) != key(answer.name)


def _differently_qualified(gold: Answer, answer: Answer) -> bool:
    """Whether both say what they hold for and these are different inequalities."""
    if not (RELATION.search(gold.qualifier) and RELATION.search(answer.qualifier)):
        return False
    return not equal(read(gold.qualifier), read(answer.qualifier))


def _equation(answer: Answer, other: Answer) -> str:
    """The text of an answer; with its name where it is compared with an equation."""
    return f"{answer.name} = {answer.text}" if answer.name and not other.name and "=" in other.text else answer.text


def _same_parts(gold: Answer, answer: Answer) -> bool:
    kinds = (gold.kind, answer.kind)
    if gold.kind == answer.kind and gold.kind not in ("list", "set", "union"):
        return _in_order(gold, answer)
    if gold.kind[0] in "([" or answer.kind[0] in "([":
        return "list" in kinds and "()" in kinds and _in_order(gold, answer)
    return ":" not in kinds and _in_any_order(gold, answer)


def _in_order(gold: Answer, answer: Answer) -> bool:
    return len(gold.parts) == len(answer.parts) and all(map(equal, gold.parts, answer.parts))


def _in_any_order(gold: Answer, answer: Answer) -> bool:
    left = list(answer.parts)
    for part in gold.parts:
        match = next((index for index, other in enumerate(left) if equal(part, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left or all(any(equal(part, other) for part in gold.parts) for other in left)


def _as_number(answer: Answer, form: str) -> Answer:
    """For a numeric gold: the number of a phrase such as "18 dollars, 3 for each" or "she makes 18 a day"."""
    several = answer.kind and all(part.number is not None for part in answer.parts)
    if form in ("whole", "math") or several or not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}|[\u0400-\u04ff\u3040-\u9fff]{2,}", answer.text):
        return answer
    pick: Callable[[str], str | None] = first_number if re.match(r"[-$€£\\]{0,3}\d", answer.text) else last_number
    number = pick(answer.text)
    return Answer(number, parse_number(number)) if number else answer
