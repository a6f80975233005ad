"""Mask ratios: the share of a canvas that is masked at a time in [0, 1], for samplers and views that follow the same curve."""

from __future__ import annotations

import math
from collections.abc import Callable

MASK_RATIO: dict[str, Callable[[float], float]] = {
    "linear": lambda time: time,
    "cosine": lambda time: math.cos(math.pi / 2 * (1 - time)),
    "exponential": lambda time: 1 - math.exp(-5 * time),
    "log_exponential": lambda time: math.log(1 + (math.exp(5) - 1) * time) / 5,
}


def check_curve(curve: str) -> None:
    """Raises ValueError unless the curve is one of `MASK_RATIO`."""
    if curve not in MASK_RATIO:
        raise ValueError(f"curve {curve!r} is none of {', '.join(MASK_RATIO)}")
