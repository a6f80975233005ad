"""Numbers as people and models write them: thousands, currency, percent, units, fractions, mixed numbers, LaTeX, small number words.

Everything is exact (`fractions.Fraction`) and linear in the length of the text. Integers and fractions are compared exactly, decimals by
the digits that were written: 0.333333 is 1/3 and 0.33 is not, nor is 9.1e-31 any other number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400  # of one number; more is not read
MAX_EXPONENT = 400  # of a power of ten in scientific notation
ROUNDED_DIGITS = 6  # significant ones that a decimal needs to stand for a number that it rounds
FLOAT_DIGITS = (16, 17)  # of a binary float written out, whose last ones are noise
FLOAT_NOISE = Fraction(1, 10**14)

_SYMBOLS = {
    0x2010: "-", 0x2011: "-", 0x2013: "-", 0x2212: "-",  # hyphens, en dash, minus sign
    0x00D7: r"\times ", 0x00B7: r"\cdot ", 0x22C5: r"\cdot ", 0x00F7: "/", 0x2044: "/", 0x2215: "/",
    0x03C0: r"\pi ", 0x221E: r"\infty ", 0x221A: r"\sqrt ", 0x00B1: r"\pm ", 0x2264: r"\le ", 0x2265: r"\ge ",
    0x2260: r"\ne ", 0x222A: r"\cup ", 0x2229: r"\cap ", 0x2208: r"\in ", 0x2248: r"\approx ", 0x00BA: "\u00b0",
    0x2019: "'", 0x200B: None, 0xFEFF: None,
}  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\boxed(?![a-zA-Z])", ""),
        (r"\\(?:text|mathrm|mathit|mathbf|operatorname)\*?\s*\{\s*([ei])\s*\}", r"{\1}"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])\.?", ""),
        (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname)\*?\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<!\\)\\!", ""),
        (r"\{,\}|\\,(?=\d{3}(?!\d))(?<=\d\\,)", ","),
        (r"(?<!\\)\\[,!;:> ]|~|\\q?quad(?![a-zA-Z])|\\thinspace|\\allowbreak", " "),
        (r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])", "°"),
        (r"\\%", "%"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*([0-9a-zA-Z])(?![a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\l?dots\b|\\cdots\b", "..."),
        (r"\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
        (r"\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"(?<!\\)\*\*", "^"),
    ]
]

_SCALES = {
    "%": Fraction(1, 100), "percent": Fraction(1, 100), "pct": Fraction(1, 100), "per cent": Fraction(1, 100),
    "hundred": Fraction(100), "thousand": Fraction(10**3), "million": Fraction(10**6), "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}  # fmt: skip
_UNIT_WORDS = (
    "mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; in inch inches; ft foot feet; yd yard; "
    "mi mile; mg milligram; g gram; kg kilogram; lb pound; oz ounce; ml mL milliliter millilitre; l L liter litre; ms millisecond; "
    "s sec second; min minute; h hr hour; day; week; month; year; $ dollar buck usd USD; cent; euro € EUR; £ GBP; ° deg degree; am a.m AM; "
    "pm p.m PM; mph; kmh km/h"
)
_UNITS = {name: group.split()[0] for group in _UNIT_WORDS.split(";") for name in group.split()}
_NOT_UNITS = re.compile(
    r"\b(?:or|and|pi|sqrt|sin|cos|tan|log|ln|exp|infty|inf|infinity|over|divided|times|plus|minus|choose|to|mod)\b", re.IGNORECASE
)

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?![\d/])|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE][-+]?\d+|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+))"
_CURRENCY = r"(?:\\?\$|€|£|¥|₹|(?:USD|EUR|GBP|Rs\.?)(?=[\s\d]))"
_FRACTION = rf"(?:\\frac\s*\{{\s*-?{_DECIMAL}\s*\}}\s*\{{\s*-?{_DECIMAL}\s*\}}|{_DECIMAL}\s*/\s*{_DECIMAL})"
_MIXED = r"(?:\d+(?:\s+and\s+|\s+)\d+\s*/\s*\d+|\d+\s*\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})"
_REPEATING = r"(?:\d*\.\d*\\overline\s*\{\s*\d+\s*\})"
_MAGNITUDE = rf"(?:{_MIXED}|{_FRACTION}|{_REPEATING}|{_DECIMAL}{_POWER}?)"
_SIGN = r"(?:[-+]|(?:minus|negative)\s)"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN}?)\s*(?P<currency>{_CURRENCY}?)\s*(?P<inner>[-+]?)\s*(?P<magnitude>{_MAGNITUDE})(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_TOKEN = re.compile(
    rf"(?:(?<![\w)\]}}.\\])-\s?|\b(?:minus|negative)\s)?(?:{_CURRENCY}-?)?"
    rf"(?:\d{{1,2}}:\d{{2}}(?!\d)(?:\s?[ap]\.?m\b)?|\d+(?::\d+)+|\d+/\d+/\d+|\d{{4}}-\d{{2}}-\d{{2}}|{_MAGNITUDE})(?:\s?(?:%|percent\b))?",
    re.IGNORECASE,
)
_UNIT = re.compile(r"[A-Za-z°$€£.\-'()/]+(?:\^?\{?[23]\}?)?(?:[\s/]+[A-Za-z°.\-'()]+(?:\^?\{?[23]\}?)?){0,7}")
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})(?:[-\s]({'|'.join(list(_WORDS)[1:10])}))?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number with what was written beside it: `value` times `scale` (1/100 for percent, 10**6 for million) in `unit`.

    Of a decimal, `step` is the worth of the last digit that was written and `digits` counts the significant ones; 0 of what is exact.
    """

    value: Fraction
    scale: Fraction = Fraction(1)
    unit: str = ""
    step: Fraction = Fraction(0)
    digits: int = 0


def tidy(text: str) -> str:
    """The same mathematics in one spelling: ASCII digits and signs, plain LaTeX without spacing and font commands.

    Example:
        >>> tidy(r"\\left(1{,}000,\\ \\dfrac12\\right)")
        '(1,000, \\\\frac{1}{2})'
    """
    # NFKC would turn x² into x2 and 2½ into 21/2.
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + "".join(_SUPERSCRIPTS[digit] for digit in run.group()) + "}", text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def parse_number(text: str) -> Number | None:
    """The number that the whole of a tidied text says, units and currency included; None for anything else.

    Example:
        >>> parse_number("$1,234.50 per week")
        Number(value=Fraction(2469, 2), scale=Fraction(1, 1), unit='$', step=Fraction(1, 100), digits=6)
    """
    text = text.strip().removesuffix(".").strip()
    while len(text) > 1 and text[0] + text[-1] in ("()", "{}", "$$") and "," not in text:
        text = text[1:-1].strip()
    if not any(character.isdigit() for character in text[:200]):
        text = _digits_for_words(text)
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["inner"]):
        return None
    value = _magnitude(found["magnitude"])
    scaled = _scale_and_unit(found["rest"])
    if value is None or scaled is None:
        return None
    negative = found["sign"].strip().lower() in ("-", "minus", "negative") or found["inner"] == "-"
    scale, unit = scaled
    currency = found["currency"].lstrip("\\")
    unit = _UNITS.get(currency, currency) if currency else unit
    return Number(-value if negative else value, scale, unit, *_precision(found["magnitude"]))


def same_number(a: Number, b: Number) -> bool:
    """Whether two numbers are equal: integers and fractions exactly, decimals by the digits that were written.

    A percent sign or a scale word may be missing on one side (50% is 50 and 0.5; 0.5 is not 50). Units count only when both sides have
    one that is known.
    """
    if a.unit != b.unit and _known(a.unit) and _known(b.unit):
        return False
    if _same(a, b, a.scale, b.scale):
        return True
    return (a.scale == 1) != (b.scale == 1) and _same(a, b)


def last_number(text: str) -> str | None:
    """The last number of a tidied prose text as it is written there, a time, ratio or date as one; None without any."""
    found = deque(_TOKEN.finditer(text), maxlen=1)
    return _written(found[0]) if found else None


def first_number(text: str) -> str | None:
    """The first number of a tidied prose text as it is written there; None without any."""
    found = _TOKEN.search(text)
    return _written(found) if found else None


def _written(found: re.Match[str]) -> str:
    return found.group().strip().rstrip(".")


def _same(a: Number, b: Number, scale_a: Fraction = Fraction(1), scale_b: Fraction = Fraction(1)) -> bool:
    """Whether two numbers are equal, or one is a decimal of enough digits that rounds or cuts off the other."""
    left, right = (a.value * scale_a, a.step * scale_a, a.digits), (b.value * scale_b, b.step * scale_b, b.digits)
    if left[0] == right[0]:
        return True
    (value, _, digits), (decimal, step, decimal_digits) = sorted((left, right), key=lambda side: side[1])
    if not step or (digits and digits < ROUNDED_DIGITS):
        return False
    difference = abs(value - decimal)
    if sum(FLOAT_DIGITS[0] <= count <= FLOAT_DIGITS[1] for count in (digits, decimal_digits)) == 1:
        return difference <= FLOAT_NOISE * max(abs(value), abs(decimal))
    cut_off = abs(decimal) < abs(value) and difference < step
    return decimal_digits >= ROUNDED_DIGITS and (difference <= step / 2 or cut_off)


def _precision(magnitude: str) -> tuple[Fraction, int]:
    """(worth of the last digit, number of significant digits) of a decimal; zeros for anything else."""
    found = re.fullmatch(rf"({_DECIMAL})({_POWER}?)", magnitude)
    if found is None or ("." not in found[1] and not found[2]):
        return Fraction(0), 0
    digits = re.sub(r"[,\s]", "", found[1])
    exponent = re.search(r"[-+]?\d+\s*\}?$", found[2])
    power = (int(exponent.group().strip(" }")) if exponent else 0) - len(digits.partition(".")[2])
    return Fraction(10) ** power, len(digits.replace(".", "").lstrip("0"))


def _magnitude(text: str) -> Fraction | None:
    """The exact value of a mixed number, fraction, repeating or plain decimal; None where the text is none, or too long."""
    mixed = re.fullmatch(r"(\d+)(?:\s+and\s+|\s*)(\d+\s*/\s*\d+|\\frac.*)", text) if re.fullmatch(_MIXED, text) else None
    if mixed:
        part = _magnitude(mixed[2])
        return None if part is None or len(mixed[1]) > MAX_DIGITS else int(mixed[1]) + part
    if re.fullmatch(_FRACTION, text):
        top, bottom = re.findall(rf"-?{_DECIMAL}", text)
        top, bottom = _decimal(top), _decimal(bottom)
        return None if top is None or not bottom else top / bottom
    if re.fullmatch(_REPEATING, text):
        head, tail = re.fullmatch(r"(.*)\\overline\s*\{\s*(\d+)\s*\}", text).groups()
        places = len(head.partition(".")[2])
        if len(head) + len(tail) > MAX_DIGITS:
            return None
        return (_decimal(head) if head != "." else Fraction(0)) + Fraction(int(tail), (10 ** len(tail) - 1) * 10**places)
    found = re.fullmatch(rf"({_DECIMAL})({_POWER}?)", text)
    value = _decimal(found[1])
    exponent = re.search(r"[-+]?\d+\s*\}?$", found[2])
    if value is None or exponent is None:
        return value
    power = exponent.group().strip(" }")
    return None if len(power) > 4 or abs(int(power)) > MAX_EXPONENT else value * Fraction(10) ** int(power)


def _decimal(text: str) -> Fraction | None:
    digits = re.sub(r"[,\s]", "", text)
    return Fraction(digits + "0" if digits.endswith(".") else digits) if len(digits) <= MAX_DIGITS else None


def _scale_and_unit(rest: str) -> tuple[Fraction, str] | None:
    """What follows the digits as (scale, unit); None where it is not a unit but more mathematics."""
    text = re.sub(r"\s*\^\s*\{?([23])\}?", r"^\1", rest.strip())
    scale = Fraction(1)
    for word, factor in _SCALES.items():
        if text.lower().startswith(word) and not text[len(word) : len(word) + 1].isalpha():
            scale, text = factor, text[len(word) :].strip()
            break
    if not text:
        return scale, ""
    words = re.findall(r"[A-Za-z.]+|[°$€£]", text)
    if not _UNIT.fullmatch(text) or not words or _NOT_UNITS.search(text):
        return None
    first, caret, power = text.split()[0].strip("()").partition("^")
    known = _UNITS.get(first) or _UNITS.get(first.rstrip(".")) or _UNITS.get(first.lower().rstrip(".").removesuffix("s"))
    # A letter right after digits is a factor, as in 5x and 5m, and so is an unknown short one after a space.
    glued = len(words[0]) == 1 and words[0].isalpha() and not rest[0].isspace()
    unknown = len(words) == 1 and len(words[0].strip(".")) < 3 and words[0][0].isalpha() and known is None
    return None if glued or unknown else (scale, known + caret + power if known else text)


def _known(unit: str) -> bool:
    return unit.partition("^")[0] in _UNITS


def _digits_for_words(text: str) -> str:
    found = _WORD.findall(text)
    if len(found) != 1:
        return text
    tens, ones = found[0]
    return _WORD.sub(str(_WORDS[tens.lower()] + _WORDS[ones.lower() or "zero"]), text)
