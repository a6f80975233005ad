"""rlhub: reinforcement-learning post-training for diffusion large language models. docs/python_api.md explains what is exported here.

Example:
    >>> import rlhub
    >>> model = rlhub.load_model("runs/sort")                               # doctest: +SKIP
    >>> rlhub.generate(model, ["3 1 2"], length=4, steps=4, block_length=4)  # doctest: +SKIP
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhub.api import (
        Algorithm,
        Batch,
        Credit,
        Estimate,
        LogLikelihood,
        LogProbs,
        Model,
        RewardResult,
        Rollout,
        Scores,
        Views,
        compose,
        demonstrations,
        generate,
        load_model,
        load_task,
        log_likelihood,
        make_batch,
        make_views,
        new_model,
        task_tokenizer,
        token_log_probs,
        train,
    )

__all__ = [  # of rlhub.api, which a test compares
    "Algorithm",
    "Batch",
    "Credit",
    "Estimate",
    "LogLikelihood",
    "LogProbs",
    "Model",
    "RewardResult",
    "Rollout",
    "Scores",
    "Views",
    "compose",
    "demonstrations",
    "generate",
    "load_model",
    "load_task",
    "log_likelihood",
    "make_batch",
    "make_views",
    "new_model",
    "task_tokenizer",
    "token_log_probs",
    "train",
]

ROOT = str(Path(__file__).resolve().parent.parent)  # where the packages of this project lie side by side
SIBLINGS = ("rewards", "workers")


class _Siblings:
    """Finds the packages beside this one there, whatever stands earlier on the path: `rewards.py` is a likely name for a user's grader."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in SIBLINGS else None


sys.meta_path.insert(0, _Siblings)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    """The public functions on first use, since PyTorch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module 'rlhub' has no attribute {name!r}")
    from rlhub import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
