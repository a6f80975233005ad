"""Expressions as sympy reads them: math-verify parses, `rewards.answers.exact` compares, math-verify has the rest (sets, hard relations).

Math-verify works here without its alarm, which needs the main thread: what it could work on for minutes is refused by its text.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rewards.answers.exact import TooLarge, real_value, same_relation, same_value
from rewards.answers.numbers import Number, same_number

MAX_SYMBOLIC = 200  # characters of an expression, long numbers counted as three
MAX_POWER = 5000  # product of the exponents of an expression that math-verify compares
MAX_VARIABLE_POWER = 60  # the same with variables in it
MAX_INTEGER = 400  # digits

FUNCTIONS = re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|sec|csc|cot|log|ln|exp|arcsin|arccos|arctan|pi|sqrt)(?![a-zA-Z])")
RELATION = re.compile(r"[<>]|\\(?:[gl]e|[gl]t)(?![a-z])")
_WORD_UNITS = re.compile(r"(?<=[\d}) ])\s+(?!pi\b|or\b|and\b)[a-zA-Z]{2,}\.?(?:\s*\^\s*\{?[23]\}?)?(?:\s+(?!or\b|and\b)[a-zA-Z]{2,})*$")
_HEAVY = re.compile(r"\\(?:int|sum|prod|lim|oint|iint|bigcup|bigcap|Gamma|zeta)(?![a-zA-Z])|\.\.\.")
_LARGE_BINOMIAL = re.compile(r"(?:binom|choose)(?:\D*\d{4}|.*\^)|\d{4}\D*choose|!\s*!")  # math-verify computes these as it reads them
_LARGE_FACTORIAL = re.compile(r"!\s*!|[)}\]]\s*!|\d{4}\s*!|\^\{?\s*[^{}]*!|binom(?:\D*\d{4}|.*\^)")
_EXPONENT = re.compile(r"\^\s*(\{(?:[^{}]|\{[^{}]*\})*\}?|\((?:[^()]|\([^()]*\))*\)?|[-\w\\]+)")
_TRIGONOMETRY = re.compile(r"(?<![a-zA-Z])(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?!\d*\\overline)")


class Unreadable(ValueError):
    """A text that is no answer."""


@lru_cache(maxsize=1 << 14)
def symbolically_equal(gold: str, answer: str) -> bool:
    """Whether two expressions, equations or inequalities say the same, exactly.

    Raises:
        Unreadable: one of them is refused, cannot be read, or takes too long.
    """
    from sympy import Expr

    left, right = _both(gold, answer)
    if left is None:
        return False
    return _guarded(lambda: _same(left, _right_side(right, answer) if isinstance(left, Expr) else right, (gold, answer)))


@lru_cache(maxsize=1 << 14)
def equals_number(number: Number, text: str, answer: str) -> bool:
    """Whether a number is the value of an expression: exactly, or as a decimal that rounds it. `answer` is the one that is graded.

    Raises:
        Unreadable: as in `symbolically_equal`.
    """
    from sympy import Expr, Rational

    if text != answer:
        _refuse(answer)
    value = _checked(text)
    if text == answer:
        value = _right_side(value, text)
        if value is None:
            raise Unreadable("not readable as mathematics")

    def compare() -> bool:
        if not isinstance(value, Expr):
            return False
        for candidate in {number.value, number.value * number.scale}:
            if same_value(Rational(candidate.numerator, candidate.denominator), value):
                return True
        rounded = number.place and real_value(value, 2 * len(str(number.value.numerator)) + 20)
        return bool(rounded) and same_number(Number(rounded), Number(number.value, number.scale, place=number.place))

    return _guarded(compare)


def _both(gold: str, answer: str) -> tuple[Any, Any]:
    right = _checked(answer)
    left = _checked(gold)
    if left is not None and right is None:
        raise Unreadable("not readable as mathematics")
    return left, right


def _checked(text: str) -> Any:
    _refuse(text)
    return expression(text)


def _refuse(text: str) -> None:
    reason = _unsafe(text)
    if reason:
        raise Unreadable(f"not evaluated, {reason}")


def _guarded(compare: Callable[[], bool]) -> bool:
    try:
        return compare()
    except Unreadable:
        raise
    except TooLarge as error:
        raise Unreadable(f"not evaluated, {error}") from error
    except Exception as error:  # sympy raises nearly anything
        raise Unreadable(f"cannot be compared ({type(error).__name__})") from error


def _same(left: Any, right: Any, texts: tuple[str, str]) -> bool:
    verdict = _exactly(left, right)
    if verdict is not None:
        return verdict
    for text in texts:
        reason = refusal(text)
        if reason:
            raise Unreadable(f"not evaluated, {reason}")
    if any(map(_hard_to_solve, texts)):
        raise Unreadable("not evaluated, a relation too hard to solve")
    from math_verify import verify

    return verify([left], [right], allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)


def _exactly(left: Any, right: Any) -> bool | None:
    """The verdict that needs no solving and no simplification; None where there is none."""
    from sympy import Expr
    from sympy.core.relational import Relational
    from sympy.matrices import MatrixBase

    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        verdicts = [left.shape == right.shape, *map(_exactly, left.flat(), right.flat())]
        return False if False in verdicts else None if None in verdicts else True
    if isinstance(left, Expr) and isinstance(right, Expr):
        return same_value(left, right)
    if isinstance(left, Expr) and isinstance(right, Relational):
        return False
    if isinstance(left, Relational) and isinstance(right, Relational):
        factor = same_relation(left.args, right.args)
        if type(left) is type(right):
            return True if factor > 0 or (factor < 0 and left.rel_op in ("==", "!=")) else None
        return True if factor < 0 and type(left) is type(right.reversed) else None
    return None


def _right_side(expression: Any, text: str) -> Any:
    """Of an equation the side that is the value, where the other one names it: "P(A) = 1/2", "1/2 = P(A)", "a + b = 5", not "2x = 10"."""
    from sympy import Eq

    if not isinstance(expression, Eq):
        return expression
    name, value = expression.args
    flipped = bool(value.free_symbols and not name.free_symbols)
    if flipped:
        name, value = value, name
    side = text.rpartition("=")[2] if flipped else text.partition("=")[0]
    side = re.sub(r"[a-zA-Z]'?\s*\([^()]*\)|_(?:\w|\{[^{}]*\})", "", side)
    return expression if name.free_symbols and re.search(r"\d|\\(?:sqrt|frac)|\^", side) else value


@lru_cache(maxsize=1 << 14)
def expression(text: str) -> Any:
    """What math-verify reads in a tidied text, decimals as exact fractions; None where that is nothing."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing timeout and of each expression that it cannot read
    if _TRIGONOMETRY.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*°", r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _WORD_UNITS.sub("", text)).replace("°", r"^{\circ}").replace("$", "")
    text = _DECIMAL.sub(lambda found: rf"{{\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}}}", text)
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = FUNCTIONS.sub(r"\\\1 ", text)
    text = re.sub(r"(\\(?:ln|log|sin|cos|tan)(?![a-zA-Z])\s*)(\d+|[a-zA-Z])(?=\s*\\(?:cdot|times))", r"\1(\2)", text)
    try:
        found = parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", "first_match", parsing_timeout=None)
    except Exception:  # of sympy and of antlr, nearly anything
        return None
    return next((each for each in found if not isinstance(each, str)), None)


def _unsafe(text: str) -> str | None:
    """Why an expression is not even read: math-verify computes some parts of it while it reads."""
    if len(re.sub(r"\d{4,}", "000", text)) > MAX_SYMBOLIC:
        return f"longer than {MAX_SYMBOLIC} characters"
    if _HEAVY.search(text):
        return "sums, integrals and limits are compared as text"
    if re.search(rf"\d{{{MAX_INTEGER + 1}}}", text):
        return "numbers too long"
    if re.search(r"\^\s*-?(?:\d+|[a-zA-Z])\s*\^", text):
        return "powers too large"
    if re.search(r"_\s*\w\s*_", text):  # no LaTeX, and like powers of powers without braces it takes its parser minutes
        return "a subscript of a subscript"
    return "factorials too large" if _LARGE_BINOMIAL.search(text) else None


def refusal(text: str) -> str | None:
    """Why math-verify does not compare an expression: its cost is not bounded by its length. None where it may.

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
    if towers or re.search(r"\^\s*[-\w]+\s*\^", text) or size > (MAX_VARIABLE_POWER if _LETTER.search(text) else MAX_POWER):
        return "powers too large"
    return None


def _hard_to_solve(text: str) -> bool:
    """Whether math-verify could take minutes to solve or simplify an expression that has to be compared as a whole."""
    letters = set(_LETTER.findall(text))
    powers = [int(factor) for exponent in _EXPONENT.findall(text) for factor in re.findall(r"\d+", exponent)]
    relation = RELATION.search(text) or "=" in text
    transcendental = re.search(
        r"\\(?:sin|cos|tan|sec|csc|cot|log|ln|exp)(?![a-zA-Z])[\s({\d^}]*[a-zA-Z]|\^(?:\{[^}]*[a-zA-Z]|[a-zA-Z])", text
    )
    roots = len(re.findall(r"\\sqrt(?![a-zA-Z])|\|", text)) > 2
    return bool(relation and (transcendental or roots)) or math.prod(powers) > 6 or len(letters) > 6
