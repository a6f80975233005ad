"""How grading processes are bounded; the section `reward_pool` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from rlhub.bounds import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class RewardPoolConfig:
    """How grading processes are bounded (docs/rewards.md)."""

    deadline_seconds: PositiveFloat = 10.0
    """Per item, or per call of a reward that grades in batches."""
    batch_size: PositiveInt = 64
    """Items that travel together."""
    processes: PositiveInt = 1
    """Grading processes of each reward worker."""
    memory_megabytes: PositiveInt = 4096
    """Resident memory of a grading process; one that takes more is ended."""
    retries: NonNegativeInt = 1
    """Of an item whose process died; one that passed its deadline is not tried again."""
    failed_steps: PositiveInt = 3
    """Steps in a row without a single valid grade after which a run stops with the grader's message."""
    cache: str = "none"
    """Of valid grades: none, memory or a folder, which may be shared by workers and runs."""
