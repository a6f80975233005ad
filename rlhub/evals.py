"""Held-out accuracy: the share of test problems whose grade is exactly 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlhub.config import Recipe
from rlhub.data import Task, load_task
from rlhub.errors import RecipeError, UserError, WorkerLost
from rlhub.pipeline import EVAL, evaluation_settings, generate, grade, issue
from rlhub.recipe import load_recipe, validate

PIECE = 512  # problems issued at once


def accuracy_key(temperature: float) -> str:
    """`eval/accuracy` for greedy decoding, `eval/accuracy_t1` for temperature 1, and so on."""
    return "eval/accuracy" if temperature == 0 else f"eval/accuracy_t{temperature:g}"


def evaluation_task(recipe: Recipe) -> Task:
    """The held-out split: the training options overridden by those of `task.eval`. It does not depend on the run's seed, so that
    runs with different seeds are measured on the same problems."""
    return load_task(recipe.task.name, {**recipe.task.train, **recipe.task.eval}, "test", seed=0)


def shared_prompts(train_task: Task, test_task: Task) -> int:
    """How many of the test prompts occur in a finite training split; 0 for an infinite one, whose module keeps the two apart."""
    if train_task.size is None or test_task.size is None:
        return 0
    trained = {repr(train_task.example(index).prompt) for index in range(train_task.size)}
    return sum(repr(test_task.example(index).prompt) in trained for index in range(test_task.size))


def evaluate(crew: Any, recipe: Recipe, task: Task, tokenizer: Any) -> dict[str, Any]:
    """Accuracy, mean reward and share of failed grades on the first `task.eval_rows` problems at each of `eval_temperatures`.

    The noise is the same at every evaluation of a run, so that its curve is not blurred by it.
    """
    num_problems = recipe.task.eval_rows if task.size is None else min(recipe.task.eval_rows, task.size)
    metrics: dict[str, Any] = {}
    for temperature in recipe.eval_temperatures:
        values, accurate = [], []
        for first in range(0, num_problems, PIECE):
            issued = issue(task, tokenizer, EVAL, first // PIECE, first, min(PIECE, num_problems - first), 1)
            rollouts = generate(crew, issued, evaluation_settings(recipe.sampler, temperature))
            graded, _ = grade(crew, issued, rollouts, tokenizer, recipe.reward_pool.batch_size)
            values += [rollout.reward.value if rollout.reward.valid else np.nan for rollout in graded]
            accurate += [rollout.reward.accurate for rollout in graded]
        key = accuracy_key(temperature)
        invalid = np.isnan(values)
        metrics[key] = float(np.mean(accurate))
        metrics[key.replace("accuracy", "reward")] = float("nan") if invalid.all() else float(np.nanmean(values))
        metrics[key.replace("accuracy", "invalid_share")] = float(invalid.mean())
    return metrics | {
        "eval/num_problems": num_problems,
        "eval/test_set": task.description,
        "eval/test_hash": task.fingerprint()[:16],
    }


def evaluate_checkpoint(path: Path, overrides: list[str] | None = None, recipe_path: str | None = None) -> dict[str, Any]:
    """Evaluate a model folder, a checkpoint or the newest checkpoint of a run, in this process or on the recipe's roles.

    Raises:
        RecipeError: no recipe is given and the checkpoint lies in no run folder.
        CheckpointError: there is nothing to load.
        UserError: a generator kept dying; the message says which.
    """
    from rlhub.checkpoint import resolve_model_path
    from rlhub.tokenizers import load_tokenizer
    from workers.placement import assemble

    model_path = resolve_model_path(Path(path))
    if recipe_path is None:
        candidates = [folder / "config.yaml" for folder in (model_path, *model_path.parents)]
        found = [candidate for candidate in candidates if candidate.exists()]
        if not found:
            raise RecipeError(f"{path} lies in no run folder; say which task with --recipe RECIPE")
        recipe_path = str(found[0])
    recipe = load_recipe(recipe_path, overrides or [])
    validate(recipe)
    if recipe.task.reward["name"] == "none":
        raise RecipeError("task.reward.name: none, so there is nothing to grade; name a module of rewards, and set roles.generators=1")
    # Generators alone: they load the model themselves, and so they do when one of them has to be rebuilt.
    recipe.roles.scorers, recipe.roles.learners, recipe.learner.backend = 0, 0, "torch"
    recipe.model.path = str(model_path)
    tokenizer = load_tokenizer(str(model_path))
    task = evaluation_task(recipe)
    crew = assemble(recipe, model_path)
    try:
        return evaluate(crew, recipe, task, tokenizer)
    except WorkerLost as error:
        raise UserError(str(error)) from error
    finally:
        crew.close()
