"""Numbers as people and models write them: thousands, currency, percent, units, fractions, mixed numbers, LaTeX, small number words.

Everything is exact (`fractions.Fraction`) and linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

MAX_DIGITS = 400  # of one number; more is not read
MAX_EXPONENT = 400  # of a power of ten in scientific notation
ROUNDED = Fraction(1, 10**6)  # the last place of a decimal that may stand for the number which it rounds
ROUNDED_DIGITS = 6  # and how many digits it must have after its zeros

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
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])\.?", ""),
        (r"\\(?:text|textrm|textup|mathrm|mathit|mathbf|operatorname)\s*\{\s*([ei])\s*\}|\\(i)math(?![a-zA-Z])", r"{\1\2}"),
        (r"\\(?:mathbf|mathrm|boldsymbol|bm|bold|pmb|textbf)(?=\s*\{[^{}]*\{)|\\(?:bf|bfseries|rm|it)(?![a-zA-Z])", " "),
        (r"\{([^{}]*?)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (
            r"\\(?:text(?:bf|it|rm|normal|up|sf)?|math(?:rm|bf|it|sf)|boldsymbol|bm|bold|pmb|emph|[mh]box|operatorname)\*?\s*\{([^{}]*)\}",
            r" \1 ",
        ),
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
    "s sec second; min minute; h hr hour; day; week; month; year; $ dollar buck usd USD; cent; euro € EUR; £ GBP; ¥ CNY yuan; "
    "° deg degree; am a.m AM; pm p.m PM; mph; kmh km/h"
)
_UNITS = {name: group.split()[0] for group in _UNIT_WORDS.split(";") for name in group.split()}
_CHINESE_UNITS = {
    "毫米": "mm", "厘米": "cm", "米": "m", "千米": "km", "公里": "km", "克": "g", "千克": "kg", "公斤": "kg", "毫升": "ml", "升": "l",
    "秒": "s", "分钟": "min", "小时": "h", "天": "day", "周": "week", "月": "month", "年": "year", "元": "yuan", "美元": "dollar",
    "美分": "cent", "欧元": "euro", "度": "degree", "平方厘米": "cm^2", "平方米": "m^2", "立方厘米": "cm^3", "立方米": "m^3",
}  # fmt: skip
_CHINESE_SCALES = {"百万": 10**6, "千万": 10**7, "万": 10**4, "亿": 10**8}
_CHINESE_END = re.compile(r"(?<=[\d}%)])\s*(百万|千万|万|亿)?([\u4e00-\u9fff]{0,6})$")
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
_SQUARED = re.compile(r"(?<=[a-zA-Z])\^\{?[23]\}?(?![\d\w])")  # of a unit
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
NUMBER_WORD = re.compile(rf"\b({'|'.join(_WORDS)})(?:[-\s]({'|'.join(list(_WORDS)[1:10])}))?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number with what was written beside it: `value` times `scale` (1/100 for percent, 10**6 for million) in `unit`.

    `place` is the worth of the last digit of a decimal (1/100 for 0.25, times no scale) and None for all other numbers.
    """

    value: Fraction
    scale: Fraction = Fraction(1)
    unit: str = ""
    place: Fraction | None = field(default=None, repr=False)


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
        Number(value=Fraction(2469, 2), scale=Fraction(1, 1), unit='$')
    """
    text = _latin_unit(text.strip().removesuffix(".").strip())
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
    return Number(-value if negative else value, scale, _UNITS.get(currency, currency) if currency else unit, _place(found["magnitude"]))


def same_number(a: Number, b: Number) -> bool:
    """Whether two numbers are equal: exactly, or one is a decimal of six digits or more that rounds or cuts the other in its last digit.

    A percent sign or a scale word may be missing on one side (50% is 50 and 0.5; 0.5 is not 50). Units count only when both sides have
    one that is known.
    """
    if a.unit != b.unit and _known(a.unit) and _known(b.unit):
        return False
    if _close(a, b, a.scale, b.scale):
        return True
    return (a.scale == 1) != (b.scale == 1) and _close(a, b, Fraction(1), Fraction(1))


def last_number(text: str) -> str | None:
    """The last number of a tidied prose text as it is written there, a time, ratio or date as one; None without any."""
    found = deque(_TOKEN.finditer(_SQUARED.sub("", text) if "^" in text else text), maxlen=1)
    return _written(found[0]) if found else None


def first_number(text: str) -> str | None:
    """The first number of a tidied prose text as it is written there; None without any."""
    found = _TOKEN.search(_SQUARED.sub("", text) if "^" in text else text)
    return _written(found) if found else None


def _written(found: re.Match[str]) -> str:
    return found.group().strip().rstrip(".")


def _close(a: Number, b: Number, scale_a: Fraction, scale_b: Fraction) -> bool:
    if a.value * scale_a == b.value * scale_b:
        return True
    decimals = [
        (place * scale, number.value * scale, other.value * other_scale)
        for number, place, scale, other, other_scale in ((a, a.place, scale_a, b, scale_b), (b, b.place, scale_b, a, scale_a))
        if place
    ]
    return bool(decimals) and _rounds(*max(decimals))  # of two decimals only the shorter one can be the other's rounding


def _rounds(place: Fraction, decimal: Fraction, exact: Fraction) -> bool:
    """Whether `decimal`, whose last digit is worth `place`, is `exact` rounded or cut there."""
    error = abs(exact) - abs(decimal)
    long_enough = place <= ROUNDED and abs(decimal) >= place * 10 ** (ROUNDED_DIGITS - 1)
    return long_enough and decimal * exact > 0 and -place / 2 <= error < place


def _place(text: str) -> Fraction | None:
    """What the last digit of a decimal such as 1.6e-19 is worth; None for other numbers."""
    found = re.fullmatch(rf"(?:\d[\d, ]*)?\.(\d+)({_POWER}?)", text)
    if found is None:
        return None
    exponent = re.search(r"[-+]?\d+\s*\}?$", found[2])
    return Fraction(10) ** ((int(exponent.group().strip(" }")) if exponent else 0) - len(found[1]))


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


def _latin_unit(text: str) -> str:
    """A number with a Chinese scale or unit (3万元, 5厘米, 61个) with those of English; an unknown counter is left out."""
    if not text or not "\u4e00" <= text[-1] <= "\u9fff":
        return text
    found = _CHINESE_END.search(text)
    if found is None:
        return text
    scale = rf"\times 10^{{{len(str(_CHINESE_SCALES[found[1]])) - 1}}}" if found[1] else ""
    return f"{text[: found.start()]}{scale} {_CHINESE_UNITS.get(found[2], '')}".strip()


def _known(unit: str) -> bool:
    return unit.partition("^")[0] in _UNITS


def _digits_for_words(text: str) -> str:
    found = NUMBER_WORD.findall(text)
    if len(found) != 1:
        return text
    tens, ones = found[0]
    return NUMBER_WORD.sub(str(_WORDS[tens.lower()] + _WORDS[ones.lower() or "zero"]), text)
