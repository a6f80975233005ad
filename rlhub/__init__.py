"""rlhub: reinforcement-learning post-training for diffusion large language models. docs/python_api.md explains what is exported here.

Example:
    >>> import rlhub
    >>> model = rlhub.load_model("runs/sort")                               # doctest: +SKIP
    >>> rlhub.generate(model, ["3 1 2"], length=4, steps=4, block_length=4)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhub import siblings

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

siblings.install()


def __getattr__(name: str) -> Any:
    """The public functions on first use, since PyTorch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module 'rlhub' has no attribute {name!r}")
    from rlhub import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
