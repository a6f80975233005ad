"""`rlhub model`: the command line of model folders."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def model() -> None:
    """Look into model folders."""


@model.command()
@click.argument("path", metavar="MODEL_OR_RUN", type=click.Path(path_type=Path))
@click.option("--learners", default=8, show_default=True, type=click.IntRange(min=1), help="Ranks that training is shared over.")
@click.option("--rank", default=0, show_default=True, type=click.IntRange(min=0), help="Of adapters to train; 0: all weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, learners: int, rank: int, as_json: bool) -> None:
    """Show family, profile, size, memory to serve and to train, and problems of a model folder, an adapter, a checkpoint or a run.

    Needs no weights: config.json is enough. Ends with status 1 when there are problems.

    \b
    Examples:
      rlhub model inspect GSAI-ML/LLaDA-8B-Instruct
      rlhub model inspect GSAI-ML/LLaDA-8B-Instruct --rank 64 --learners 1
      rlhub model inspect runs/sort --json
    """
    from rlhub.planning.model_report import inspect_model, report_view

    report = inspect_model(path, learners, rank)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        from rich.console import Console

        Console().print(report_view(report))
    if report.problems:
        raise SystemExit(1)
