"""The tasks that a recipe names."""

from __future__ import annotations

from rewards import check_columns
from rlhub.config.schema import Recipe
from rlhub.errors import RecipeError
from rlhub.parts import load_part
from rlhub.tasks import Task, load_task


def task_kind(recipe: Recipe) -> str:
    """What the examples of a recipe's task are: prompts, documents or preferences; see `rlhub.tasks`."""
    return getattr(load_part("tasks", recipe.task.name), "KIND", "prompts")


def evaluation_task(recipe: Recipe) -> Task:
    """The held-out split: the training options overridden by those of `task.eval`. It does not depend on the run's seed, so that
    runs with different seeds are measured on the same problems."""
    return load_task(recipe.task.name, {**recipe.task.train, **recipe.task.eval}, "test", seed=0)


def check_reward_columns(recipe: Recipe, task: Task) -> None:
    """Refuse a reward that needs columns which the first row of a task has not.

    Raises:
        RecipeError: the message names column, reward and what the row has.
    """
    if recipe.task.reward["name"] != "none" and (task.size is None or task.size > 0):
        columns = {**task.example(0).columns, "rollout": {}}
        try:
            check_columns(recipe.task.reward, columns)
        except ValueError as error:
            raise RecipeError(f"task.reward {recipe.task.reward['name']}: {error} (row 1 of the {task.split} data)") from error
