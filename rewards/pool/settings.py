"""How grading processes are bounded; the section `reward_pool` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RewardPoolConfig:
    deadline_seconds: float = 10.0  # per item, or per call of a reward that grades in batches
    batch_size: int = 64  # items that travel together
    processes: int = 1  # grading processes of each reward worker
    memory_megabytes: int = 4096  # resident memory of a grading process; one that takes more is ended
    retries: int = 1  # of an item whose process died; one that passed its deadline is not tried again
    cache: str = "none"  # of valid grades: none | memory | a folder, which may be shared by workers and runs
