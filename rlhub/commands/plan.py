"""`rlhub plan`: what a recipe will do, before anything starts."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE and show what it will do: batches, forwards, placement and memory. Writes nothing.

    \b
    Examples:
      rlhub plan recipes/sort.yaml
      rlhub plan recipes/sort.yaml roles.learners=4 --json
    """
    from rlhub.config.recipe import load_recipe
    from rlhub.planning.plan import make_plan
    from rlhub.planning.view import plan_view

    made = make_plan(load_recipe(recipe, overrides))
    if as_json:
        click.echo(json.dumps(made.to_dict()))
    else:
        from rich.console import Console

        Console().print(plan_view(made))
