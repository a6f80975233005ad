"""`rlhub lab`: the command line of the experiments."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write to; runs/lab_NAME by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def lab(name: str | None, overrides: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Test a published claim on a tiny network, with a control that must fail. Without NAME: list the experiments.

    The settings of an experiment stand in recipes/labs/NAME.yaml. One that was stopped is continued by the same command.

    \b
    Examples:
      rlhub lab
      rlhub lab eq6_variance
      rlhub lab reversal seeds=[0] steps=2000 --out runs/reversal_short
    """
    from rich.console import Console

    from rlhub.studies.lab import claims, run_lab, show

    if name is None:
        width = max(map(len, known := claims()))
        click.echo("\n".join(f"{lab_name:{width}}  {claim}" for lab_name, claim in known.items()))
        return
    result = run_lab(name, overrides, out, Console(stderr=True))
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result, Console())
        click.echo(result["out"])
