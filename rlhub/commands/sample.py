"""`rlhub sample`: completions and how they are denoised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")  # what tells `sampler.temperature=0` from a prompt


@click.command()
@click.argument("path", metavar="CHECKPOINT_OR_RUN", type=click.Path(path_type=Path))
@click.argument("rest", nargs=-1, metavar="[PROMPT]... [KEY=VALUE]...")
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="More prompts: a line each, or the `prompt` of JSON lines.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page with a timeline of each completion.")
def sample(path: Path, rest: tuple[str, ...], file: Path | None, html: Path | None) -> None:
    """Generate a completion for each PROMPT and show how it is denoised. Without one, the first logged prompt of the run is taken.

    \b
    Examples:
      rlhub sample runs/sort
      rlhub sample runs/sort "3 1 4 1 5 9 2 6" sampler.temperature=0 delay=0.5
      rlhub sample runs/sort --file prompts.txt --html timeline.html sampler.name=threshold
    """
    prompts, overrides = split_prompts(rest)
    from rlhub.reports.display import show_sample

    show_sample(path, prompts, overrides, file, html)


def split_prompts(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts and the overrides.

    >>> split_prompts(["3 + 4 = 7", "seed=3"])
    (['3 + 4 = 7'], ['seed=3'])
    """
    return [text for text in arguments if not OVERRIDE.match(text)], [text for text in arguments if OVERRIDE.match(text)]
