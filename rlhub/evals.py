"""Held-out accuracy: the share of test problems whose grade is exactly 1."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhub.config.recipe import load_recipe, validate
from rlhub.config.schema import Recipe, SamplerConfig
from rlhub.errors import RecipeError, UserError, WorkerLost
from rlhub.tasks import Task, load_task
from rlhub.training.grading import grade
from rlhub.training.rollouts import EVAL, evaluation_settings, generate, issue

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


@dataclass(frozen=True)
class Measurement:
    """What one sampler setting did on the test problems.

    Attributes:
        values: float64 [problems], grades; NaN where the grader failed.
        accurate: bool [problems].
        forwards, tokens: sums over the completions; tokens through the first EOS.
        seconds: of generation, grading apart.
    """

    values: np.ndarray
    accurate: np.ndarray
    forwards: int
    tokens: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return float(self.accurate.mean())

    @property
    def mean_reward(self) -> float:
        return float("nan") if np.isnan(self.values).all() else float(np.nanmean(self.values))

    @property
    def invalid_share(self) -> float:
        return float(np.isnan(self.values).mean())


def num_test_problems(recipe: Recipe, task: Task) -> int:
    """Problems of an evaluation: the first `task.eval_rows`, as far as there are that many."""
    return recipe.task.eval_rows if task.size is None else min(recipe.task.eval_rows, task.size)


def measure(crew: Any, recipe: Recipe, task: Task, tokenizer: Any, settings: SamplerConfig) -> Measurement:
    """One completion for each test problem, generated with `settings` and graded."""
    num_problems = num_test_problems(recipe, task)
    graded, seconds = [], 0.0
    for first in range(0, num_problems, PIECE):
        issued = issue(task, tokenizer, EVAL, first // PIECE, first, min(PIECE, num_problems - first), 1)
        started = time.perf_counter()
        rollouts = generate(crew, issued, settings)
        seconds += time.perf_counter() - started
        graded += grade(crew, issued, rollouts, tokenizer, recipe.reward_pool.batch_size)[0]
    return Measurement(
        values=np.array([rollout.reward.value if rollout.reward.valid else np.nan for rollout in graded]),
        accurate=np.array([rollout.reward.accurate for rollout in graded]),
        forwards=sum(rollout.num_forwards for rollout in graded),
        tokens=sum(rollout.length for rollout in graded),
        seconds=seconds,
    )


def evaluate(crew: Any, recipe: Recipe, task: Task, tokenizer: Any) -> dict[str, Any]:
    """Accuracy, mean reward and share of failed grades on the first `task.eval_rows` problems at each of `eval_temperatures`.

    The noise is the same at every evaluation of a run, so that its curve is not blurred by it.
    """
    metrics: dict[str, Any] = {}
    for temperature in recipe.eval_temperatures:
        measured = measure(crew, recipe, task, tokenizer, evaluation_settings(recipe.sampler, temperature))
        key = accuracy_key(temperature)
        metrics[key] = measured.accuracy
        metrics[key.replace("accuracy", "reward")] = measured.mean_reward
        metrics[key.replace("accuracy", "invalid_share")] = measured.invalid_share
    return metrics | {
        "eval/num_problems": num_test_problems(recipe, task),
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
    recipe, model_path = evaluation_recipe(path, overrides or [], recipe_path)
    with evaluation_crew(recipe, model_path) as (crew, task, tokenizer):
        return evaluate(crew, recipe, task, tokenizer)


def evaluation_recipe(path: Path, overrides: list[str], recipe_path: str | None = None) -> tuple[Recipe, Path]:
    """The recipe to evaluate a model, a checkpoint or a run with, for generators alone, and the folder of the model.

    Raises:
        RecipeError: no recipe is given and the checkpoint lies in no run folder, or it has nothing to grade with.
        CheckpointError: there is nothing to load.
    """
    from rlhub.checkpoints.sealed import resolve_model_path

    model_path = resolve_model_path(Path(path))
    if recipe_path is None:
        candidates = [folder / "config.yaml" for folder in (model_path, *model_path.parents)]
        found = [candidate for candidate in candidates if candidate.exists()]
        if not found:
            raise RecipeError(f"{path} lies in no run folder; say which task with --recipe RECIPE")
        recipe_path = str(found[0])
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
