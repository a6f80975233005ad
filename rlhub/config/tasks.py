"""The tasks that a recipe names."""

from __future__ import annotations

from rlhub.config.schema import Recipe
from rlhub.parts import load_part
from rlhub.tasks import Task, load_task


def task_kind(recipe: Recipe) -> str:
    """What the examples of a recipe's task are: prompts, documents or preferences; see `rlhub.tasks`."""
    return getattr(load_part("tasks", recipe.task.name), "KIND", "prompts")


def evaluation_task(recipe: Recipe) -> Task:
    """The held-out split: the training options overridden by those of `task.eval`. It does not depend on the run's seed, so that
    runs with different seeds are measured on the same problems."""
    return load_task(recipe.task.name, {**recipe.task.train, **recipe.task.eval}, "test", seed=0)
