r"""Mathematics: is the final answer of the completion equal to the gold answer?

The answer is found by `rewards.answers.final_answer` (`\boxed{}`, `####`, `<answer>`, "the answer is", "A:", last number in prose).
Numbers, with thousands, currency, percent, units, fractions and LaTeX around them, are compared exactly by `rewards.answers.numbers`;
lists, sets, tuples, intervals and assignments element by element; everything symbolic by `rewards.answers.symbolic`. Deadlines are the
reward pool's business; expressions whose evaluation could explode are not evaluated.

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
from rewards.answers.final_answer import MAX_ANSWER, Found, boxed, final_answer
from rewards.answers.numbers import Number, first_number, last_number, parse_number, same_number, tidy
from rewards.answers.symbolic import FUNCTIONS, RELATION, VARIABLE, NotEvaluated, symbolically_equal
from rewards.answers.wording import interval_in_words, without_wording
from rlhub.types import RewardResult

MAX_DEPTH = 7  # of brackets
MAX_PARTS = 50  # elements of a list

_NAME = re.compile(r"\(?([a-zA-Z](?:_\{?\w\}?)?(?:\([a-z](?:,\s*[a-z])*\))?)\s*(?::?=|\\in(?![a-z]))\s*(?!=)(.+)", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/()$%^{}]|\\times|\\cdot|\\div|\\frac")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:]\s|$)")

COLUMNS = ("answer",)


@dataclass(frozen=True)
class Config:
    """No options."""


@dataclass(frozen=True)
class Answer:
    """An answer that was read: `number` for a plain number, `parts` for several in `kind` (list, set, union, ":", or brackets as "(]").

    Of a named value as `y = 2x + 1`, `text` is the value, `name` is y and `equation` the whole.
    """

    text: str
    number: Number | None = None
    kind: str = ""
    parts: tuple[Answer, ...] = ()
    name: str = ""
    equation: str = ""


class Unreadable(ValueError):
    """A text that is no answer."""


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
    if _is_words(gold.text) and _key(final_answer(completion, remarks=True).text or "") == _key(gold.text):
        return RewardResult(1.0, detail=f"answer {gold.text}")
    found = final_answer(completion)
    if found.text is None:
        return RewardResult(0.0, "unparsed", found.reason)
    shown = f"answer {' '.join(found.text.split())[:80]}"
    try:
        return RewardResult(float(_is_right(gold, found, completion)), detail=shown)
    except (Unreadable, NotEvaluated) as error:
        return RewardResult(0.0, "unparsed", f"{error}: {shown}")


def _is_right(gold: Answer, found: Found, completion: str) -> bool:
    """Whether the answer that was found is the gold one, by the structure of the latter: a number may stand in a phrase, an interval may be
    in words, one answer may stand in several boxes.

    Raises:
        Unreadable, NotEvaluated: it is no mathematics, or too large to be evaluated.
    """
    text = found.text or ""
    if (gold.kind and gold.kind[0] in "([u") or RELATION.search(gold.text):
        whole = text if found.form != "number" or len(completion) > MAX_ANSWER else completion
        text = interval_in_words(_bare(tidy(whole))) or text
    answer = read(text)
    if gold.number is not None and answer.number is None:
        if found.form == "whole" and not re.search(r"\d", text):
            raise Unreadable("no number")
        answer = _as_number(answer, found.form)
    if found.form == "boxed" and answer.kind == "list" and not gold.kind:
        return len(re.findall(r"\\f?boxed", completion)) > 1 and all(equal(gold, part) for part in answer.parts)
    return equal(gold, answer)


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


def read(text: str) -> Answer:
    """An answer in its structure: number, named value, several values, or an expression as text.

    Example:
        >>> [part.text for part in read("x = 2 or x = 3").parts]
        ['2', '3']

    Raises:
        Unreadable: nothing is there, the brackets do not match, or it is too long.
    """
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"longer than {MAX_ANSWER} characters")
    plain = _bare(without_wording(_bare(tidy(text))))
    if not re.search(r"[\w°]|\\[a-z]", plain):
        raise Unreadable("empty")
    _check_brackets(plain)
    return _read(plain)


def _read(text: str) -> Answer:
    """An answer's text as what is compared: a number, a list, a text, else an expression; of an equation what it says of its last side."""
    text = re.sub(r"\b(\d{1,2}):00(?=\s*[ap]\.?m)", r"\1", _bare(text), flags=re.IGNORECASE)
    number = parse_number(text)
    if number is not None:
        return Answer(text, number)
    sides = [side.strip() for side in _split(text, ["="])]
    if len(sides) > 1 and not _ARITHMETIC.sub("", "".join(sides[:-1])):
        last = _read(sides[-1])
        if last.number or last.kind or not VARIABLE.search(sides[-1]):
            return last
        if len(sides) == 2:
            return _read(f"{sides[1]}={sides[0]}") if _NAME.fullmatch(f"{sides[1]}={sides[0]}") else Answer(text)
    parts = _listed(text)
    if parts:
        return Answer(text, kind="list", parts=tuple(map(_read, parts)))
    named = _NAME.fullmatch(text)
    if named and not re.search(r"[=<>]", named[2]):
        value = _read(named[2])
        return Answer(value.text, value.number, value.kind, value.parts, named[1].split("(")[0], text)
    sides = _split(text, [r"\cup"])
    if len(sides) > 1:
        return Answer(text, kind="union", parts=tuple(map(_read, sides)))
    if text.count(r"\pm") == 1:
        return Answer(text, kind="list", parts=tuple(_read(text.replace(r"\pm", sign).strip().removeprefix("+")) for sign in "+-"))
    clock = re.fullmatch(r"(\d+(?:\s*:\s*\d+)+)\s*(?:([ap])\.?m)?", text, re.IGNORECASE)
    if clock:
        return Answer(text, kind=":", parts=tuple(map(_read, clock[1].split(":"))), name=(clock[2] or "").lower())
    return _bracketed(text) or Answer(text)


def _listed(text: str) -> list[str]:
    """The elements of a list without brackets; empty for anything else. A comma before three digits belongs to the number."""
    guarded = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "\0", text)
    parts = [part.replace("\0", ",").strip() for part in _split(guarded, [", and ", ", or ", " and ", " or ", ",", ";"])]
    return parts if 1 < len(parts) <= MAX_PARTS and all(parts) else []


def _bracketed(text: str) -> Answer | None:
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    inner = text[2:-2] if is_set else text[1:-1]
    if not is_set and (len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or _depth_falls_to_zero(text)):
        return None
    parts = [part.strip() for part in _split(inner, [",", ";"])]
    if len(parts) > MAX_PARTS or not all(parts):
        return None
    if len(parts) == 1:
        return _read(inner) if is_set or text[0] + text[-1] == "()" else None
    return Answer(text, kind="set" if is_set else text[0] + text[-1], parts=tuple(map(_read, parts)))


def equal(gold: Answer, answer: Answer) -> bool:
    """Whether two answers are the same.

    Raises:
        Unreadable: `answer` is no mathematics, or too large to be evaluated.
    """
    if gold.name and answer.name and gold.name != answer.name:
        return _is_open(gold) and _is_open(answer) and symbolically_equal(gold.equation, answer.equation)
    equations = [side.equation or side.text for side in (gold, answer)]
    if all(equation.count("=") == 1 for equation in equations) and not (gold.name and answer.name) and not (gold.kind or answer.kind):
        return symbolically_equal(*equations)
    if _key(gold.text) == _key(answer.text):
        return True
    if gold.number is not None and answer.number is not None:
        return same_number(gold.number, answer.number)
    if gold.kind and answer.kind:
        if gold.kind == answer.kind and gold.kind not in ("list", "set", "union"):
            return _in_order(gold, answer)
        if gold.kind[0] in "([" or answer.kind[0] in "([":
            return "list" in (gold.kind, answer.kind) and "()" in (gold.kind, answer.kind) and _in_order(gold, answer)
        return ":" not in (gold.kind, answer.kind) and _in_any_order(gold, answer)
    if (gold.kind or answer.kind) and not (RELATION.search(gold.text) or RELATION.search(answer.text)):
        return False
    choice = _CHOICE.match(answer.text)
    if choice and re.fullmatch(r"[A-J]", gold.text):
        return choice[1] == gold.text
    if _is_words(gold.text) or _is_words(answer.text):
        return False
    return symbolically_equal(gold.text, answer.text)


def _is_open(answer: Answer) -> bool:
    """Whether a named value has variables in it, so that it is an equation between them."""
    constants = re.sub(r"(?<![a-zA-Z])[ei](?![a-zA-Z])", "", answer.text)
    return bool(answer.equation) and answer.number is None and VARIABLE.search(constants) is not None


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
    if form in ("whole", "math") or several or not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", answer.text):
        return answer
    pick: Callable[[str], str | None] = first_number if re.match(r"[-$€£\\]{0,3}\d", answer.text) else last_number
    number = pick(answer.text)
    return Answer(number, parse_number(number)) if number else answer


def _check_brackets(text: str) -> None:
    depth = 0
    for brace in re.findall(r"\\[{}]|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            break
    if depth:
        raise Unreadable("unbalanced braces")
    level = deepest = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        deepest = max(deepest, level)
    if deepest > MAX_DEPTH:
        raise Unreadable(f"nested deeper than {MAX_DEPTH}")


def _split(text: str, separators: list[str]) -> list[str]:
    """`text` cut at the separators that stand outside all brackets."""
    pattern = re.compile("|".join(map(re.escape, separators)))
    parts, start, place, depth = [], 0, 0, 0
    while place < len(text):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
        elif depth == 0 and (found := pattern.match(text, place)):
            parts.append(text[start:place])
            start = place = found.end()
            continue
        place += 1
    return [*parts, text[start:]]


def _depth_falls_to_zero(text: str) -> bool:
    """Whether the first bracket closes before the end, as in (a)(b)."""
    depth = 0
    for character in text[:-1]:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return True
    return False


def _bare(text: str) -> str:
    """Without the white space, dollar signs, braces and full stops around an answer."""
    while True:
        before = text
        text = text.strip().rstrip(".,;?").strip().strip("*_`").strip()
        if len(text) > 1 and text[0] == text[-1] == "$":
            text = text.strip("$")
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), (r"\$", "")):
            if text.startswith(opening) and text.endswith(closing) and opening != r"\$":
                text = text[2:-2]
        if text.startswith("{") and text.endswith("}") and not _depth_falls_to_zero(text):
            text = text[1:-1]
        text = re.sub(r"^(?:\\approx|\\therefore|=|:)\s*", "", text)
        if text == before:
            return text


def _key(text: str) -> str:
    """What two spellings of the same answer share: no spaces, and no case where there are words."""
    key = re.sub(r"[\s$]|\\(?=[$ ])|(?<=\d),(?=\d{3}(?!\d))", "", text)
    key = re.sub(r"([_^])\{(\w)\}", r"\1\2", key)
    if re.fullmatch(r"\([A-Za-z]\)", key):
        key = key[1]
    return key.lower() if _is_words(text) else key


def _is_words(text: str) -> bool:
    return not re.search(r"[\\^=<>+*/]|\d", text) and re.search(r"[a-zA-Z]{2,}", text) is not None and not FUNCTIONS.search(text)
