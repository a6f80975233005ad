"""Regex: does the completion match a regular expression?

The pattern is yours, the text is the model's: some patterns, such as `(a+)+b`, take exponential time on some texts, so a match has a time
limit of its own (package `regex`) and is `timeout` beyond it.

Columns: none, or `pattern` for a pattern per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

from rewards import Prompt, column
from rlhub.types import RewardResult


@dataclass(frozen=True)
class Config:
    """`whole`: the pattern must match everything, up to white space at the ends. `seconds`: time limit of one match."""

    pattern: str | None = None
    whole: bool = False
    ignore_case: bool = False
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if self.pattern is not None:
            _compiled(self.pattern, self.ignore_case)


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """1 for a match, else 0; `unparsed` for a blank completion, `timeout` where the match takes longer than `seconds`.

    Raises:
        ValueError: there is no pattern, or it is no regular expression.
    """
    pattern = _compiled(config.pattern if config.pattern is not None else str(column(row, "pattern")), config.ignore_case)
    text = completion.strip()
    try:
        found = pattern.fullmatch(text, timeout=config.seconds) if config.whole else pattern.search(text, timeout=config.seconds)
    except TimeoutError:
        return RewardResult(float("nan"), "timeout", f"no verdict within {config.seconds:g} s")
    if found is None and not text:
        return RewardResult(0.0, "unparsed", "empty")
    return RewardResult(float(found is not None), detail=f"matched {found.group()[:80]!r}" if found else "no match")


@lru_cache(maxsize=1024)
def _compiled(pattern: str, ignore_case: bool) -> regex.Pattern:
    try:
        return regex.compile(pattern, regex.DOTALL | (regex.IGNORECASE if ignore_case else 0))
    except regex.error as error:
        raise ValueError(f"not a regular expression: {pattern!r} ({error})") from error
