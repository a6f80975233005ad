"""Mathematics in English and Chinese words: inequalities, sets of numbers, qualifiers, letters of choices."""

from __future__ import annotations

import re

_BE = r"(?:(?:is|are|be|must be|can be|should be|would be|has to be|being)\s+)?"
_MORE, _LESS = r"(?:greater|more|larger|bigger|higher)", r"(?:less|fewer|smaller|lower)"
_ALL = r"\b(?:all|any|every|the set of(?: all)?)\s+(?:strictly )?"
_REALS = r" (?:real )?(?:numbers?|reals?)\b"
_PHRASES = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in [
        (r"\b(?:no (?:real )?(?:solutions?|roots?|values?)(?: exists?)?|(?:the )?empty set|none)\b", r"\\emptyset "),
        (r"\\varnothing(?![a-zA-Z])|无解|空集", r"\\emptyset "),
        (r"\b(?:infinity|inf|oo)\b|无穷大?", r"\\infty "),
        (r"大于或?等于|不小于|至少", r" \\ge "),
        (r"小于或?等于|不大于|不超过|至多", r" \\le "),
        (r"不等于", r" \\ne "),
        (r"大于", " > "),
        (r"小于", " < "),
        (r"等于|[是为](?=\s*[-\d\\(])", " = "),
        (r"或者?", " or "),
        (r"[且和与]", " and "),
        (r"、", ", "),
        (r"(?:所有|全体|任意)?的?实数集?", r"\\mathbb{R}"),
        (rf"{_BE}\b(?:{_MORE} than or equals? to|at least|(?:no|not) less than)\b", r" \\ge "),
        (rf"{_BE}\b(?:{_LESS} than or equals? to|at most|(?:no|not) (?:more|greater) than)\b", r" \\le "),
        (rf"{_BE}\bnot equal to\b", r" \\ne "),
        (rf"{_BE}\b(?:strictly )?{_MORE} than\b|\bexceeds\b", " > "),
        (rf"{_BE}\b(?:strictly )?{_LESS} than\b", " < "),
        (r"\b(?:is )?equal to\b|\bequals\b", " = "),
        (
            r"\b(?:all|any|every|the set of(?: all)?|the) (?:real )?(?:numbers?|values|reals?|x)(?: of [a-z])?"
            r" (?:except|but|other than)(?: for)?\b\s*(?:[a-z]\s*=)?",
            r" \\ne ",
        ),
        (rf"{_ALL}positive{_REALS}", r"(0,\\infty)"),
        (rf"{_ALL}negative{_REALS}", r"(-\\infty,0)"),
        (rf"{_ALL}non-?negative{_REALS}", r"[0,\\infty)"),
        (rf"{_ALL}non-?positive{_REALS}", r"(-\\infty,0]"),
        (r"\b(?:all|any|every|the set of(?: all)?|the)\s+(?:real numbers?|reals)\b(?!\s*(?:[a-z]{3}|\\[gln]e|[<>]))", r"\\mathbb{R}"),
    ]
]
_BETWEEN = re.compile(
    r"(?:(?:all (?:real )?(?:numbers|values)|any (?:real )?number)\s+)?(?:([a-zA-Z])\s+)?(?:(?:is|are|lies|must be|strictly)\s+)*"
    r"(between|from)\s+(\S[^,]*?)\s+(?:and|to)\s+(\S[^,]*?)(?:,?\s*\(?(inclusive|exclusive|both included|both excluded)\)?)?",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"^(?:all|any|every|the)?\s*(?:(?:real|possible)\s+)?(?:numbers?|values?)\s+(?:of\s+)?(?:([a-zA-Z])\s+)?(?=\\[gln]e|[<>])"
    r"|^(?:all|any|every)\s+(?=[a-z]\s*(?:\\[gln]e|[<>]))"
)
_SUCH_THAT = re.compile(r"^\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid|\||:)\s*(.+?)\s*\\\}$")
_QUALIFIER = re.compile(
    r"(?:,\s*|\s+|\s*\(\s*)(?:\\?(?:qquad|quad)\s*)?"
    r"(?:for(?! example)|where|when(?:ever)?|if|with|as|since|because|assuming|given|provided|such that|\\forall)(?![a-zA-Z])"
    r"\s*(.+?)\s*\)?$|\s*[,(]\s*(?:其中|当|因为|由于)(.+?)\)?$",
    re.IGNORECASE | re.DOTALL,
)
_TRAILING_RELATION = re.compile(
    r"^([^,]*[a-zA-Z)}\d][^,]*?)\s*(?:,|\()\s*([a-zA-Z]\s*(?:\\[gln]e(?![a-z])|[<>]|\\in(?![a-z])|\\ne(?![a-z]))[^,]+?)\)?$"
)
_STATED = re.compile(
    r"(?:\b(?i:answer|option|choice|letter|choose|select|pick|correct(?: one)?)\b|选项?|答案)[^A-Za-z\n.。]{0,6}"
    r"(?:(?i:is|are|was|be|must be|letter|option|choice)\s+){0,4}[^A-Za-z\n]{0,6}([A-J])(?![A-Za-z'])(?!\s+[a-z]+\s+(?:is|are|of)\b)"
    r"|\b([A-J])\b(?=[^A-Za-z\n]{0,4}\s*(?i:is (?:the )?(?:correct|right|answer|best)))"
)
_ALONE = re.compile(r"\(([A-J])\)|(?<![A-Za-z'\\{}=+*/^_-])([B-HJ])(?![A-Za-z'}=+*/^_])|(?<![A-Za-z'\\])A(?=\s*[.)。,]|\s*$)")


def in_symbols(text: str) -> str:
    """Phrases such as "at least 2" or "all real numbers except 3" as LaTeX; text without such words stays as it is.

    Example:
        >>> in_symbols("x is greater than or equal to 2").split()
        ['x', '\\\\ge', '2']
    """
    if not re.search(r"[a-zA-Z]{2}|[\u4e00-\u9fff、]", text):
        return text
    between = _BETWEEN.fullmatch(text.strip())
    if between and (between[2].lower() == "between" or between[5]):
        closed = (between[5] or "exclusive").lower() in ("inclusive", "both included")
        return f"{'[' if closed else '('}{between[3]}, {between[4]}{']' if closed else ')'}"
    such = _SUCH_THAT.match(text)
    if such:
        text = such[2]
    for pattern, replacement in _PHRASES:
        text = pattern.sub(replacement, text)
    return _LEADING.sub(lambda found: f"{found[1] or ''} ", text)


def without_qualifier(text: str) -> tuple[str, str]:
    """An answer without the condition under which it holds, and the condition; a relation is an answer of its own.

    Example:
        >>> without_qualifier("1/x for x > 0")
        ('1/x', 'x > 0')
    """
    found = _QUALIFIER.search(text)
    if found and found.start() and re.search(r"[\w})]", text[: found.start()]) and "\\begin" not in text:
        return text[: found.start()], found[1] or found[2]
    trailing = _TRAILING_RELATION.match(text)
    if trailing and not re.search(r"[<>]|\\(?:[gln]e|in)(?![a-z])|^[(\[]", trailing[1]):
        return trailing[1], trailing[2]
    return text, ""


def choice(text: str) -> str | None:
    """The letter of a choice that a text names last: "the answer is (B)", "option C is correct", "选B"; None without one."""
    stated = [found[1] or found[2] for found in _STATED.finditer(text)]
    if stated:
        return stated[-1]
    alone = [found[1] or found[2] or "A" for found in _ALONE.finditer(text)]
    return alone[-1] if alone else None
