"""Digit class: 1.0 when a classifier sees the asked digit in an image of 8 x 8 grey levels, else 0.

The completion is 64 numbers from 0 to 16, row by row; anything else is unparsed and worth 0. The classifier is a logistic regression on
scikit-learn's digits. A policy may learn to please it: measure with another one (`rlhub lab digits_rl` does).

Columns: `label`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from rewards import Prompt, column
from rlhub.extras import require
from rlhub.types import RewardResult

PIXELS, LEVELS = 64, 17


@dataclass(frozen=True)
class Config:
    """No options."""


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """0 or 1."""
    words = completion.split()
    if len(words) != PIXELS or not all(word.isdecimal() and int(word) < LEVELS for word in words):
        return RewardResult(0.0, "unparsed", f"{len(words)} words are no image")
    seen = int(classifier().predict([[int(word) for word in words]])[0])
    return RewardResult(float(seen == int(column(row, "label"))), "ok", f"looks like {seen}")


def prepare(config: Config) -> None:
    """Raises ValueError when scikit-learn is not installed."""
    require("sklearn")


@cache
def classifier() -> Any:
    """Fitted to every second image."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    data = load_digits()
    return make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=500)).fit(data.data[::2], data.target[::2])
