"""Format: is the completion `<reasoning>...</reasoning><answer>...</answer>`? Says nothing about the answer itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rewards import Prompt
from rlhub.types import RewardResult

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

_WHOLE = re.compile(r"\s*<reasoning>.*</reasoning>\s*<answer>.*</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Config:
    """`partial`: give the share of the four tags that are found in order, instead of 1.0 for the exact structure and 0 otherwise."""

    partial: bool = False


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """0 or 1 (each tag once and nothing outside the two blocks), or quarters with `partial`."""
    end, found = 0, 0
    for tag in TAGS:
        start = completion.find(tag, end)
        if start < 0:
            break
        end, found = start + len(tag), found + 1
    exact = _WHOLE.fullmatch(completion) is not None and all(completion.count(tag) == 1 for tag in TAGS)
    value = found / len(TAGS) if config.partial else float(exact)
    return RewardResult(value, "ok" if found else "unparsed", f"{found} of {len(TAGS)} tags in order")
