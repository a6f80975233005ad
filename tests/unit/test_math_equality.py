"""`math_answer` says equal exactly when exact arithmetic does, and finds the answer in the wording that solutions have.

`RIGHT` and `WRONG` hold (gold, completion); the verdicts follow from the mathematics and are written by hand.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import load_grader

GRADE = load_grader({"name": "math_answer"})

RIGHT = [
    ("61", "The result is **61**"),
    ("61", "**Answer: 61**"),
    ("61", "**Answer:** **61**"),
    ("61", "__61__"),
    ("61", "*61*"),
    ("61", "So we get **x = 61**."),
    ("3/4", "**\\frac{3}{4}**"),
    ("x^2+y^2", "x**2 + y**2"),
    ("61", "The answer is right. 61"),
    ("61", "We get 61. This answer is verified."),
    ("61", "It is 61, and our answer is therefore correct."),
    ("61", "\\boxed{61}. The answer is correct."),
    ("61", "The total is 61 apples. Therefore, the answer is reasonable."),
    ("61", "We find 61.\nThis solution is valid."),
    ("correct", "The answer is correct."),
    ("unique", "\\boxed{\\text{unique}}"),
    ("2^{64}", "18446744073709551616"),
    ("2^{64}-1", "\\boxed{18446744073709551615}"),
    ("3^{40}", "12157665459056928801"),
    ("x^{10}+x^{20}+x^{30}", "\\boxed{x^{30}+x^{20}+x^{10}}"),
    ("x^{30}y^{30}", "y^{30}x^{30}"),
    ("(x+1)^{10}+(y-1)^{12}", "(y-1)^{12}+(x+1)^{10}"),
    ("10^{60}+1", "1000000000000000000000000000000000000000000000000000000000001"),
    ("2^{200}", "4^{100}"),
    ("2^{100}\\cdot 3^{100}", "6^{100}"),
    ("y=2x+1", "2x+1=y"),
    ("y=2x+1", "y-2x=1"),
    ("y = -\\frac{1}{2}x+3", "x+2y=6"),
    ("3x-4y=12", "\\boxed{y=\\frac{3}{4}x-3}"),
    ("x^2+y^2=25", "x^2+y^2-25=0"),
    ("x^2+y^2=25", "25 = y^2+x^2"),
    ("x=5", "5=x"),
    ("(x-1)^2+y^2=4", "x^2-2x+y^2=3"),
    ("\\frac{x}{2}+\\frac{y}{3}=1", "3x+2y=6"),
    ("\\sqrt{1/n}", "n^{-1/2}"),
    ("\\frac{\\sqrt{x}}{x}", "\\frac{1}{\\sqrt{x}}"),
    ("\\ln(x^3)", "3\\ln x"),
    ("\\sqrt{xy}", "\\sqrt{x}\\sqrt{y}"),
    ("a\\sqrt{a}", "a^{3/2}"),
    ("\\mathrm{e}^2", "e^2"),
    ("e", "\\boxed{\\mathrm{e}}"),
    ("\\frac{1}{\\text{e}^2}", "e^{-2}"),
    ("\\mathrm{i}", "i"),
    ("\\frac{2}{1-i}", "1+i"),
    ("2+3\\mathrm{i}", "3i+2"),
    ("i^3", "-i"),
    ("-1", "i^2"),
    ("\\sqrt{-4}", "2i"),
    ("e^{i\\pi/2}", "i"),
    ("\\frac{1+i}{1-i}", "i"),
    ("510", "\\boxed{510}\n\nFinal: \\boxed{510}"),
    ("510", "$\\boxed{510}$ $\\boxed{510}$ $\\boxed{510}$"),
    ("x=2", "\\boxed{x=\\boxed{2}}"),
    ("\\frac12", "\\boxed{\\boxed{\\frac{1}{2}}}"),
    ("510", "\\boxed{510}\\boxed{510.0}"),
    ("0.5", "\\boxed{0.5} = \\boxed{\\frac12}"),
    ("\\frac{2022}{2023}", "\\boxed{\\frac{2022}{2023}}"),
    ("\\frac{2022}{2023}", "\\frac{4044}{4046}"),
    ("1.6e-19", "1.6\\times10^{-19}"),
    ("1.6e-19", "0.00000000000000000016"),
    ("1.60e-19", "1.6e-19"),
    ("6.63\\times 10^{-34}", "6.63e-34"),
    ("\\frac{1}{2^{87}}", "2^{-87}"),
    ("e^{-50}", "\\frac{1}{e^{50}}"),
    ("\\frac{1}{6^{30}}", "6^{-30}"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt{6}}"),
    ("\\sqrt{3+2\\sqrt{2}}", "1+\\sqrt{2}"),
    ("\\sin 15^\\circ", "\\frac{\\sqrt6-\\sqrt2}{4}"),
    ("\\cos\\frac{\\pi}{5}", "\\frac{1+\\sqrt5}{4}"),
    ("\\log_{10} 100", "2"),
    ("0", "\\sqrt{2}\\sqrt{3}-\\sqrt{6}"),
    ("B", "The correct option is B."),
    ("B", "Option B"),
    ("B", "The answer is option (B)."),
    ("C", "**C**"),
    ("C", "The correct choice is (C) 12."),
    ("A", "\\boxed{\\text{A}}"),
    ("D", "答案是D"),
    ("D", "正确选项为 D。"),
    ("B", "Answer: B. 12"),
    ("B", "The answer is choice B because it is larger."),
    ("\\frac{1}{n}", "\\boxed{\\frac{1}{n}, \\text{ where } n \\ge 1}"),
    ("(2,5)", "The answer is all real numbers between 2 and 5."),
    ("[2,5]", "x is between 2 and 5 inclusive"),
    ("(3,\\infty)", "all real numbers greater than 3"),
    ("[3,\\infty)", "x is at least 3"),
    ("x>3", "greater than 3"),
    ("(-\\infty,4]", "The answer is all x less than or equal to 4."),
    ("(3,\\infty)", "x > 3"),
    ("(2,5)", "strictly between 2 and 5"),
    ("(-\\infty,\\infty)", "all real numbers"),
    ("42", "答案是42"),
    ("42", "所以答案为 42 元。"),
    ("42", "答:一共有42个苹果。"),
    ("42", "因此,最终答案是:\\boxed{42}"),
    ("42", "一共有42个。"),
    ("3, 5", "答案是3或5。"),
    ("3", "答案为x=3"),
    ("3", "答案:x等于3"),
    ("0.5", "答案是0.5米"),
    ("x>3", "答案是x大于3"),
    ("50", "答案是50%"),
    ("12", "The answer is 12 meters."),
    ("1,000", "The answer is 1000."),
    ("18", "So she makes **$18** every day."),
    ("1/3", "0.3333333333333333"),
    ("2\\frac{1}{3}", "7/3"),
    ("5", "\\boxed{x = 5 \\text{ (the answer is correct)}}"),
]

WRONG = [
    ("61", "The answer is correct. 62"),
    ("61", "**62**"),
    ("61", "\\boxed{61} \\boxed{62}"),
    ("\\frac{2022}{2023}", "\\frac{2021}{2022}"),
    ("\\frac{1}{999999}", "\\frac{1}{1000000}"),
    ("2^{68}", "2^{68}+1"),
    ("2^{68}", "295147905179352825857"),
    ("10^{60}", "10^{60}+1"),
    ("\\binom{100}{50}", "\\binom{100}{49}"),
    ("100!", "100!+1"),
    ("\\frac{1}{2^{87}}", "\\frac{1}{2^{86}}"),
    ("1.6e-19", "9.1e-31"),
    ("1.6e-19", "0"),
    ("0", "1.6e-19"),
    ("1e-13", "2e-13"),
    ("e^{-50}", "0"),
    ("e^{-50}", "e^{-51}"),
    ("\\sqrt{10^{60}+1}", "10^{30}"),
    ("\\sqrt{2}", "1.4"),
    ("\\pi", "3.14"),
    ("y=2x+1", "y=2x-1"),
    ("2x+3y=6", "2x+3y=7"),
    ("x=5", "y=5"),
    ("y=2x", "x=2y"),
    ("x^2+y^2=25", "x^2+y^2=5"),
    ("|x|", "x"),
    ("\\sqrt{x^2}", "x"),
    ("x^8+x^9", "x^{17}"),
    ("i", "-i"),
    ("1+i", "1-i"),
    ("e", "2.7"),
    ("\\frac{1}{1+i}", "\\frac{1+i}{2}"),
    ("B", "The correct option is C."),
    ("(2,5)", "between 2 and 6"),
    ("(3,\\infty)", "x is at least 3"),
    ("[2,5]", "strictly between 2 and 5"),
    ("x^2", "x^3 for x > 0"),
    ("42", "答案是43"),
    ("3, 5", "答案是3或6。"),
    ("123456789", "123456788"),
    ("0.1234567", "0.1234568"),
    ("1.000001", "1.000002"),
    ("3^{50}", "3^{50}-1"),
    ("2^{100}+3^{100}", "2^{100}+3^{99}"),
    ("x^{30}", "x^{31}"),
    ("6.02e23", "6.03e23"),
    ("\\frac{10^{20}+1}{10^{20}}", "1"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{10}"),
    ("\\frac{1}{3}", "0.3333"),
    ("100000000.1", "100000000.2"),
    ("(1+10^{-20})\\pi", "\\pi"),
    ("\\sqrt[3]{7}", "\\sqrt[3]{7.0001}"),
    ("2\\pi+10^{-9}", "2\\pi"),
    ("5", "\\boxed{5, 5, 6}"),
    ("0.00001", "0"),
    ("10^{-10}", "10^{-11}"),
    ("5\\%", "0.5"),
]


def is_right(gold: str, completion: str) -> bool:
    result = GRADE("", completion, {"answer": gold})
    assert result.status == "ok", result.detail
    return result.value == 1.0


@pytest.mark.parametrize(("gold", "completion"), RIGHT)
def test_right(gold: str, completion: str) -> None:
    assert is_right(gold, completion)


@pytest.mark.parametrize(("gold", "completion"), WRONG)
def test_wrong(gold: str, completion: str) -> None:
    assert not is_right(gold, completion)


integers = st.integers(-(10**60), 10**60)
positive = st.integers(1, 10**60)


def as_latex(number: Fraction) -> str:
    return rf"{'-' if number < 0 else ''}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


@settings(deadline=None, max_examples=150, derandomize=True)
@given(integers, positive, positive, st.sampled_from([0, 0, 1, -1]))
def test_fractions_are_equal_when_they_are(top: int, bottom: int, factor: int, change: int) -> None:
    other = rf"\boxed{{\frac{{{top * factor + change}}}{{{bottom * factor}}}}}"
    assert is_right(as_latex(Fraction(top, bottom)), other) == (Fraction(top, bottom) == Fraction(top * factor + change, bottom * factor))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(integers, st.sampled_from([0, 1, -1]), st.booleans())
def test_integers_are_equal_when_all_digits_are(number: int, change: int, grouped: bool) -> None:
    other = number + change
    assert is_right(str(number), rf"\boxed{{{f'{other:,}' if grouped else other}}}") == (change == 0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 99), st.integers(2, 99), st.integers(0, 3), st.sampled_from([0, 0, 1, -1]))
def test_powers_are_equal_to_their_digits(base: int, exponent: int, added: int, change: int) -> None:
    assert is_right(f"{base}^{{{exponent}}}+{added}", rf"\boxed{{{base**exponent + added + change}}}") == (change == 0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 10**30), st.integers(2, 10**20), st.sampled_from([0, 0, 1, -1]))
def test_radicals_are_equal_when_their_squares_are(outside: int, inside: int, change: int) -> None:
    assert is_right(rf"{outside}\sqrt{{{inside}}}", rf"\boxed{{\sqrt{{{outside**2 * inside + change}}}}}") == (change == 0)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(-(10**12), 10**12), st.integers(1, 12), st.sampled_from([0, 0, 1, -1]))
def test_decimals_are_compared_by_the_digits_that_were_written(digits: int, places: int, change: int) -> None:
    gold = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}.{abs(digits) % 10**places:0{places}d}"
    assert is_right(gold, rf"\boxed{{{as_latex(Fraction(digits + change, 10**places))}}}") == (change == 0)
