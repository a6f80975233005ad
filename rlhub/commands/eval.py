"""`rlhub eval`: held-out accuracy, multiple choice by likelihood, and grids of sampler settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rlhub.commands import INTERRUPTED

WIDE = 130  # columns of a table that goes into a file or a pipe


@click.command("eval")
@click.argument("path", metavar="CHECKPOINT_OR_RUN", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", "recipe_path", help="Recipe with the task and sampler; a run brings its own.")
@click.option("--likelihood", "choices", metavar="DATA", help="Multiple-choice data (JSON lines, Parquet or a source), by likelihood.")
@click.option("--grid", is_flag=True, help="Accuracy against forward passes: every combination of sampler settings KEY=A,B,...")
@click.option("--out", type=click.Path(path_type=Path), help="File of the results by item (--likelihood) or cell (--grid), continued.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    path: Path, overrides: tuple[str, ...], recipe_path: str | None, choices: str | None, grid: bool, out: Path | None, as_json: bool
) -> None:
    """Measure accuracy on the held-out problems of a task, or on multiple-choice data by likelihood.

    With --likelihood, KEY=VALUE are draws, method (monte_carlo or chain), normalize (sum, token or byte), guidance, prompt, choices,
    answer, template, limit and the others of docs/likelihood_eval.md. With --grid, a table, eval_grid.json and a plot with the Pareto
    front are made in the run folder; combinations that do not fit are skipped and listed, finished ones are not measured again
    (docs/rollouts.md).

    \b
    Examples:
      rlhub eval runs/sort
      rlhub eval runs/sort/checkpoints/step_00060 task.eval_rows=2048 eval_temperatures=[0.0]
      rlhub eval exported/ --recipe recipes/sort.yaml --json
      rlhub eval runs/sort --likelihood recipes/data/sort_choices.jsonl draws=128
      rlhub eval runs/sort --grid sampler.name=low_confidence,random sampler.steps=1,2,4,8
    """
    if grid and choices is not None:
        raise click.UsageError("--grid and --likelihood are two different measurements; give one of them")
    if out is not None and not grid and choices is None:
        raise click.UsageError("--out is for --grid and --likelihood; write --json > FILE for the plain evaluation")
    if grid:
        _evaluate_grid(path, overrides, recipe_path, out, as_json)
        return
    if choices is None:
        from rlhub.evals.checkpoint import evaluate_checkpoint

        results = evaluate_checkpoint(path, list(overrides), recipe_path)
    else:
        results = _evaluate_choices(path, choices, overrides, out)
    if as_json:
        click.echo(json.dumps({key: None if value != value else value for key, value in results.items()}, allow_nan=False))
    else:
        _print_results(results)


def _evaluate_choices(path: Path, data: str, overrides: tuple[str, ...], out: Path | None) -> dict[str, Any]:
    """`--likelihood`: multiple choice by conditional likelihood, continued where it stopped."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from rlhub.evals import likelihood as likelihood_eval
    from rlhub.parts import part_config
    from rlhub.records.progress import RunProgress

    options = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    config = part_config(likelihood_eval, {"path": data, **options})
    try:
        with RunProgress(Console(stderr=True)) as progress:
            return likelihood_eval.evaluate_choices(path, config, out, progress)
    except KeyboardInterrupt:
        click.echo("stopped; the same command continues with the items that are left", err=True)
        sys.exit(INTERRUPTED)


def _evaluate_grid(path: Path, arguments: Sequence[str], recipe_path: str | None, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from rlhub.evals.grid import grid_view, run_grid

    grid = run_grid(path, arguments, recipe_path, out, Console(stderr=as_json))
    if as_json:
        skipped = [{"values": values, "reason": reason} for values, reason in grid.skipped]
        click.echo(json.dumps({"cells": grid.results, "skipped": skipped}))
    else:
        console = Console()
        (console if console.is_terminal else Console(width=WIDE)).print(grid_view(grid))


def _print_results(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for key, value in results.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
