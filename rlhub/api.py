"""rlhub from Python, for notebooks, tests and training loops of your own; see docs and examples. Exported by `rlhub`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhub.config.recipe import load_recipe
from rlhub.inference import Estimate, Model, generate, load_model, log_likelihood

__all__ = ["Estimate", "Model", "generate", "load_model", "log_likelihood", "train"]


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train as `rlhub train` does; returns the run folder.

    Raises:
        RecipeError: the recipe cannot be used as written.

    Example:
        >>> train("recipes/sort.yaml", overrides=["run.steps=10"])                # doctest: +SKIP
    """
    from rlhub.training.run import train as run_recipe

    return run_recipe(load_recipe(recipe_path, overrides))
