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
    from rlhub.config.tasks import check_reward_columns, evaluation_task
    from rlhub.errors import DataError
    from rlhub.planning.plan import make_plan
    from rlhub.planning.view import plan_view

    loaded = load_recipe(recipe, overrides)
    made = make_plan(loaded)
    try:
        check_reward_columns(loaded, evaluation_task(loaded))
    except DataError as error:
        click.echo(f"the data cannot be read here, so the reward's columns were not checked: {error}", err=True)
    if as_json:
        click.echo(json.dumps(made.to_dict()))
    else:
        from rich.console import Console

        Console().print(plan_view(made))
