"""`rlhub bench`: the command line of the measurements."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measure the methods themselves."""


@bench.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoint", "checkpoints", multiple=True, type=click.Path(path_type=Path), help="A policy, or a run; may be repeated.")
@click.option(
    "--pairs", type=click.Path(path_type=Path), help="JSON lines with prompt, chosen, rejected; else the recipe's held-out pairs."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Model that training began with.")
@click.option("--num-pairs", type=click.IntRange(min=1), help="Pairs to measure on; 64, or 8 in an enumeration.")
@click.option("--repeats", type=click.IntRange(min=4), help="Repeats of each estimate under fresh noise; 16, or 200 in an enumeration.")
@click.option("--gradient-pairs", type=click.IntRange(min=0), default=16, show_default=True, help="Pairs for the variance of the gradient.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; <run.output_dir>/<run.name>_variance by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def variance(recipe: str, overrides: tuple[str, ...], as_json: bool, **request: object) -> None:
    """Variance of the preference score, its loss and its gradient under every way to spend a budget of draws.

    RECIPE gives beta and the seed. Without --checkpoint and --pairs a random network on short responses is measured, and compared with
    exact values from all its masks. A run folder stands for its checkpoints and draws what sharing noise gains as training goes on.

    \b
    Examples:
      rlhub bench variance recipes/algorithms/online_dpo.yaml
      rlhub bench variance recipes/sort.yaml --checkpoint runs/dpo --reference runs/sft --pairs pairs.jsonl
      rlhub bench variance recipes/sort.yaml run.seed=1 --repeats 200 --out runs/sort_variance --json
    """
    from rich.console import Console

    from rlhub.config.recipe import load_recipe
    from rlhub.studies.variance.measure import Request, show
    from rlhub.studies.variance.measure import variance as measure

    result = measure(load_recipe(recipe, overrides), Request(**request), Console(stderr=True))
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result, Console())
        click.echo(result["out"])
