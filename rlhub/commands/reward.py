"""`rlhub reward`: graders from the command line. Commands import what they need when they run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rewards.pool.settings import RewardPoolConfig
from rlhub.errors import UserError

deadline = click.option(
    "--deadline",
    default=RewardPoolConfig.deadline_seconds,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds for each item, or call of a batched reward; rewards with limits of their own ignore it.",
)


@click.group()
def reward() -> None:
    """Try graders on files of completions, and serve them."""


@reward.command()
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSON lines: prompt, completion, label? and the reward's columns."
)
@click.option(
    "--columns", default="", metavar="NAME=FIELD,...", help="Where the file has other names, e.g. completion=output,label=is_correct."
)
@deadline
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1), help="Grading processes.")
@click.option("--show", default=10, show_default=True, help="Disagreements in the table; --json has all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def test(name: str, options: tuple[str, ...], data: Path, columns: str, deadline: float, processes: int, show: int, as_json: bool) -> None:
    """Grade a file of completions with the reward NAME and compare the verdicts with the labels, where there are any.

    NAME is a reward, a dotted path or file.py:function; KEY=VALUE are its options. A completion is right when its value is 1.
    Grading happens in processes that are ended where a grader hangs or crashes, as in training. The exit code is 1 when no row could be
    graded.

    \b
    Examples:
      rlhub reward test math_answer --data solutions.jsonl
      rlhub reward test countdown --data out.jsonl answer=whole --deadline 2 --processes 2 --json
      rlhub reward test grader.py:brevity --data out.jsonl --columns completion=output,label=is_correct
    """
    from rlhub.evals.reward_trial import grade_file, report_view

    config = RewardPoolConfig(deadline_seconds=deadline, processes=processes)
    report = grade_file(reward_part(name, options), str(data), columns, config)
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(report_view(report, show))
    if report["counts"]["graded"] == 0:
        first = report["first_failure"]
        click.secho(f"none of {report['rows']} rows could be graded; row {first['row']}: {first['status']}", err=True, fg="red", bold=True)
        click.echo(first["detail"].rstrip(), err=True)
        click.echo("a column that the reward needs may have another name in the file: --columns NAME=FIELD", err=True)
        click.get_current_context().exit(1)


@reward.command()
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of this machine.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Grading processes.")
@deadline
@click.option(
    "--memory",
    default=RewardPoolConfig.memory_megabytes,
    show_default=True,
    type=click.IntRange(min=1),
    help="Megabytes that a grading process may take.",
)
@click.option("--cache", default="none", show_default=True, help="Look grades up that were given before: none, memory or a folder.")
def serve(name: str, options: tuple[str, ...], host: str, port: int, workers: int, deadline: float, memory: int, cache: str) -> None:
    """Serve the reward NAME over HTTP until Ctrl-C, for recipes with `reward: {name: http, url: ...}`.

    \b
    Examples:
      rlhub reward serve math_answer --workers 8 --port 8000
      rlhub reward serve grader.py:brevity scale=0.5 --port 0
    """
    from rewards.pool.server import serve

    config = RewardPoolConfig(deadline_seconds=deadline, processes=workers, memory_megabytes=memory, cache=cache)
    serve(reward_part(name, options), host, port, config, announce=lambda url: click.echo(f"serving {name} at {url}"))


def reward_part(name: str, options: Sequence[str]) -> dict[str, Any]:
    """A recipe's `task.reward` from the command line.

    >>> reward_part("countdown", ["answer=whole"])
    {'name': 'countdown', 'answer': 'whole'}

    Raises:
        UserError: an option is not KEY=VALUE.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for option in options:
        if not option.partition("=")[0] or "=" not in option:
            raise UserError(f"expected KEY=VALUE for an option of the reward, got {option!r}")
    try:
        return {"name": name, **OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))}
    except OmegaConfBaseException as error:
        raise UserError(f"the options of {name} cannot be read: {error}") from error
