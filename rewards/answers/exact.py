"""Are two expressions equal? Decided by evaluation with as many bits as a proof needs, in a time that is bounded before it begins.

Of an expression of rationals, radicals and i the tree alone says how small it can be without being zero (Burnikel, Funke, Mehlhorn,
Schirra, Schmitt: A separation bound for real algebraic expressions, Algorithmica 55, 2009): with u and l computed bottom up and D,
the degree of all its roots, it is 0 or at least 1 / (u**(D - 1) * l). So for these the verdict is exact, up to MAX_ROOT_BITS. With pi, e,
logarithms and trigonometric functions, agreement in 400 bits beyond the size of every part counts as equality. Variables take rational
values.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

MAX_BITS = 1 << 16  # of the numerator or denominator of any part of an expression
MAX_ROOT_BITS = 1 << 14  # of a verdict on radicals or transcendental functions
EXTRA_BITS = 400  # in which transcendental expressions must agree
MAX_ARGUMENT = 6000  # of a factorial or binomial

_CONSTANTS = {"Pi": "pi", "Exp1": "e", "GoldenRatio": "phi", "EulerGamma": "euler"}
_FUNCTIONS = re.compile(r"a?(?:sin|cos|tan|cot|sec|csc)h?")  # mpmath's names too
_NUMERATORS = (3, 7, 13, 19, 29, 37, 43, 53)
_LARGEST_EXPONENT = 1 << 20
_local = threading.local()

Values = Mapping[str, Fraction]


class TooLarge(ValueError):
    """The evaluation would take too long."""


class NotCovered(ValueError):
    """A part that is not evaluated here, or has no value at this point."""


def same_value(left: Any, right: Any) -> bool | None:
    """Whether two sympy expressions are equal wherever both are real; None where that cannot be told here.

    With variables they are compared at rational points of either sign. Points at which a part of them is not real count only when there
    are no others, or with an i in them: sqrt(1/n) is 1/sqrt(n), but sqrt(x**2) is not x.

    Raises:
        TooLarge: an intermediate value is too large.
    """
    names = _names(left, right)
    imaginary = not names or any(_has_unit(side) or "i" in _symbols(side) for side in (left, right))
    for real in (False,) if imaginary else (True, False):
        verdicts = []
        for values in _points(names):
            try:
                a, b, bits = _evaluate(left, right, values, real=real)
            except NotCovered:
                continue
            if not _is_zero(a - b, bits):
                return False
            verdicts.append(True)
        if verdicts:
            return True
    return None


def same_relation(left: tuple[Any, Any], right: tuple[Any, Any]) -> int:
    """Of two relations `a ? b` and `c ? d` the sign of the constant k with a - b = k (c - d); 0 where there is none.

    Raises:
        TooLarge: an intermediate value is too large.
    """
    sides = [pair[0] - pair[1] for pair in (left, right)]
    sign, first = 0, None
    for values in _points(_names(*sides)):
        try:
            a, b, bits = _evaluate(sides[0], sides[1], values)
        except NotCovered:
            continue
        if _is_zero(a, bits) or _is_zero(b, bits):
            if not (_is_zero(a, bits) and _is_zero(b, bits)):
                return 0
            continue
        first = first or (a, b)
        if not _is_zero((a * first[1] - first[0] * b) / (a * first[1]), EXTRA_BITS // 4):
            return 0
        ratio = a / b
        sign = 0 if not _is_zero(ratio.imag, EXTRA_BITS // 4) else 1 if ratio.real > 0 else -1
    return sign


def real_value(expression: Any, digits: int) -> Fraction | None:
    """A constant to `digits` digits; None when it is not real, has variables or is not covered."""
    from sympy import Integer

    try:
        value, _, bits = _evaluate(expression, Integer(0), {}, 4 * digits)
    except NotCovered:
        return None
    if not _is_zero(value.imag, bits):
        return None
    sign, mantissa, exponent, _ = value.real._mpf_
    return (-1) ** sign * Fraction(mantissa) * Fraction(2) ** exponent


def _names(*expressions: Any) -> list[str]:
    return sorted(set().union(*map(_symbols, expressions)) - {"i"})


def _symbols(expression: Any) -> set[str]:
    return {symbol.name for symbol in expression.free_symbols}


def _has_unit(expression: Any) -> bool:
    from sympy import I

    return expression.has(I)


def _points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Small, large, mixed, negative and two whole positive values of the variables; one empty point without any."""
    if not names:
        yield {}
        return
    for denominator, signs in ((61, (1, 1)), (2, (1, 1)), (5, (1, -1)), (11, (-1, 1)), (17, (-1, -1)), (1, (1, 1))):
        yield {name: Fraction(signs[place % 2] * (_NUMERATORS[place % 8] + place // 8), denominator) for place, name in enumerate(names)}
    yield {name: Fraction(4 + 2 * place) for place, name in enumerate(names)}


def _is_zero(value: Any, bits: float) -> bool:
    return value == 0 or abs(value).man_exp[1] + abs(value).man_exp[0].bit_length() < -bits


def _evaluate(left: Any, right: Any, values: Values, least_bits: int = 0, real: bool = False) -> tuple[Any, Any, float]:
    """Both values and the bits after the point in which a difference other than 0 must show.

    Raises:
        NotCovered: one has no value here, or with `real` a part of it is not real.
        TooLarge: it would take too long.
    """
    bound = _Bound(values)
    upper, lower = bound.sum([bound.size(left), bound.size(right)])
    if not bound.algebraic:
        bits = upper + lower + EXTRA_BITS
        if bits > MAX_ROOT_BITS:
            raise TooLarge("values too large")
    else:
        bits = lower if bound.degree == 1 else min((bound.degree - 1) * upper + lower, MAX_ROOT_BITS)
    bits = max(bits, least_bits) + 2
    context = _context()
    context.prec = int(bits + 2 * (upper + lower)) + 64
    try:
        pair = [context.mpc(_Evaluation(values, context, real).value(side)) for side in (left, right)]
    except (ZeroDivisionError, ValueError, TypeError, OverflowError, ArithmeticError) as error:
        raise NotCovered(str(error)) from error
    if not all(context.isfinite(value) for value in pair):
        raise NotCovered("not finite")
    return pair[0], pair[1], bits


def _context() -> Any:
    """An mpmath context of this thread; the global one belongs to the user."""
    import mpmath

    if not hasattr(_local, "context"):
        _local.context = mpmath.mp.clone()
    return _local.context


class _Bound:
    """The logarithms (base 2) of u and l of every part, the degree of all roots, and whether there are only roots."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.algebraic = True
        self.degree = 1
        self.roots: set[Any] = set()

    def size(self, node: Any) -> tuple[float, float]:
        """log2 of u and l.

        Raises:
            TooLarge: one of them is above MAX_BITS.
            NotCovered: a function that is not known here.
        """
        upper, lower = self._size(node)
        if max(upper, lower) > MAX_BITS:
            raise TooLarge("powers too large")
        return upper, lower

    def sum(self, parts: list[tuple[float, float]]) -> tuple[float, float]:
        """The size of a sum."""
        lower = sum(part[1] for part in parts)
        return max(part[0] + lower - part[1] for part in parts) + math.log2(len(parts)), lower

    def _size(self, node: Any) -> tuple[float, float]:
        """log2 of u and l by the rules of the bound for roots, by generous ones for all other functions."""
        kind = type(node).__name__
        rational = _leaf(node, self.values)
        if rational is not None:
            return _log2(rational.numerator), _log2(rational.denominator)
        if kind == "Add":
            return self.sum([self.size(part) for part in node.args])
        if kind == "Mul":
            sizes = [self.size(part) for part in node.args]
            return sum(size[0] for size in sizes), sum(size[1] for size in sizes)
        if kind in ("Pow", "exp"):
            base, exponent = _power(node)
            return self._power(base, exponent)
        if kind == "ImaginaryUnit" or (kind == "Symbol" and node.name == "i"):
            self._root(node, 2)
            return 0, 0
        if kind in ("UnevaluatedExpr", "conjugate"):
            return self.size(node.args[0])
        if kind in ("factorial", "binomial"):
            arguments = [_rational(part, self.values) for part in node.args]
            if None in arguments:
                raise NotCovered(kind)
            if max(map(abs, arguments)) > MAX_ARGUMENT:
                raise TooLarge("factorials too large")
            self.algebraic = self.algebraic and all(part.denominator == 1 for part in arguments)
            return float(abs(arguments[0]) * 13 + 1 if kind == "factorial" else abs(arguments[0]) + abs(arguments[-1]) * 13 + 1), 0.0
        if kind in ("Abs", "re", "im", "floor", "ceiling", "Max", "Min", "Mod"):
            sizes = [self.size(part) for part in node.args]
            self.degree *= 2
            return sum(size[0] + size[1] for size in sizes) + 1, sum(size[1] for size in sizes)
        self.algebraic = False
        if kind in _CONSTANTS:
            return 2, 0
        if kind == "log" or _FUNCTIONS.fullmatch(kind):
            total = 4 + sum(sum(self.size(part)) for part in node.args)
            return total, total
        raise NotCovered(kind)

    def _power(self, base: Any, exponent: Any) -> tuple[float, float]:
        """The size of a power; the root of a rational exponent is counted in the degree, any other exponent is transcendental."""
        power = _rational(exponent, self.values)
        if power is None or type(base).__name__ == "Exp1":
            self.algebraic = False
            upper, lower = (2.0, 2.0) if type(base).__name__ == "Exp1" else self.size(base)
            magnitude = _log2_of(power) if power is not None else self.size(exponent)[0]
            if magnitude > 20:
                raise TooLarge("powers too large")
            total = 2**magnitude * (max(upper, lower) + 2) + 2
            return total, total
        upper, lower = self.size(base)
        if power < 0:
            upper, lower, power = lower, upper, -power
        if power.denominator > 1:
            self._root((base, power.denominator), power.denominator)
            upper = (upper + (power.denominator - 1) * lower) / power.denominator
        return upper * power.numerator, lower * power.numerator

    def _root(self, root: Any, degree: int) -> None:
        if root not in self.roots:
            self.roots.add(root)
            self.degree *= degree


class _Evaluation:
    """Values of expressions in the precision of an mpmath context; with `real` none of their parts may leave the real numbers."""

    def __init__(self, values: Values, context: Any, real: bool) -> None:
        self.values, self.context, self.real = values, context, real

    def value(self, node: Any) -> Any:
        """The value of an expression.

        Raises:
            NotCovered: it has none.
        """
        number = self._value(node)
        if self.real and number.imag != 0:
            raise NotCovered("not real")
        return number

    def _value(self, node: Any) -> Any:
        """As `value`, without the check; `_Bound.size` has refused what is not known here."""
        kind, context = type(node).__name__, self.context
        rational = _leaf(node, self.values)
        if rational is not None:
            return context.mpf(rational.numerator) / rational.denominator
        if kind in ("Pow", "exp"):
            base, exponent = _power(node)
            power = _rational(exponent, self.values)
            if power is None:
                return context.power(self.value(base), self.value(exponent))
            return self._rational_power(self.value(base), power, bool(exponent.free_symbols))
        if kind == "ImaginaryUnit" or (kind == "Symbol" and node.name == "i"):
            return context.j
        if kind in _CONSTANTS:
            return +getattr(context, _CONSTANTS[kind])
        parts = [self.value(part) for part in node.args]
        if kind in ("Add", "Mul"):
            return context.fsum(parts) if kind == "Add" else context.fprod(parts)
        if kind == "UnevaluatedExpr":
            return parts[0]
        if kind == "log":
            return context.log(parts[0]) if len(parts) == 1 else context.log(parts[0]) / context.log(parts[1])
        if kind in ("Max", "Min"):
            return {"Max": max, "Min": min}[kind](parts)
        if kind == "Mod":
            return parts[0] - parts[1] * context.floor(parts[0] / parts[1])
        names = {"Abs": "fabs", "ceiling": "ceil", "conjugate": "conj"}
        return getattr(context, names.get(kind, kind))(*parts)

    def _rational_power(self, base: Any, power: Fraction, variable: bool) -> Any:
        """`base` to a rational power; odd roots of negative numbers are real, as in school, unless the exponent is `variable`."""
        whole, degree, context = power.numerator, power.denominator, self.context
        if degree == 1:
            return base**whole
        if base.imag == 0:
            base = base.real
            if base >= 0:
                return context.root(base, degree) ** whole
            if degree % 2 and not variable:
                return (-context.root(-base, degree)) ** whole
        root = context.sqrt(base) if degree == 2 else context.power(base, context.mpf(1) / degree)
        return root**whole


def _power(node: Any) -> tuple[Any, Any]:
    """Base and exponent of a power or an exponential."""
    if type(node).__name__ == "exp":
        from sympy import E

        return E, node.args[0]
    return node.args


def _leaf(node: Any, values: Values) -> Fraction | None:
    """The value of a rational number or a variable; None for anything else."""
    if node.is_Rational:
        return Fraction(int(node.p), int(node.q))
    if node.is_Symbol and node.name != "i":
        return values.get(node.name)
    return None


def _rational(node: Any, values: Values) -> Fraction | None:
    """The exact value of an exponent; None where it is not rational by its form.

    Raises:
        TooLarge: it is above 2**20.
    """
    value = _leaf(node, values)
    kind = type(node).__name__
    if value is None and kind in ("Add", "Mul", "Pow", "UnevaluatedExpr"):
        parts = [_rational(part, values) for part in node.args]
        if None in parts:
            return None
        if kind == "Pow":
            base, exponent = parts
            if exponent.denominator != 1 or (base == 0 and exponent < 0):
                return None
            if (_log2(base.numerator) + _log2(base.denominator)) * abs(exponent) > 200:
                raise TooLarge("powers too large")
            value = base**exponent.numerator
        else:
            value = sum(parts, Fraction(0)) if kind == "Add" else math.prod(parts, start=Fraction(1))
    if kind == "factorial":
        argument = _rational(node.args[0], values)
        if argument is not None and argument > MAX_ARGUMENT:
            raise TooLarge("factorials too large")
        if argument is None or argument.denominator > 1 or argument < 0:
            return None
        value = Fraction(math.factorial(int(argument)))
    if value is not None and abs(value) > _LARGEST_EXPONENT and not node.is_Rational:
        raise TooLarge("powers too large")
    return value


def _log2(value: int) -> float:
    return math.log2(abs(value)) if value else 0.0


def _log2_of(value: Fraction) -> float:
    return max(0.0, _log2(value.numerator) - _log2(value.denominator))
