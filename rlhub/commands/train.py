"""`rlhub train`: a recipe becomes a run."""

from __future__ import annotations

import shlex
import sys

import click

from rlhub.commands import INTERRUPTED


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train what RECIPE describes. An existing run continues from its last checkpoint.

    \b
    Examples:
      rlhub train recipes/sort.yaml
      rlhub train recipes/sort.yaml run.name=fast run.steps=20 algorithm.objective.name=token_clip
      rlhub train recipes/sort.yaml run.resume=false
    """
    from rlhub.config.checks import check_devices
    from rlhub.config.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    check_devices(resolved)
    from rlhub.training.run import train as run_train

    try:
        click.echo(run_train(resolved))
    except KeyboardInterrupt:
        kept = [text for text in overrides if not text.startswith("run.resume=")]
        command = shlex.join(["rlhub", "train", recipe, *kept])
        click.echo(f"stopped; the same command continues from the last checkpoint: {command}", err=True)
        sys.exit(INTERRUPTED)
