r"""Where the answer of a completion stands: `\boxed{}`, `####`, `<answer>` tags, "the answer is", "A:", or the last number in prose.

The last of the strong marks (boxed, ####, tags) decides; without one the last phrase; without one the prose. A mark that was begun and not
finished is a truncated completion and has no answer, whatever came before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.answers.numbers import last_number, parse_number, tidy
from rewards.answers.wording import without_wording

MAX_TEXT = 100_000  # characters from the end of a completion that are searched for marks
MAX_PROSE = 4_000  # and for a number
MAX_ANSWER = 1_000

_BOXED = re.compile(r"\\f?boxed(?![a-zA-Z])\s*")
_THOUGHTS = re.compile(r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_PHRASE = re.compile(
    r"(?:\b(?i:answers?|solutions?)\b[*_]*(?:\s+(?:to|of|for)\b[^.\n:=]{0,80}?)?[*_\s]*"
    r"(?:(?:(?i:is|are|was|would be|will be|should be|equals)\b|[:=])[*_\s]*)+|^[ \t*_]*(?:A|Ans|ANS)[*_]*\s*:[*_\s]*"
    r"|\b(?i:correct|right) (?i:option|choice)\b(?:\s+(?i:is)\b|\s*:)+\s*"
    r"|(?:最终|最后|正确)?的?(?:答案|选项)(?:应该|应)?[是为选]?\s*[::]?\s*|^答\s*[::]\s*)"
    r"(?i:(?:therefore|thus|simply|equal to|approximately|about|:)\s*)*",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*|<)|\n|</|[。!?;](?!\d)|,(?=[\u4e00-\u9fff])")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^$\n]*\\[a-zA-Z]{2}[^$\n]*)\$", re.DOTALL)
_BOLD = re.compile(r"(?<![\w)\]}*])(\*\*|__)(?=[^\s*])([^\n]{1,300}?)(?<=\S)\1(?![\w(*])")
# What is said of an answer and is none: "the answer is correct", "is therefore consistent with ...".
_REMARK = re.compile(
    r"(?i:(?:indeed|also|now|thus|hence|so|in fact|clearly|obviously|therefore|not|quite|fully|very|both|all|as|the|a|an|in|well)\s+)*"
    r"(?i:correct|incorrect|right|wrong|consistent|inconsistent|valid|invalid|verified|reasonable|confirmed|plausible|sensible|unique|clear|"
    r"obvious|exact|accurate|straightforward|simple|good|fine|complete|final|expected|required|desired|follows?|shown|given|found|obtained|"
    r"derived|below|above|checked|sound|certain|sure|well)\b(?!\s*[:=])|(?:正确|错误|对|合理|唯一)的?"
)
_OPTION = re.compile(r"(?i:the )?(?i:option|choice|letter)\s*\(?[A-J]\b")
_LONG_WORD = re.compile(r"(?<![\\a-zA-Z])(?!(?:sin|cos|tan|log|exp|sqrt)(?![a-zA-Z]))[a-zA-Z]{3,}")


@dataclass(frozen=True)
class Found:
    """`text` is None where there is no answer and `reason` says why; `form` is boxed, hash, tags, phrase, math, number or whole."""

    text: str | None
    form: str = ""
    reason: str = ""


def final_answer(completion: str, remarks: bool = False) -> Found:
    r"""The answer of a completion as it is written there. With `remarks`, "the answer is correct" says so; else it says nothing.

    Example:
        >>> final_answer(r"First \boxed{1}, no: \boxed{\frac{1}{2}}.").text
        '\\frac{1}{2}'
    """
    text = _THOUGHTS.sub("\n", completion[-MAX_TEXT:]).rpartition("</think>")[2].strip()
    if "**" in text or "__" in text:
        text = _BOLD.sub(r"\2", text)
    if not text:
        return Found(None, reason="only thoughts, no answer" if completion.strip() else "empty")
    found = _marked(text) or _phrase(text, remarks) or _prose(text)
    if found.text is not None and not found.text.strip():
        return Found(None, found.form, "empty answer")
    if found.text is not None and len(found.text) > MAX_ANSWER:
        return Found(None, found.form, f"answer longer than {MAX_ANSWER} characters")
    return found


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` and of other ones directly before it ("\boxed{1} and \boxed{2}"); the inner one of nested ones.

    None when it is not closed.
    """
    parts: list[str] = []
    marks = list(_BOXED.finditer(text))[-10:]
    following = len(text)
    for mark in reversed(marks):
        content, end = _braced(text, mark.end())
        if content is not None and end > following:
            continue
        if parts and not re.fullmatch(r"(?:[\s$,;&]|and|or|\\[()])*", text[end:following]):
            break
        if content is None:
            return ", ".join(parts) if parts else None
        if content not in parts:
            parts.insert(0, content)
        following = mark.start()
    return ", ".join(parts)


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
    inner = _phrase(content, remarks=True)
    return inner if inner and inner.text else Found(content, "tags")


def _phrase(text: str, remarks: bool) -> Found | None:
    for mark in reversed(list(_PHRASE.finditer(text))[-10:]):
        rest = text[mark.end() :]
        if not rest.strip():
            return Found(None, "phrase", f"truncated: nothing after {mark.group().strip()!r}")
        display = re.match(r"\s*(?:\$\$|\\\[)(.+?)(?:\$\$|\\\])", rest, re.DOTALL)
        content = display[1] if display else _sentence(rest)
        if re.search(r"[\d\\]", content) or _is_named(content.strip(" *_"), remarks):
            return Found(content.strip(" *_"), "phrase")
    return None


def _is_named(content: str, remarks: bool) -> bool:
    """Whether a few words without numbers are an answer."""
    return _OPTION.match(content) is not None or (len(content.split()) <= 4 and (remarks or not _REMARK.match(content)))


def _prose(text: str) -> Found:
    tail = text[-MAX_PROSE:]
    if len(text) <= 200 and "\n" not in text:
        bare = without_wording(tidy(text)).strip("$ .")
        if parse_number(bare) or not _LONG_WORD.search(bare):
            return Found(text, "whole")
    maths = list(_MATH.finditer(tail))
    if maths and last_number(tidy(tail[maths[-1].end() :])) is None:
        return Found(next(group for group in maths[-1].groups() if group), "math")
    number = last_number(tidy(tail))
    if number is not None:
        return _expression_with(number, tidy(tail)) or Found(number, "number")
    return Found(text, "whole") if len(text) <= 100 else Found(None, "", "no answer found")


def _expression_with(number: str, text: str) -> Found | None:
    """The word of mathematics in which the last number of a tidied text stands, as in "we get 2\\sqrt{3}."; None where it stands alone."""
    word = next((word for word in reversed(text.split()) if number in word), "").rstrip(".,;:!?")
    is_mathematics = re.search(r"\\[a-zA-Z]{2}|\^|\)\(", word) and not _LONG_WORD.search(word)
    balanced = all(word.count(left) == word.count(right) for left, right in ("()", "{}", "[]"))
    return Found(word.strip("$"), "math") if is_mathematics and balanced else None


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
