r"""Mathematics: is the final answer of the completion equal to the gold answer?

The answer is found by `rewards.answers.final_answer` (`\boxed{}`, `####`, `<answer>`, "the answer is", "A:", last number in prose).
Numbers, with thousands, currency, percent, units, fractions and LaTeX around them, are compared exactly by `rewards.answers.numbers`;
lists,
sets, tuples, intervals and assignments element by element; everything symbolic goes to math-verify (Hugging Face), without its alarm, which
works in a main thread only: deadlines are the reward pool's business. Expressions whose evaluation could explode are not evaluated.

Columns: `answer`, the gold answer: text or a number; a worked solution that ends in `#### 42` or `\boxed{42}` is accepted.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as package_version
from typing import Any

from rewards import Prompt, column
from rewards.answers.final_answer import MAX_ANSWER, boxed, final_answer
from rewards.answers.numbers import Number, first_number, last_number, parse_number, same_number, tidy
from rlhub.types import RewardResult

MAX_SYMBOLIC = 200  # characters of an expression that math-verify sees
MAX_DEPTH = 7  # of brackets
MAX_PARTS = 50  # elements of a list
MAX_POWER = 5000  # product of the exponents of an expression
MAX_VARIABLE_POWER = 60  # the same with variables in it

_NAME = re.compile(r"\(?([a-zA-Z](?:_\{?\w\}?)?(?:\([a-z](?:,\s*[a-z])*\))?)\s*(?::?=|\\in(?![a-z]))\s*(?!=)(.+)", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/()$%^{}]|\\times|\\cdot|\\div|\\frac")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:]\s|$)")
_FUNCTIONS = re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|sec|csc|cot|log|ln|exp|arcsin|arccos|arctan|pi|sqrt)(?![a-zA-Z])")
_WORD_UNITS = re.compile(r"(?<=[\d}) ])\s+(?!pi\b|or\b|and\b)[a-zA-Z]{2,}\.?(?:\s*\^\s*\{?[23]\}?)?(?:\s+(?!or\b|and\b)[a-zA-Z]{2,})*$")
_HEAVY = re.compile(r"\\(?:int|sum|prod|lim|oint|iint|bigcup|bigcap|Gamma|zeta)(?![a-zA-Z])|\.\.\.")


_LARGE_FACTORIAL = re.compile(r"!\s*!|[)}\]]\s*!|\d{4}\s*!|\^\{?\s*[^{}]*!|binom(?:\D*\d{4}|.*\^)")
_EXPONENT = re.compile(r"\^\s*(\{(?:[^{}]|\{[^{}]*\})*\}?|\((?:[^()]|\([^()]*\))*\)?|[-\w\\]+)")
_RELATION = re.compile(r"[<>]|\\(?:[gl]e|[gl]t)(?![a-z])")


@dataclass(frozen=True)
class Config:
    """No options."""


@dataclass(frozen=True)
class Answer:
    """An answer that was read: `number` for a plain number, `parts` for several in `kind` (list, set, union, ":", or brackets as "(]")."""

    text: str
    number: Number | None = None
    kind: str = ""
    parts: tuple[Answer, ...] = ()
    name: str = ""


class Unreadable(ValueError):
    """A text that is no answer."""


def prepare(config: Config) -> None:
    """Loads sympy and math-verify, a second on a slow machine."""
    _symbolically_equal(r"\sqrt{8}", r"2\sqrt{2}")


def version(config: Config) -> str:
    """The release of math-verify, on which symbolic verdicts depend."""
    return package_version("math-verify")


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """1 for an equal answer, else 0; `unparsed` where the completion has none that can be read.

    Raises:
        ValueError: the gold answer is missing or cannot be read.
    """
    gold = read_gold(column(row, "answer"))
    found = final_answer(completion)
    if found.text is None:
        return RewardResult(0.0, "unparsed", found.reason)
    shown = f"answer {' '.join(found.text.split())[:80]}"
    try:
        answer = read(found.text)
        if gold.number is not None and answer.number is None:
            if found.form == "whole" and not re.search(r"\d", found.text):
                raise Unreadable("no number")
            answer = _as_number(answer, found.form)
        return RewardResult(float(equal(gold, answer)), detail=shown)
    except Unreadable as error:
        return RewardResult(0.0, "unparsed", f"{error}: {shown}")


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
    plain = _bare(tidy(text))
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
    sides = _split(text, ["="])
    if len(sides) > 1 and not _ARITHMETIC.sub("", "".join(sides[:-1])):
        return _read(sides[-1])
    parts = _listed(text)
    if parts:
        return Answer(text, kind="list", parts=tuple(map(_read, parts)))
    named = _NAME.fullmatch(text)
    if named and not re.search(r"[=<>]", named[2]):
        value = _read(named[2])
        return Answer(value.text, value.number, value.kind, value.parts, named[1].split("(")[0])
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
        return False
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
    if (gold.kind or answer.kind) and not (_RELATION.search(gold.text) or _RELATION.search(answer.text)):
        return False
    choice = _CHOICE.match(answer.text)
    if choice and re.fullmatch(r"[A-J]", gold.text):
        return choice[1] == gold.text
    if _is_words(gold.text) or _is_words(answer.text):
        return False
    return _symbolically_equal(gold.text, answer.text)


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


@lru_cache(maxsize=1 << 14)
def _symbolically_equal(gold: str, answer: str) -> bool:
    """Whether two expressions are equal by Math-Verify (sympy).

    Raises:
        Unreadable: one of them is refused, cannot be read, or takes too long.
    """
    for text in (answer, gold):
        reason = refusal(text)
        if reason:
            raise Unreadable(f"not evaluated, {reason}")
    left, right = _expression(gold), _expression(answer)
    if not left:
        return False
    if not right:
        raise Unreadable("not readable as mathematics")
    from math_verify import verify

    try:
        same = _same_values(left[0], right[0])
        if same is None and any(map(_hard_to_solve, (gold, answer))):
            raise Unreadable("not evaluated, a relation too hard to solve")
        if same is None:
            same = verify(left, right, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
        return same
    except Unreadable:
        raise
    except Exception as error:  # sympy raises nearly anything
        raise Unreadable(f"cannot be compared ({type(error).__name__})") from error


def _same_values(left: Any, right: Any) -> bool | None:
    """Whether two sympy expressions agree at three points; None if that does not tell. `simplify` alone has no bound in time."""
    from sympy import Expr, Float, Integer, Rational
    from sympy.matrices import MatrixBase

    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        verdicts = [left.shape == right.shape, *map(_same_values, left.flat(), right.flat())]
        return False if False in verdicts else None if None in verdicts else True
    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return None
    exact = not (left.has(Float) or right.has(Float))
    names = sorted({symbol.name for expression in (left, right) for symbol in expression.free_symbols})
    for draw in range(3):
        values = {name: Rational(7 * place + 5, 6 + draw) * (-1) ** (place * draw + draw) for place, name in enumerate(names)}
        a, b = (
            side.evalf(30, subs={symbol: values[symbol.name] for symbol in side.free_symbols}) if names else side.evalf(30)
            for side in (left, right)
        )
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            return None
        error = abs(a - b) / max(Integer(1), abs(b))
        if error > 1e-5:
            return False
        exact = exact and error < 1e-20
    return True if exact else None


@lru_cache(maxsize=1 << 14)
def _expression(text: str) -> list[Any]:
    """What math-verify reads in a tidied text; empty where that is nothing."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing timeout and of each expression that it cannot read
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _WORD_UNITS.sub("", text)).replace("°", r"^{\circ}").replace("$", "")
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _FUNCTIONS.sub(r"\\\1 ", text)
    try:
        found = parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", "first_match", parsing_timeout=None)
    except Exception:  # of sympy and of antlr, nearly anything
        return []
    return [expression for expression in found if not isinstance(expression, str)]


def refusal(text: str) -> str | None:
    """Why an expression is not evaluated: its cost is not bounded by its length. None where it may be.

    Example:
        >>> refusal("10^{10^{10}}")
        'powers too large'
    """
    if len(text) > MAX_SYMBOLIC:
        return f"longer than {MAX_SYMBOLIC} characters"
    if _HEAVY.search(text):
        return "sums, integrals and limits are compared as text"
    if re.search(r"\d{16}", text):
        return "numbers too long"
    if _LARGE_FACTORIAL.search(text):
        return "factorials too large"
    exponents = _EXPONENT.findall(text)
    towers = any(exponent.count("^") > 1 or re.search(r"\d[})\s]*\^", exponent) for exponent in exponents)
    # Powers of powers multiply their exponents.
    size = math.prod(int(factor) or 1 for exponent in exponents for factor in re.findall(r"\d+", exponent))
    variables = re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text)
    if towers or re.search(r"\^\s*[-\w]+\s*\^", text) or size > (MAX_VARIABLE_POWER if variables else MAX_POWER):
        return "powers too large"
    return None


def _hard_to_solve(text: str) -> bool:
    """Whether math-verify could take minutes to solve or simplify an expression that has to be compared as a whole."""
    letters = set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text))
    powers = [int(factor) for exponent in _EXPONENT.findall(text) for factor in re.findall(r"\d+", exponent)]
    relation = _RELATION.search(text) or "=" in text
    transcendental = re.search(
        r"\\(?:sin|cos|tan|sec|csc|cot|log|ln|exp)(?![a-zA-Z])[\s({\d^}]*[a-zA-Z]|\^(?:\{[^}]*[a-zA-Z]|[a-zA-Z])", text
    )
    roots = len(re.findall(r"\\sqrt(?![a-zA-Z])|\|", text)) > 2
    return bool(relation and (transcendental or roots)) or math.prod(powers) > 6 or len(letters) > 6


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
    return not re.search(r"[\\^=<>+*/]|\d", text) and re.search(r"[a-zA-Z]{2,}", text) is not None and not _FUNCTIONS.search(text)
