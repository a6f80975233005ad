"""`rlhub eval`: held-out accuracy of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhub.config.recipe import load_recipe, validate
from rlhub.config.schema import Recipe
from rlhub.config.tasks import check_reward_columns, evaluation_task
from rlhub.errors import RecipeError, UserError, WorkerLost
from rlhub.tasks import Task
from rlhub.training.grade_checks import try_grader
from rlhub.training.held_out import evaluate


def evaluate_checkpoint(path: Path, overrides: list[str] | None = None, recipe_path: str | None = None) -> dict[str, Any]:
    """Evaluate a model folder, a checkpoint or the newest checkpoint of a run, in this process or on the recipe's roles.

    Raises:
        RecipeError: no recipe is given and the checkpoint lies in no run folder.
        CheckpointError: there is nothing to load.
        UserError: a generator kept dying, or the reward cannot grade; the message says which and why.
    """
    recipe, model_path = evaluation_recipe(path, overrides or [], recipe_path)
    with evaluation_crew(recipe, model_path) as (crew, task, tokenizer):
        check_reward_columns(recipe, task)
        try_grader(crew, recipe, task)
        results = evaluate(crew, recipe, task, tokenizer)
    if all(value == 1.0 for key, value in results.items() if key.startswith("eval/invalid_share")):
        raise UserError(f"no completion could be graded, so there is no accuracy: {results['eval/first_failure']}")
    return results


def evaluation_recipe(path: Path, overrides: list[str], recipe_path: str | None = None) -> tuple[Recipe, Path]:
    """The recipe to evaluate a model, a checkpoint or a run with, for generators alone, and the folder of the model.

    Raises:
        RecipeError: no recipe is given and the checkpoint lies in no run folder, or it has nothing to grade with.
        CheckpointError: there is nothing to load.
    """
    from rlhub.checkpoints.sealed import recipe_of_run, resolve_model_path

    model_path = resolve_model_path(Path(path))
    if recipe_path is None:
        recipe_path = str(recipe_of_run(model_path))
    recipe = load_recipe(recipe_path, overrides)
    validate(recipe)
    if recipe.task.reward["name"] == "none":
        raise RecipeError("task.reward.name: none, so there is nothing to grade; name a module of rewards, and set roles.generators=1")
    # Generators alone: they load the model themselves, and so they do when one of them has to be rebuilt.
    recipe.roles.scorers, recipe.roles.learners, recipe.learner.backend = 0, 0, "torch"
    recipe.model.path = str(model_path)
    return recipe, model_path


@contextmanager
def evaluation_crew(recipe: Recipe, model_path: Path) -> Iterator[tuple[Any, Task, Any]]:
    """The workers of an evaluation, its task and tokenizer.

    Raises:
        UserError: a generator kept dying; the message says which.
    """
    from rlhub.checkpoints.tokenizers import load_tokenizer
    from workers.placement import assemble

    tokenizer, task = load_tokenizer(str(model_path)), evaluation_task(recipe)
    crew = assemble(recipe, model_path)
    try:
        yield crew, task, tokenizer
    except WorkerLost as error:
        raise UserError(str(error)) from error
    finally:
        crew.close()
