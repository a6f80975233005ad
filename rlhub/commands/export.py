"""`rlhub export`: the model of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter-only", is_flag=True, help="Write the adapter in PEFT's layout instead of merging it into its base.")
def export(run: Path, out: Path, adapter_only: bool) -> None:
    """Write the last model of RUN to the folder OUT, in the Hugging Face layout of its family; an adapter is merged into its base.

    \b
    Examples:
      rlhub export runs/sort exported/sort
      rlhub export runs/sort_lora exported/adapter --adapter-only
    """
    from rlhub.checkpoints.export import export as export_model

    click.echo(export_model(run, out, adapter_only))
