"""`rlhub reward`: graders from the command line. Commands import what they need when they run."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def reward() -> None:
    """Try graders on files of completions, and serve them."""


# Further commands of the group are registered below `test` with @reward.command().


@reward.command()
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSON lines: prompt, completion, label? and the reward's columns."
)
@click.option(
    "--columns", default="", metavar="NAME=FIELD,...", help="Where the file has other names, e.g. completion=output,label=is_correct."
)
@click.option("--show", default=10, show_default=True, help="Disagreements in the table; --json has all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def test(name: str, options: tuple[str, ...], data: Path, columns: str, show: int, as_json: bool) -> None:
    """Grade a file of completions with the reward NAME and compare the verdicts with the labels, where there are any.

    NAME is a reward, a dotted path or file.py:function; KEY=VALUE are its options. A completion is right when its value is 1.

    \b
    Examples:
      rlhub reward test math_answer --data solutions.jsonl
      rlhub reward test countdown --data out.jsonl answer=whole --json
      rlhub reward test grader.py:brevity --data out.jsonl --columns completion=output,label=is_correct
    """
    from rlhub.reward_test import grade_file, report_view

    report = grade_file(name, list(options), str(data), columns)
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(report_view(report, show))


@reward.command()
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of this machine.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Grading processes.")
@click.option("--deadline", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Seconds for each item.")
@click.option("--memory", default=4096, show_default=True, type=click.IntRange(min=1), help="Megabytes that a grading process may take.")
@click.option("--cache", default="none", show_default=True, help="Look grades up that were given before: none, memory or a folder.")
def serve(name: str, options: tuple[str, ...], host: str, port: int, workers: int, deadline: float, memory: int, cache: str) -> None:
    """Serve the reward NAME over HTTP until Ctrl-C, for recipes with `reward: {name: http, url: ...}`.

    \b
    Examples:
      rlhub reward serve math_answer --workers 8 --port 8000
      rlhub reward serve grader.py:brevity scale=0.5 --port 0
    """
    from rlhub.config import RewardPoolConfig
    from rlhub.reward_server import reward_part, serve

    config = RewardPoolConfig(deadline_seconds=deadline, processes=workers, memory_megabytes=memory, cache=cache)
    serve(reward_part(name, options), host, port, config, announce=lambda url: click.echo(f"serving {name} at {url}"))
