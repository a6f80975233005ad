"""`rlhub report`: one HTML page about one run or several."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Also save the accuracy plot as PNG, SVG or PDF.")
def report(runs: tuple[Path, ...], plot: Path | None) -> None:
    """Write a self-contained HTML report of one run, or a comparison of several.

    \b
    Examples:
      rlhub report runs/sort
      rlhub report runs/espo runs/diffu_grpo
      rlhub report runs/quickstart --plot docs/quickstart.png
    """
    from rlhub.reports.page import write_report

    click.echo(write_report(list(runs)))
    if plot is not None:
        from rlhub.reports.page import save_accuracy_plot

        click.echo(save_accuracy_plot(list(runs), plot))
