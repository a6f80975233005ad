"""Words around an answer that do not change it, or that say it: qualifiers ("for x > 0"), options ("option B"), intervals in words, Chinese
prose. Everything works on tidied text, see `rewards.answers.numbers.tidy`."""

from __future__ import annotations

import re

_CHINESE = "\u4e00-\u9fff"
_CHINESE_WORDS = [
    (re.compile(rf"\s*{word}\s*"), meaning)
    for word, meaning in [("(?:大于等于|不小于)", r" \\ge "), ("(?:小于等于|不大于)", r" \\le "), ("大于", " > "), ("小于", " < "),
                          ("等于", " = "), ("(?:或者|或|和|与|以及|、)", ", "), ("负", " -")]
]  # fmt: skip
_QUALIFIER = re.compile(
    r"(?<=[\w)}\]])\s*[,;]?\s*\(?\s*\b(?:for|where|when|whenever|if|with|provided|assuming|given|such that|as long as|valid)\b"
    r"(?=.*(?:[<>=]|\\(?:[gl]e|ne|in)\b|\b(?:real|integers?|positive|negative|nonzero|nonnegative|natural|constants?|all|any|every|each)\b)).*$",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\s+)?\(?([A-J])\b\)?", re.IGNORECASE)
_SUBJECT = re.compile(
    r"^(?:(?:the\s+)?(?:set\s+of\s+)?(?:all|any|every)?\s*(?:real\s+)?(?:numbers?|values?|solutions?)?\s*(?:of\s+)?(?:\$?[a-zA-Z]\$?(?![a-zA-Z])\s*)?"
    r"(?:such that\s+\$?[a-z]\$?)?\s*(?:that\s+)?(?:is|are|lies?|must be|satisf(?:y|ies)ing)?\s*(?:in the interval\s*)?)(?=[a-z]{2})",
    re.IGNORECASE,
)
_END = r"(-?[^\s,;]+(?:\s*/\s*[^\s,;]+)?)"
_INTERVALS = [
    (re.compile(pattern, re.IGNORECASE), interval)
    for pattern, interval in [
        (rf"strictly between {_END} and {_END}", r"(\1,\2)"),
        (rf"between {_END} and {_END},?\s*\(?(?:inclusive|including (?:both )?(?:the )?end\s?points?)\)?", r"[\1,\2]"),
        (rf"between {_END} and {_END}(?:,?\s*\(?(?:exclusive|not inclusive|excluding (?:both )?(?:the )?end\s?points?)\)?)?", r"(\1,\2)"),
        (rf"from {_END} (?:to|through) {_END}(?:,?\s*\(?inclusive\)?)?", r"[\1,\2]"),
        (rf"(?:greater than or equal to|at least|no less than|not less than) {_END}", r"[\1,\\infty)"),
        (rf"(?:less than or equal to|at most|no (?:more|greater) than|not (?:more|greater) than) {_END}", r"(-\\infty,\1]"),
        (rf"(?:strictly )?(?:greater|larger|more|bigger) than {_END}", r"(\1,\\infty)"),
        (rf"(?:strictly )?(?:less|smaller|fewer) than {_END}", r"(-\\infty,\1)"),
        (r"(?:all |any |every )?real numbers?", r"(-\\infty,\\infty)"),
    ]
]


def without_wording(text: str) -> str:
    r"""An answer without what qualifies it or calls it an option, its Chinese words as symbols.

    Example:
        >>> without_wording(r"\frac{1}{n} for n > 0"), without_wording("option B, since 3 < 4"), without_wording("共42元")
        ('\\frac{1}{n}', 'B', '42')
    """
    if not text.isascii() and re.search(f"[{_CHINESE}]", text):
        text = _without_chinese(text)
    if " " not in text:
        return text
    option = _OPTION.match(text)
    if option:
        return option[1].upper()
    bare = _QUALIFIER.sub("", text).rstrip(" ,;(")
    return bare if re.search(r"\w", bare) and bare.count("(") == bare.count(")") and bare.count("{") == bare.count("}") else text


def interval_in_words(text: str) -> str | None:
    r"""The interval that a text in words names; None for any other text.

    Example:
        >>> interval_in_words("all real numbers greater than 3"), interval_in_words("x is between 2 and 5, inclusive")
        ('(3,\\infty)', '[2,5]')
    """
    for subject in (text, _SUBJECT.sub("", text)):
        for pattern, interval in _INTERVALS:
            found = pattern.fullmatch(subject.strip())
            if found:
                return found.expand(interval)
    return None


def _without_chinese(text: str) -> str:
    """Comparisons and lists in symbols; other words at both ends of the mathematics left out, unless there is nothing else."""
    symbols = text
    for word, meaning in _CHINESE_WORDS:
        symbols = word.sub(meaning, symbols)
    bare = re.sub(f"^[{_CHINESE}:,\\s]+|[{_CHINESE}\u3002,.\\s]+$", "", symbols)
    return bare if re.search(r"\w", bare) and not re.search(f"[{_CHINESE}]", bare) else text
