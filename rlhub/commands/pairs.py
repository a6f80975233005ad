"""`rlhub pairs`: preference pairs, sampled from a policy and ranked by a reward."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", metavar="CHECKPOINT_OR_RUN", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write, JSON lines.")
@click.option("--prompts", default=1024, show_default=True, type=click.IntRange(min=1), help="Training prompts to sample for.")
@click.option("--recipe", "recipe_path", help="Recipe with the task and sampler; a run brings its own.")
def pairs(path: Path, overrides: tuple[str, ...], out: Path, prompts: int, recipe_path: str | None) -> None:
    """Make preference pairs: sample a policy, grade with the task's reward, keep the best and the worst completion of each prompt.

    \b
    Examples:
      rlhub pairs runs/sort --out runs/sort_pairs.jsonl
      rlhub pairs exported/ --recipe recipes/sort.yaml --out pairs.jsonl --prompts 4096 algorithm.completions_per_prompt=4
    """
    from rlhub.training.pair_sampling import sample_pairs

    click.echo(sample_pairs(path, out, prompts, list(overrides), recipe_path))
