"""`rlhub pairs`: offline preference pairs from a policy, labelled by the task's reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlhub.algorithm.batching import grade_of
from rlhub.checkpoints.sealed import recipe_of_run, resolve_model_path
from rlhub.config.recipe import load_recipe, validate
from rlhub.config.schema import Recipe
from rlhub.errors import DataError, RecipeError, UserError, WorkerLost
from rlhub.files import replace_file
from rlhub.phases import Phase
from rlhub.records.progress import RunProgress
from rlhub.tasks import load_task
from rlhub.training.grading import grade
from rlhub.training.rollouts import evaluation_settings, issue
from rlhub.types import Prompt, RewardResult

PROMPTS_AT_ONCE = 64


def sample_pairs(
    path: Path,
    out: Path,
    num_prompts: int,
    overrides: list[str] | None = None,
    recipe_path: str | None = None,
    console: Console | None = None,
) -> str:
    """Write `{prompt, chosen, rejected, chosen_reward, rejected_reward}` for every training prompt whose completions differ in reward.

    `algorithm.completions_per_prompt` completions of each prompt are sampled at temperature 1. At a tie the first one stands for the
    others. Returns one line that says how many prompts gave a pair and why the others did not.

    Raises:
        RecipeError: no recipe is given and the checkpoint lies in no run folder, or it has no reward or groups of one.
        DataError: no prompt gave a pair.
        UserError: a worker kept dying.
    """
    from rlhub.checkpoints.tokenizers import load_tokenizer
    from workers.placement import assemble

    model_path = resolve_model_path(Path(path))
    recipe = _recipe(model_path, overrides or [], recipe_path)
    task = load_task(recipe.task.name, recipe.task.train, "train", recipe.run.seed)
    tokenizer = load_tokenizer(str(model_path))
    crew = assemble(recipe, model_path)
    rows: list[dict[str, Any]] = []
    counts = {"without signal": 0, "with fewer than two valid grades": 0}
    try:
        with RunProgress(console or Console(stderr=True)) as progress:
            progress.phase("pairs", num_prompts)
            for first in range(0, num_prompts, PROMPTS_AT_ONCE):
                size = min(PROMPTS_AT_ONCE, num_prompts - first)
                group_size = recipe.algorithm.completions_per_prompt
                issued = issue(task, tokenizer, Phase.SAMPLE, first // PROMPTS_AT_ONCE, first, size, group_size)
                rollouts = crew.generators.generate(issued.requests, evaluation_settings(recipe.sampler, 1.0), crew.version)
                rollouts, texts = grade(crew, issued, rollouts, tokenizer, recipe.reward_pool.batch_size)
                for start in range(0, len(rollouts), group_size):
                    group = slice(start, start + group_size)
                    pair = _pair(issued.examples[start].prompt, texts[group], [grade_of(rollout) for rollout in rollouts[group]])
                    if isinstance(pair, str):
                        counts[pair] += 1
                    else:
                        rows.append(pair)
                progress.update(first + size)
    except WorkerLost as error:
        raise UserError(str(error)) from error
    finally:
        crew.close()
    summary = f"{len(rows)} pairs from {num_prompts} prompts" + "".join(f", {count} {name}" for name, count in counts.items() if count)
    if not rows:
        raise DataError(f"{summary}: nothing to write; raise algorithm.completions_per_prompt or take another policy")
    replace_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return f"{out}: {summary}"


def _pair(prompt: Prompt, texts: Sequence[str], grades: Sequence[RewardResult]) -> dict[str, Any] | str:
    """The row of one prompt from its completions and their grades; or why it gives none."""
    values = np.array([grade.value if grade.valid else np.nan for grade in grades])
    places = best_and_worst(values)
    if isinstance(places, str):
        return places
    best, worst = places
    rewards = {"chosen_reward": float(values[best]), "rejected_reward": float(values[worst])}
    return {"prompt": prompt, "chosen": texts[best], "rejected": texts[worst], **rewards}


def best_and_worst(values: np.ndarray) -> tuple[int, int] | str:
    """Indices of the highest and the lowest reward [G] (NaN where invalid); or why there is no pair."""
    if (~np.isnan(values)).sum() < 2:
        return "with fewer than two valid grades"
    best, worst = int(np.nanargmax(values)), int(np.nanargmin(values))
    return (best, worst) if values[best] > values[worst] else "without signal"


def _recipe(model_path: Path, overrides: list[str], recipe_path: str | None) -> Recipe:
    """The recipe of the run in which the model lies, or the one given, for generators and reward workers alone."""
    if recipe_path is None:
        recipe_path = str(recipe_of_run(model_path))
    recipe = load_recipe(recipe_path, overrides)
    validate(recipe)
    if recipe.task.reward["name"] == "none":
        raise RecipeError("task.reward.name: none, but pairs are made by a reward; name a module of rewards")
    if recipe.algorithm.completions_per_prompt < 2:
        raise RecipeError("algorithm.completions_per_prompt: a pair needs at least 2 completions of a prompt, got 1")
    recipe.roles.scorers, recipe.roles.learners, recipe.learner.backend = 0, 0, "torch"
    recipe.model.path = str(model_path)
    return recipe
