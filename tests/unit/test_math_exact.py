"""`math_answer` says equal exactly when exact arithmetic does: random rationals, integers up to 10**60, radicals and powers.

Two texts of each pair are written in different ways; the second value is the first one or close to it. What is right is computed here with
fractions and integers alone.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import isqrt

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import load_grader

GRADE = load_grader({"name": "math_answer"})

CLOSE = st.sampled_from([0, 0, 0, 1, -1, 2])
INTEGERS = st.integers(-(10**60), 10**60)
POSITIVE = st.integers(1, 10**9)


def same(gold, answer):
    result = GRADE("", rf"\boxed{{{answer}}}", {"answer": gold})
    assert result.status == "ok", result.detail
    return result.value == 1.0


def fraction(top, bottom):
    return rf"\frac{{{top}}}{{{bottom}}}"


@settings(max_examples=300, deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30), POSITIVE, CLOSE, CLOSE, st.sampled_from(["/", r"\frac", r"\dfrac"]))
def test_rationals(top, bottom, factor, above, below, form):
    other = (top * factor + above, bottom * factor + below)
    if other[1] == 0:
        return
    text = f"{other[0]}/{other[1]}" if form == "/" else rf"{form}{{{other[0]}}}{{{other[1]}}}"
    assert same(fraction(top, bottom), text) == (Fraction(top, bottom) == Fraction(*other))


@settings(max_examples=300, deadline=None)
@given(INTEGERS, CLOSE, st.sampled_from(["{}", "{:,}", "{}.0", "{}.000", r"{}\text{{ cm}}", "x = {}"]))
def test_integers(value, change, form):
    assert same(str(value), form.format(value + change)) == (change == 0)


@settings(max_examples=25, deadline=None)
@given(INTEGERS, st.integers(2, 99), st.integers(2, 30), CLOSE)
def test_sums_of_a_power_and_an_integer(value, base, exponent, change):
    total = value + base**exponent
    assert same(rf"{base}^{{{exponent}}} {value:+d}", str(total + change)) == (change == 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 40), CLOSE, st.integers(0, 3))
def test_decimals_without_rounding(digits, places, change, zeros):
    def written(value):
        text = str(value).zfill(places + 1)
        return f"{text[: len(text) - places]}.{text[len(text) - places :]}" if places else text

    gold = fraction(digits, 10**places)
    if change == 0:
        assert same(gold, written(digits) + ("0" * zeros if places else ""))
    elif places and digits + change > 0:
        assert not same(written(digits), written(digits + change))


def radical(terms):
    """a sqrt(b) + ... as {square-free part: coefficient}: equal exactly when the sums are."""
    total = Counter()
    for coefficient, inside in terms:
        root = next(root for root in range(isqrt(inside), 0, -1) if inside % root**2 == 0)
        total[inside // root**2] += coefficient * root
    return {inside: coefficient for inside, coefficient in total.items() if coefficient}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(2, 50), st.integers(1, 9)), min_size=1, max_size=3),
    CLOSE,
    st.sampled_from([r"\sqrt", "/"]),
)
def test_sums_of_radicals(terms, change, form):
    gold = [(coefficient * factor, inside) for coefficient, inside, factor in terms]
    other = [(coefficient, inside * factor**2) for coefficient, inside, factor in terms]
    other[0] = (other[0][0] + change, other[0][1])
    if form == "/":
        text = " + ".join(rf"\frac{{{coefficient * inside}}}{{\sqrt{{{inside}}}}}" for coefficient, inside in reversed(other))
    else:
        text = " + ".join(rf"{coefficient}\sqrt{{{inside}}}" for coefficient, inside in reversed(other))
    assert same(" + ".join(rf"{coefficient}\sqrt{{{inside}}}" for coefficient, inside in gold), text) == (radical(gold) == radical(other))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(-40, 40), st.integers(-40, 40), CLOSE, st.sampled_from(["product", "quotient", "power"]))
def test_powers(base, first, second, change, form):
    gold = rf"{base}^{{{first}}} \cdot {base}^{{{second}}}"
    exponent = first + second + change
    text = {
        "product": rf"{base}^{{{exponent}}}",
        "quotient": rf"\frac{{1}}{{{base}^{{{-exponent}}}}}",
        "power": rf"{base**2}^{{\frac{{{exponent}}}{{2}}}}",
    }[form]
    assert same(gold, text) == (change == 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 40), CLOSE, st.sampled_from(["\\pi", "e", "\\ln 2"]))
def test_powers_of_constants_however_small(base, exponent, change, constant):
    gold = rf"\frac{{{constant}}}{{{base}^{{{exponent}}}}}"
    assert same(gold, rf"{constant} \cdot {base}^{{{-exponent + change}}}") == (change == 0)
