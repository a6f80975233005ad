"""Exact match: 1.0 when the completion is the answer, up to white space, else 0.

Columns: `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewards import Prompt, column
from rlhub.types import RewardResult

COLUMNS = ("answer",)


@dataclass(frozen=True)
class Config:
    """No options."""


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """0 or 1; runs of white space count as one space and those at the ends as none."""
    words = completion.split()
    right = words == str(column(row, "answer")).split()
    return RewardResult(float(right), "ok" if words or right else "unparsed", "right" if right else "differs" if words else "empty")
