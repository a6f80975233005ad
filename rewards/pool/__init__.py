"""Grading in processes that can be killed: whatever a grader does, it costs one item its grade.

FAILURES.md says what a grader may do, what each of that costs, and which status results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewards.pool.settings import RewardPoolConfig

if TYPE_CHECKING:
    from rewards.pool.pool import RewardPool, longest_call

__all__ = ["RewardPool", "RewardPoolConfig", "longest_call"]


def __getattr__(name: str) -> Any:
    """The pool itself on demand: recipes need its settings only, and grading processes start faster without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rewards.pool import pool

    return getattr(pool, name)
