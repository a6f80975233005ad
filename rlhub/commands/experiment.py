"""`rlhub experiment`: arms and seeds of one recipe."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", metavar="EXPERIMENT", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the runs; runs/<name of the file> by default.")
def experiment(path: Path, output: Path | None) -> None:
    """Run the arms and seeds of EXPERIMENT and compare them in one table, one plot and one report. Continues where it was stopped.

    \b
    Examples:
      rlhub experiment recipes/experiments/quickstart.yaml
      rlhub experiment recipes/experiments/ablation_espo.yaml --output runs/ablation
    """
    from rlhub.studies.experiment import run_experiment

    click.echo(run_experiment(path, output))
