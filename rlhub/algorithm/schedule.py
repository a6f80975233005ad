"""Learning-rate schedules as a pure factor of the step."""

from __future__ import annotations

import math

from rlhub.config.schema import OptimizerConfig


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Multiplier of the learning rate at optimizer step `step` (0-based): linear warm-up, then constant, or linear, cosine or polynomial
    (`power`) decay to the end.

    Raises:
        ValueError: unknown schedule.
    """
    warmup = min(config.warmup_steps, max(total_steps - 1, 0))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    floor = config.final_fraction
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1.0 - (1.0 - floor) * progress
    if config.schedule == "polynomial":
        return float(floor + (1.0 - floor) * (1.0 - progress) ** config.power)
    if config.schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule must be constant, linear, cosine or polynomial, got {config.schedule!r}")
