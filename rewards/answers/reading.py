"""An answer in its structure: number, named value, interval, several values, or an expression as text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from rewards.answers.final_answer import MAX_ANSWER, plain_text
from rewards.answers.numbers import Number, parse_number, tidy
from rewards.answers.symbolic import FUNCTIONS, RELATION, Unreadable
from rewards.answers.words import in_symbols, without_qualifier

MAX_DEPTH = 7  # of brackets
MAX_PARTS = 50  # elements of a list

_INTEGER = re.compile(r"\s*(-?[0-9]{1,18})\s*")
_NAME = re.compile(
    r"\(?(\\?[a-zA-Z](?:_(?:\w|\{\w+\}))?'?(?:\([a-zA-Z](?:,\s*[a-z])*\))?|\\[a-z]+(?:_(?:\w|\{\w+\}))?|m?\s*\\angle\s*[A-Z]+|[A-Z]{2,3}"
    r"|\([a-z](?:,\s*[a-z])+\))\s*(?::?=|\\in(?![a-z]))\s*(?!=)(.+)",
    re.DOTALL,
)
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/()$%^{}]|\\times|\\cdot|\\div|\\frac")
_VARIABLE = r"(\\?[a-zA-Z]+(?:_\{?\w\}?)?(?:\([a-zA-Z]\))?)"
_RELATION = r"\s*(\\[gl]e(?![a-z])|\\[gl]t(?![a-z])|[<>]=?)\s*"
_FROM_BOTH_SIDES = re.compile(rf"([^<>=]+?){_RELATION}{_VARIABLE}{_RELATION}([^<>=]+)")
_FROM_ONE_SIDE = re.compile(rf"(?:{_VARIABLE}\s*)?{_RELATION}([^<>=]+)")
_FROM_THE_LEFT = re.compile(rf"([^<>=]+?){_RELATION}{_VARIABLE}")
_OTHER_THAN = re.compile(rf"(?:{_VARIABLE}\s*)?\\ne(?![a-z])\s*([^<>=]+)")
_FLIPPED = {"<": ">", ">": "<", "[": "]"}


@dataclass(frozen=True)
class Answer:
    """An answer that was read: `number` for a plain number, `parts` for several in `kind`.

    `kind` is list, set, union, ":" (a time or ratio), "~" (the same exactly and rounded), or the brackets of a tuple or interval as "(]".
    `qualifier` is what an answer is said to hold for, as in "1/x for x > 0".
    """

    text: str
    number: Number | None = None
    kind: str = ""
    parts: tuple[Answer, ...] = ()
    name: str = ""
    qualifier: str = ""


def read(text: str, words: bool = True) -> Answer:
    """An answer in its structure. With `words` phrases such as "at least 2" and "all real numbers" are read as mathematics.

    Example:
        >>> [part.text for part in read("x = 2 or x = 3").parts]
        ['2', '3']

    Raises:
        Unreadable: nothing is there, the brackets do not match, or it is too long.
    """
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"longer than {MAX_ANSWER} characters")
    if integer := _INTEGER.fullmatch(text):  # most answers of grade-school mathematics
        return Answer(integer[1], Number(Fraction(int(integer[1]))))
    plain = bare(tidy(plain_text(text)))
    if not re.search(r"[\w°]|\\[a-z]", plain):
        raise Unreadable("empty")
    number = parse_number(plain)
    if number is not None:
        return Answer(plain, number)
    _check_brackets(plain)
    head, qualifier = without_qualifier(plain)
    if not words:
        return _read(bare(head) if RELATION.search(qualifier) else plain)
    return replace(_read(bare(in_symbols(head))), qualifier=bare(in_symbols(qualifier)) if qualifier else "")


def _read(text: str) -> Answer:
    """An answer's text as what is compared: a number, a list, a text, else an expression; of an equation what it says of its last side."""
    text = re.sub(r"\b(\d{1,2}):00(?=\s*[ap]\.?m)", r"\1", bare(text), flags=re.IGNORECASE)
    number = parse_number(text)
    if number is not None:
        return Answer(text, number)
    sides = [bare(side) for side in split(text, ["\\approx"])]
    if len(sides) == 2 and all(sides):
        exact = _read(sides[0])
        return _read(sides[1]) if re.fullmatch(_VARIABLE, sides[0]) else Answer(text, kind="~", parts=(exact, _read(sides[1])))
    sides = split(text, ["="])
    if len(sides) > 1 and not _ARITHMETIC.sub("", "".join(sides[:-1])) and (len(sides) > 2 or not re.search(r"[a-zA-Z]", sides[-1])):
        return _read(sides[-1])
    parts = _listed(text)
    if parts:
        return _merged(Answer(text, kind="list", parts=tuple(map(_read, parts))))
    return _named(text, sides) or _interval(text) or _several(text) or _bracketed(text) or Answer(text)


def _named(text: str, sides: list[str]) -> Answer | None:
    """A value with its name: "x = 5", "5 = x", "x \\in (2, 3)", "x = 2 + 3 = 5"."""
    if len(sides) == 2 and re.fullmatch(r"\s*[a-zA-Z]\s*", sides[1]) and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-z]+", "", sides[0])):
        text = f"{sides[1]} = {sides[0]}"
    if len(sides) > 2 and re.fullmatch(r"\s*[a-zA-Z](?:_\{?\w\}?)?\s*", sides[0]) and not re.search(r"[<>]", text):
        text = f"{sides[0]} = {sides[-1]}"
    named = _NAME.fullmatch(text)
    if named is None or re.search(r"[=<>]", named[2]):
        return None
    return replace(_read(named[2]), name=named[1].split("(")[0])


def _several(text: str) -> Answer | None:
    """A union, the two values of a plus-minus, or a time or ratio."""
    sides = split(text, [r"\cup"])
    if len(sides) > 1:
        return _merged(Answer(text, kind="union", parts=tuple(map(_read, sides))))
    if text.count(r"\pm") == 1:
        return Answer(text, kind="list", parts=tuple(_read(text.replace(r"\pm", sign).strip().removeprefix("+")) for sign in "+-"))
    clock = re.fullmatch(r"(\d+(?:\s*:\s*\d+)+)\s*(?:([ap])\.?m)?", text, re.IGNORECASE)
    if clock:
        return Answer(text, kind=":", parts=tuple(map(_read, clock[1].split(":"))), name=(clock[2] or "").lower())
    return None


def _interval(text: str) -> Answer | None:
    r"""An inequality of one variable against constants as an interval, and `x \ne 2` as two."""
    if re.fullmatch(r"\\mathbb\s*\{?\s*R\s*\}?", text):
        return Answer(text, kind="()", parts=(Answer(r"-\infty"), Answer(r"\infty")))
    both = _FROM_BOTH_SIDES.fullmatch(text)
    if both and _strict(both[2])[0] == _strict(both[4])[0]:
        low, high = (both[1], both[5]) if _strict(both[2])[0] == "<" else (both[5], both[1])
        first, second = (both[2], both[4]) if _strict(both[2])[0] == "<" else (both[4], both[2])
        return _from(text, low, "(" if _strict(first)[1] else "[", high, ")" if _strict(second)[1] else "]", both[3])
    other = _OTHER_THAN.fullmatch(text)
    if other and not re.search(r"[a-zA-Z]", FUNCTIONS.sub("", re.sub(r"\\[a-z]+", "", other[2]))):
        parts = (_from(text, r"-\infty", "(", other[2], ")", ""), _from(text, other[2], "(", r"\infty", ")", ""))
        return Answer(text, kind="union", parts=parts, name=other[1] or "")
    right = _FROM_ONE_SIDE.fullmatch(text)
    left = None if right else _FROM_THE_LEFT.fullmatch(text)
    if not (right or left):
        return None
    name, relation, value = right.groups() if right else (left[3], left[2], left[1])
    if re.search(r"(?<!\\)[a-zA-Z]", re.sub(r"\\[a-z]+|(?<![a-zA-Z])[ei](?![a-zA-Z])", "", value)):
        return None
    sign, strict = _strict(relation)
    if left:
        sign = _FLIPPED[sign]
    if sign == ">":
        return _from(text, value, "(" if strict else "[", r"\infty", ")", name or "")
    return _from(text, r"-\infty", "(", value, ")" if strict else "]", name or "")


def _from(text: str, low: str, opening: str, high: str, closing: str, name: str) -> Answer:
    return Answer(text, kind=opening + closing, parts=(_read(low), _read(high)), name=name)


def _strict(relation: str) -> tuple[str, bool]:
    """The direction of a relation, and whether it is strict."""
    return ("<" if relation[0] == "<" or relation.startswith("\\l") else ">"), not relation.endswith(("=", "e"))


def _merged(answer: Answer) -> Answer:
    """Two half lines that were joined by "and" as the interval in which they meet: "x > 1 and x < 3"."""
    if answer.kind != "list" or len(answer.parts) != 2 or not re.search(r"\band\b", answer.text):
        return answer
    ends = {part.parts[0].text == r"-\infty": part for part in answer.parts if len(part.parts) == 2 and part.kind[0] in "(["}
    if len(ends) < 2 or ends[False].parts[1].text != r"\infty" or ends[False].name != ends[True].name:
        return answer
    low, high = ends[False].parts[0], ends[True].parts[1]
    if low.number and high.number and low.number.value >= high.number.value:
        return answer
    return Answer(answer.text, kind=ends[False].kind[0] + ends[True].kind[1], parts=(low, high), name=ends[True].name)


def _listed(text: str) -> list[str]:
    """The elements of a list without brackets; empty for anything else. A comma before three digits belongs to the number."""
    guarded = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "\0", text)
    parts = [part.replace("\0", ",").strip() for part in split(guarded, [", and ", ", or ", " and ", " or ", ",", ";"])]
    return parts if 1 < len(parts) <= MAX_PARTS and all(parts) else []


def _bracketed(text: str) -> Answer | None:
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    inner = text[2:-2] if is_set else text[1:-1]
    if not is_set and (len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or depth_falls_to_zero(text)):
        return None
    parts = [part.strip() for part in split(inner, [",", ";"])]
    if len(parts) > MAX_PARTS or not all(parts):
        return None
    if len(parts) == 1:
        return _read(inner) if is_set or text[0] + text[-1] == "()" else None
    return Answer(text, kind="set" if is_set else text[0] + text[-1], parts=tuple(map(_read, parts)))


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


def split(text: str, separators: list[str]) -> list[str]:
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


def depth_falls_to_zero(text: str) -> bool:
    """Whether the first bracket closes before the end, as in (a)(b)."""
    depth = 0
    for character in text[:-1]:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return True
    return False


def bare(text: str) -> str:
    """Without the white space, dollar signs, braces and full stops around an answer."""
    while True:
        before = text
        text = text.strip().rstrip(".,;?。").strip().strip("*_`").strip()
        if len(text) > 1 and text[0] == text[-1] == "$":
            text = text.strip("$")
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(opening) and text.endswith(closing):
                text = text[2:-2]
        if text.startswith("{") and text.endswith("}") and not depth_falls_to_zero(text):
            text = text[1:-1]
        text = re.sub(r"^(?:\\approx|\\therefore|=|:)\s*", "", text)
        if text == before:
            return text


def key(text: str) -> str:
    """What two spellings of the same answer share: no spaces, and no case where there are words."""
    short = re.sub(r"[\s$]|\\(?=[$ ])|(?<=\d),(?=\d{3}(?!\d))", "", text)
    short = re.sub(r"([_^])\{(\w)\}", r"\1\2", short)
    if re.fullmatch(r"\([A-Za-z]\)", short):
        short = short[1]
    return short.lower() if is_words(text) else short


def is_words(text: str) -> bool:
    """Whether a text is words without mathematics in it."""
    return (
        not re.search(r"[\\^=<>+*/]|\d", text)
        and re.search(r"[a-zA-Z]{2,}|[\u4e00-\u9fff]", text) is not None
        and not FUNCTIONS.search(text)
    )
