r"""Whether two expressions or equations are equal: math-verify reads them, values at many digits decide.

Numbers (integers of any length, powers, radicals, constants) are compared exactly: two that differ by one part in 10^400 are different.
Expressions in variables agree where both are real; an expression that is real nowhere else, as a root of 1/n, asks nothing there. Two
equations are equal if one is a multiple of the other. What values do not tell goes to math-verify's own comparison (Hugging Face). It
comes without its alarm, which works in a main thread only: deadlines are the reward pool's business, and what could explode is refused.
"""

from __future__ import annotations

import logging
import math
import re
from functools import lru_cache
from typing import Any

MAX_SYMBOLIC = 200  # characters of an expression that math-verify sees
MAX_POWER = 5000  # exponent of a number, exponents of powers of powers multiplied
MAX_VARIABLE_POWER = 60  # degree of an expression in its variables
MAX_DIGITS = 20_000  # of a number, before or after the point
MAX_TOWER = 2  # powers in powers
DIGITS = 60  # of the values of expressions in variables
EXACT_DIGITS = 400  # of the values of numbers, besides those before the point
ROUNDING = 1e-5  # relative, of expressions with decimals in them; what is closer is for math-verify to say
NUM_POINTS = 8

FUNCTIONS = re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|sec|csc|cot|log|ln|exp|arcsin|arccos|arctan|pi|sqrt)(?![a-zA-Z])")
RELATION = re.compile(r"[<>]|\\(?:[gl]e|[gl]t)(?![a-z])")
VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_WORD_UNITS = re.compile(r"(?<=[\d}) ])\s+(?!pi\b|or\b|and\b)[a-zA-Z]{2,}\.?(?:\s*\^\s*\{?[23]\}?)?(?:\s+(?!or\b|and\b)[a-zA-Z]{2,})*$")
_HEAVY = re.compile(r"\\(?:int|sum|prod|lim|oint|iint|bigcup|bigcap|Gamma|zeta)(?![a-zA-Z])|\.\.\.")
_LARGE_FACTORIAL = re.compile(r"!\s*!|[)}\]]\s*!|\d{4}\s*!|\^\{?\s*[^{}]*!|binom(?:\D*\d{4}|.*\^)")
_EXPONENT = re.compile(r"\^\s*(\{(?:[^{}]|\{[^{}]*\})*\}?|\((?:[^()]|\([^()]*\))*\)?|[-\w\\]+)")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)(?![a-zA-Z])")
_INNERMOST = re.compile(r"[{(\[][^{}()\[\]]*[})\]]")
_TERM_END = re.compile(r"(?<!\^)[-+=,;|]")
_FACTOR = re.compile(r"(?P<base><\d+>|\d+|[a-zA-Z])\s*(?:\^\s*(?P<exponent><\d+>|-?\d+|[a-zA-Z]))?")


class NotEvaluated(ValueError):
    """An expression that is not mathematics, or too large to be evaluated; the message is the reason."""


@lru_cache(maxsize=1 << 14)
def symbolically_equal(gold: str, answer: str) -> bool:
    """Whether two tidied texts are equal as mathematics.

    Raises:
        NotEvaluated: one of them is refused, cannot be read, or cannot be compared.
    """
    for text in (answer, gold):
        reason = refusal(text)
        if reason:
            raise NotEvaluated(f"not evaluated, {reason}")
    left, right = expression(gold), expression(answer)
    if not left:
        return False
    if not right:
        raise NotEvaluated("not readable as mathematics")
    from math_verify import verify

    try:
        same = same_values(left[0], right[0])
        if same is None and any(map(_hard_to_solve, (gold, answer))):
            raise NotEvaluated("not evaluated, a relation too hard to solve")
        if same is None:
            same = verify(left, right, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
        return same
    except NotEvaluated:
        raise
    except Exception as error:  # sympy raises nearly anything
        raise NotEvaluated(f"cannot be compared ({type(error).__name__})") from error


@lru_cache(maxsize=1 << 14)
def expression(text: str) -> list[Any]:
    """What math-verify reads in a tidied text, i as the imaginary unit; empty where that is nothing."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, I

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing timeout and of each expression that it cannot read
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _WORD_UNITS.sub("", text)).replace("$", "")
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = FUNCTIONS.sub(r"\\\1 ", text)
    text = re.sub(r"([\d.]+)\s*°", r"\\frac{\1\\pi}{180}", text) if _TRIGONOMETRIC.search(text) else text.replace("°", r"^{\circ}")
    try:
        found = parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", "first_match", parsing_timeout=None)
        found = [one for one in found if not isinstance(one, str)]
        return [one.subs({name: I for name in one.free_symbols if name.name == "i"}) if isinstance(one, Basic) else one for one in found]
    except Exception:  # of sympy and of antlr, nearly anything
        return []


def same_values(left: Any, right: Any) -> bool | None:
    """Whether two sympy expressions, equations or matrices are equal by their values; None if these do not tell."""
    from sympy import Eq, Expr, Float, numer, together
    from sympy.matrices import MatrixBase

    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        verdicts = [left.shape == right.shape, *map(same_values, left.flat(), right.flat())]
        return False if False in verdicts else None if None in verdicts else True
    if isinstance(left, Eq) and isinstance(right, Eq):
        return _same_equation(*(numer(together(side.lhs - side.rhs)) for side in (left, right)))
    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return None
    exact = not (left.has(Float) or right.has(Float))
    names = _names(left, right)
    if not names:
        return _same_constant(left, right, exact)
    verdicts = [_same_number(a, b, exact, DIGITS - 20) for a, b in _pairs(left, right, names)]
    return False if False in verdicts else True if len(verdicts) >= 3 and None not in verdicts else None


def _same_equation(left: Any, right: Any) -> bool | None:
    """Whether two functions have the same zeros since one is a constant times the other; None if they do not look so."""
    from sympy import Float

    names = _names(left, right)
    ratios = [a / b for a, b in _pairs(left, right, names) if a and b] if names else []
    rounding = 10.0 ** (20 - DIGITS) if not (left.has(Float) or right.has(Float)) else ROUNDING
    return True if len(ratios) >= 3 and all(abs(ratio - ratios[0]) <= rounding * abs(ratios[0]) for ratio in ratios) else None


def _names(left: Any, right: Any) -> list[str]:
    return sorted({symbol.name for side in (left, right) for symbol in side.free_symbols})


def _pairs(left: Any, right: Any, names: list[str]) -> list[tuple[Any, Any]]:
    """The values of both at points, positive and mixed ones, where both are finite and, unless i is written in one of them, all their roots
    and logarithms are real."""
    from sympy import I, Pow, Rational, log

    found = []
    is_complex = left.has(I) or right.has(I)
    radicands = [power.base for side in (left, right) for power in side.atoms(Pow) if power.exp.is_Rational and not power.exp.is_Integer]
    positive = [] if is_complex else [*radicands, *(logarithm.args[0] for side in (left, right) for logarithm in side.atoms(log))]
    for draw in range(NUM_POINTS):
        mixed = draw >= NUM_POINTS // 2
        values = {
            name: (-1) ** (mixed * (place * draw + draw + 1)) * Rational(10007 + 8111 * place, 7001 + 1013 * draw)
            for place, name in enumerate(names)
        }
        a, b, *bounded = (
            side.evalf(DIGITS if place < 2 else 15, subs={symbol: values[symbol.name] for symbol in side.free_symbols})
            for place, side in enumerate((left, right, *positive))
        )
        if any(value.is_negative for value in bounded):
            continue
        if all(side.is_number and side.is_finite for side in (a, b)) and (is_complex or (a.is_real and b.is_real)):
            found.append((a, b))
    return found


def _same_constant(left: Any, right: Any, exact: bool) -> bool | None:
    """Whether two numbers are equal: fractions exactly, others to `EXACT_DIGITS` digits after the point.

    Raises:
        NotEvaluated: a number has too many digits before the point.
    """
    if left.is_Rational and right.is_Rational:
        return bool(left == right)
    size = max(map(_num_digits, (left, right)))
    if size > MAX_DIGITS:
        raise NotEvaluated("not evaluated, numbers too large")
    digits = EXACT_DIGITS + 2 * size + 50
    return _same_number(left.evalf(digits, maxn=4 * digits), right.evalf(digits, maxn=4 * digits), exact, EXACT_DIGITS + size)


def _num_digits(number: Any) -> int:
    """How many decimal places a number is away from 1, in either direction; 0 of zero and of what is no number."""
    value = number.evalf(15)
    size = max(abs(value.as_real_imag()[0]), abs(value.as_real_imag()[1])) if value.is_number and value.is_finite else 0
    return math.ceil(abs(size._mpf_[2] + size._mpf_[3]) * math.log10(2)) if size != 0 and size.is_Float else 0


def _same_number(a: Any, b: Any, exact: bool, digits: int) -> bool | None:
    """Whether two values agree to so many digits, relative to the larger; None for one that has none, or near one with decimals in it."""
    if not all(side.is_number and side.is_finite for side in (a, b)):
        return None
    size = max(abs(a), abs(b))
    if size == 0:
        return True
    if min(abs(a), abs(b)) == 0:
        return None if size * 10**digits < 1 else False
    if not exact:
        return None if abs(a - b) <= ROUNDING * size else False
    return bool(abs(a - b) * 10**digits <= size)


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
    if _LARGE_FACTORIAL.search(text):
        return "factorials too large"
    exponents = _EXPONENT.findall(text)
    towers = any(exponent.count("^") > 1 or re.search(r"\d[})\s]*\^", exponent) for exponent in exponents)
    has_variables = VARIABLE.search(re.sub(r"(?<![a-zA-Z])[ei](?![a-zA-Z])", "", text)) is not None
    degree, longest = _degree(text), max(map(len, re.findall(r"\d+", text)), default=1)
    too_large = degree > (MAX_VARIABLE_POWER if has_variables else MAX_POWER) or degree * longest > MAX_DIGITS
    towers = towers or _tower(text) > MAX_TOWER
    return "powers too large" if towers or too_large or re.search(r"\^\s*[-\w]+\s*\^", text) else None


def _tower(text: str) -> int:
    """How many exponents lie in one another."""
    inside, open_braces, previous, deepest = 0, [], "", 0
    for character in text.replace(" ", ""):
        if character in "{(":
            open_braces.append(previous == "^")
            inside += open_braces[-1]
            deepest = max(deepest, inside)
        elif character in "})" and open_braces:
            inside -= open_braces.pop()
        previous = character
    return deepest


def _degree(text: str) -> int:
    """The largest degree among the terms of an expression, powers of powers multiplied; a letter in an exponent counts 1."""
    text = re.sub(r"\\[a-zA-Z]+|[<>]", lambda found: "+" if found.group() in "<>" else " ", text)
    groups: list[tuple[int, int]] = []  # (degree, product of the integers) of each bracket

    def weigh(flat: str) -> tuple[int, int]:
        integers = [groups[int(inner)][1] if inner else int(digits) or 1 for inner, digits in re.findall(r"<(\d+)>|(\d+)", flat)]
        return max(map(degree_of_term, _TERM_END.split(flat))), math.prod(integers)

    def degree_of_term(term: str) -> int:
        total = 0
        for factor in _FACTOR.finditer(term):
            base, exponent = factor["base"], factor["exponent"]
            own = groups[int(base[1:-1])][0] if base[0] == "<" else int(base.isalpha())
            times = (
                1 if not exponent or exponent.isalpha() else groups[int(exponent[1:-1])][1] if exponent[0] == "<" else abs(int(exponent))
            )
            total += max(own, 1) * times if exponent else own
        return total

    def weighed(bracket: re.Match[str]) -> str:
        groups.append(weigh(bracket.group()[1:-1]))
        return f"<{len(groups) - 1}>"

    previous = ""
    while text != previous:
        previous, text = text, _INNERMOST.sub(weighed, text)
    return weigh(text)[0]


def _hard_to_solve(text: str) -> bool:
    """Whether math-verify could take minutes to solve or simplify an expression that has to be compared as a whole."""
    letters = set(VARIABLE.findall(text))
    powers = [int(factor) for exponent in _EXPONENT.findall(text) for factor in re.findall(r"\d+", exponent)]
    relation = RELATION.search(text) or "=" in text
    transcendental = re.search(
        r"\\(?:sin|cos|tan|sec|csc|cot|log|ln|exp)(?![a-zA-Z])[\s({\d^}]*[a-zA-Z]|\^(?:\{[^}]*[a-zA-Z]|[a-zA-Z])", text
    )
    roots = len(re.findall(r"\\sqrt(?![a-zA-Z])|\|", text)) > 2
    return bool(relation and (transcendental or roots)) or math.prod(powers) > 6 or len(letters) > 6
