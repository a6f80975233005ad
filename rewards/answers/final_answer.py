r"""Where the answer of a completion stands: `\boxed{}`, `####`, `<answer>` tags, "the answer is", "A:", or the last number in prose.

The last of the strong marks (boxed, ####, tags) decides; without one the last phrase; without one the prose. A mark that was begun and not
finished is a truncated completion and has no answer, whatever came before it. Markdown's bold and italics are no part of an answer, and
"the answer is correct" names none. Chinese phrases are known too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.answers.numbers import NUMBER_WORD, last_number, parse_number, tidy

MAX_TEXT = 100_000  # characters from the end of a completion that are searched for marks
MAX_PROSE = 4_000  # and for a number
MAX_ANSWER = 1_000

_BOXED = re.compile(r"\\f?boxed(?![a-zA-Z])\s*")
_THOUGHTS = re.compile(r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_PHRASE = re.compile(
    r"(?:(?<!convert the )(?<!round the )(?<!change the )\b(?i:answers?|solutions?)\b[*_]*(?:\s+(?:to|of|for)\b[^.\n:=]{0,80}?)?[*_\s]*"
    r"(?:(?:(?i:is|are|was|would be|will be|should be|must be|equals)\b|[:=])[*_\s]*)+|^[ \t*_]*(?:A|Ans|ANS)[*_]*\s*:[*_\s]*"
    r"|(?:答案|结果)[^。\n:=是为]{0,10}?(?:应该|应)?(?:[是为]|[:=])[是为:=\s*_]*"
    r"|(?:^|[。\n])\s*[答解]:|答案(?=\s*[-\d$\\])|故选:?|(?:应该|应|因此|所以)选:?)"
    r"(?i:(?:therefore|thus|simply|equal to|approximately|about|:)\s*)*",
    re.MULTILINE,
)
_JUDGEMENT = re.compile(
    r"(?:(?:indeed|also|thus|therefore|hence|clearly|definitely|certainly|probably|likely|most|quite|very|not|now|both|always|in fact"
    r"|absolutely|completely|fully|actually|really|never|far from|already|thereby|all|perfectly|well|logically|mathematically)\s+)*"
    r"(?:in)?(?:correct|right|wrong|consistent|valid|verified|confirmed|reasonable|unreasonable|plausible|sensible|accurate|exact|complete|clear"
    r"|obvious|unique|final|acceptable|sound|satisfactory|fine|good|checked|justified|appropriate|logical|realistic|believable|ready|easy"
    r"|straightforward|as expected|as (?:required|desired|follows|claimed|stated)|what we|the same|in (?:the|its) (?:correct|right|simplest"
    r"|lowest|required|desired))\b(?!\s*[:=])|(?:是)?(?:正确|对|合理|错误|不正确|一致|唯一|正确无误)的?(?=[。,.;!\s]|$)",
    re.IGNORECASE,
)
_FULL_WIDTH = {0xFF01: "! ", 0xFF08: "(", 0xFF09: ")", 0xFF0C: ", ", 0xFF1A: ":", 0xFF1B: "; ", 0xFF1F: "? "}  # punctuation
_SUBJECT = re.compile(r"^(?:answers?|solutions?)\b|\W*\b(?:is|are|was|would be|will be|should be|must be|equals)\W*$", re.IGNORECASE)
_DETERMINER = re.compile(r"(?:\b(?:the|this|that|my|our|so|thus|hence|therefore|and|final|which means)[\s,]+){0,4}$", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![\w)\]}*\\])(\*{1,3}|_{2,3})(?=[^\s*_])([^\n*]{0,300}?[^\s*_\\])\1(?![\w*(])")
_QUOTED = re.compile(r"^\s*>\s*(?=\*)", re.MULTILINE)
_HTML = re.compile(r"</?(?:b|strong|i|em|u|mark|p|center)>", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*|<)|。|\n|</")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^$\n]*(?:\\[a-zA-Z]{2}|[a-zA-Z)}]\^)[^$\n]*)\$", re.DOTALL)
_LONG_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?!(?:sin|cos|tan|log|exp|sqrt|and)(?![a-zA-Z]))[a-zA-Z]{3,}|[\u0400-\u04ff]{3}|[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]{2}"
)
_CONDITION = re.compile(
    r"[\s,(]*(?:for|where|when|if|with|as|since|because|given|provided)(?: (?:all|any|every|each|that))?\s*", re.IGNORECASE
)
_COUNTABLE = re.compile(rf"[\d\\]|(?<!\w)(?!a\s)[a-zA-Z](?!\w)|{NUMBER_WORD.pattern}", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """`text` is None where there is no answer and `reason` says why; `form` is boxed, hash, tags, phrase, math, number or whole."""

    text: str | None
    form: str = ""
    reason: str = ""


def final_answer(completion: str, numeric: bool = False) -> Found:
    r"""The answer of a completion as it is written there.

    With `numeric` a phrase without a number in it, such as "the answer is positive", is no answer.

    Example:
        >>> final_answer(r"First \boxed{1}, no: \boxed{\frac{1}{2}}.").text
        '\\frac{1}{2}'
    """
    text = _THOUGHTS.sub("\n", completion[-MAX_TEXT:]).rpartition("</think>")[2].strip()
    emphasized, text = text, plain_text(text)
    if not text:
        return Found(None, reason="only thoughts, no answer" if completion.strip() else "empty")
    found = _marked(text) or _phrase(text, numeric) or _prose(text)
    marks = list(_EMPHASIS.finditer(emphasized)) if found.form in ("whole", "") else []
    if marks and (not numeric or NUMBER_WORD.search(marks[-1][2])):
        found = Found(marks[-1][2], "bold")
    if found.text is not None and not found.text.strip():
        return Found(None, found.form, "empty answer")
    if found.text is not None and len(found.text) > MAX_ANSWER:
        return Found(None, found.form, f"answer longer than {MAX_ANSWER} characters")
    return found


def plain_text(text: str) -> str:
    """`text` without the marks of emphasis of Markdown and HTML and full-width punctuation; a product or power in stars stays.

    Example:
        >>> plain_text("The **answer** is **$27**, 2**3 * 4")
        'The answer is $27, 2**3 * 4'
    """
    if not text.isascii():
        text = text.translate(_FULL_WIDTH)
    if "*" in text or "__" in text:
        text = _QUOTED.sub("", text)
        text = _EMPHASIS.sub(r"\2", text)
    return _HTML.sub("", text) if "<" in text else text


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` and of those directly before it ("\boxed{1} and \boxed{2}"); None when it is not closed."""
    parts: list[str] = []
    marks = list(_BOXED.finditer(text))[-10:]
    following = len(text)
    for mark in reversed(marks):
        content, end = _braced(text, mark.end())
        if content is not None and end > following:  # a box in a box
            parts = [content]
            following = mark.start()
            continue
        if parts and not re.fullmatch(r"(?:[\s$,;&.*]|and|or|\\[()[\]])*", text[end:following]):
            break
        if content is None:
            return ", ".join(parts) if parts else None
        parts.insert(0, content)
        following = mark.start()
    return ", ".join({tidy(part): part for part in parts}.values())


def _marked(text: str) -> Found | None:
    """The answer that is marked last: in a box, after ####, or between <answer> tags; None without a mark."""
    places = {"boxed": max((mark.start() for mark in _BOXED.finditer(text)), default=-1), "hash": text.rfind("####")}
    close = text.rfind("</answer>")
    opened = text.rfind("<answer>", 0, close) if close >= 0 else text.rfind("<answer>")
    form = max({**places, "tags": opened}.items(), key=lambda item: item[1])
    if form[1] < 0:
        return None
    if form[0] == "boxed":
        content = boxed(text)
        return Found(content, "boxed", "" if content is not None else "truncated: the box is not closed")
    if form[0] == "hash":
        content = text[form[1] :].lstrip("#").lstrip().partition("\n")[0].partition("</answer")[0].strip().rstrip("!")
        return Found(content or None, "hash", "" if content else "truncated: nothing after ####")
    if close < 0:
        return Found(None, "tags", "truncated: the answer tag is not closed")
    content = text[opened + len("<answer>") : close].strip()
    inner = _phrase(content)
    return inner if inner and inner.text else Found(content, "tags")


def _phrase(text: str, numeric: bool = False, judgements: int = 3) -> Found | None:
    for mark in reversed(list(_PHRASE.finditer(text))[-10:]):
        rest = text[mark.end() :]
        if not rest.strip():
            return Found(None, "phrase", f"truncated: nothing after {mark.group().strip()!r}")
        display = re.match(r"\s*(?:\$\$|\\\[)(.+?)(?:\$\$|\\\])", rest, re.DOTALL)
        content = display[1] if display else _sentence(rest)
        if judgements and (_JUDGEMENT.match(content.lstrip("*_ ")) or (numeric and not _COUNTABLE.search(content))):
            elsewhere = _without_judgement(text, mark, content, numeric, judgements - 1)
            if elsewhere is not None:
                return elsewhere
        if re.search(r"[\d\\]", content) or len(content.split()) <= 4:
            return Found(content.strip(" *_"), "phrase")
    return None


def _without_judgement(text: str, mark: re.Match[str], content: str, numeric: bool, judgements: int) -> Found | None:
    """The answer of a text without the judgement in it ("the answer of 61 is correct"); None where nothing else says one."""
    start = mark.end() + text[mark.end() :].find(content)
    about = _SUBJECT.sub("", mark.group()) if re.search(r"\d", mark.group()) else ""
    rest = f"{_DETERMINER.sub('', text[: mark.start()])}{about}{text[start + len(content) :]}"
    if not re.search(r"\w", rest):
        return None
    found = _phrase(rest, numeric, judgements) or _prose(rest)
    number = last_number(tidy(found.text)) if numeric and found.form == "whole" and found.text else None
    if number is not None:
        return Found(number, "number")
    return found if found and found.text and (found.form != "whole" or re.search(r"\d", found.text)) else None


def _prose(text: str) -> Found:
    """The answer of a text without any mark: a short text as it is, else its last formula or number."""
    tail = text[-MAX_PROSE:]
    if len(text) <= 200 and "\n" not in text:
        plain = tidy(text)
        bare = plain.strip("$ .")
        if parse_number(bare) or not _LONG_WORD.search(bare):
            return Found(text, "whole")
    maths = list(_MATH.finditer(tail))
    while len(maths) > 1 and _CONDITION.fullmatch(tail, maths[-2].end(), maths[-1].start()):
        tail = tail[: maths.pop().start()]
    if maths and last_number(tidy(tail[maths[-1].end() :])) is None:
        return Found(next(group for group in maths[-1].groups() if group), "math")
    number = last_number(tidy(tail))
    if number is not None:
        return Found(number, "number")
    return Found(text, "whole") if len(text) <= 100 else Found(None, "", "no answer found")


def _sentence(text: str) -> str:
    """`text` up to the end of its first sentence or line."""
    text = text.lstrip()
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def _braced(text: str, start: int) -> tuple[str | None, int]:
    """The content of the braces that open at `start` and where they end; without braces the next word."""
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s$]+", text[start:])
        return (word.group().rstrip(".,"), start + word.end()) if word else (None, start)
    depth = 0
    for brace in re.finditer(r"\\[{}]|[{}]", text[start : start + 4 * MAX_ANSWER]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1 : start + brace.start()], start + brace.end()
    return None, len(text)
