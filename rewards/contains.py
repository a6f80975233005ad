"""Contains: are the wanted strings in the completion, and the forbidden ones not?

Columns: `answer` (text or list of texts), unless the option `texts` names the strings for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rewards import Prompt, column
from rlhub.types import RewardResult


@dataclass(frozen=True)
class Config:
    """`partial` gives the share of the wanted strings; `forbidden` strings make the value 0; `ignore_case` compares without case."""

    texts: list[str] = field(default_factory=list)
    forbidden: list[str] = field(default_factory=list)
    partial: bool = False
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if "" in [*self.texts, *self.forbidden]:
            raise ValueError("texts and forbidden may not hold an empty string, every completion contains it")


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """0, 1 or the share; `unparsed` for a blank completion.

    Raises:
        ValueError: there is no string to look for.
    """
    wanted = config.texts or ([] if config.forbidden and "answer" not in row else column(row, "answer"))
    wanted = [str(text) for text in (wanted if isinstance(wanted, list | tuple) else [wanted])]
    if "" in wanted or not (wanted or config.forbidden):
        raise ValueError(f"contains: no text to look for in {wanted!r}, give `texts` or the column 'answer'")
    if not completion.strip():
        return RewardResult(0.0, "unparsed", "empty")

    def found(text: str) -> bool:
        return text.casefold() in completion.casefold() if config.ignore_case else text in completion

    if any(map(found, config.forbidden)):
        return RewardResult(0.0, detail=f"holds {next(filter(found, config.forbidden))!r}")
    missing = [text for text in wanted if not found(text)]
    share = 1 - len(missing) / len(wanted) if wanted else 1.0
    return RewardResult(share if config.partial else float(not missing), detail=f"missing {missing}" if missing else "all there")
