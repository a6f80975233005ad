"""The command line. Commands import what they need when they run, so that `--help` and `plan` start at once."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from rlhub.commands.bench import bench
from rlhub.commands.lab import lab
from rlhub.commands.model import model
from rlhub.commands.reward import reward
from rlhub.errors import UserError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
WIDE = 130  # columns of a table that goes into a file or a pipe
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")  # what tells `sampler.temperature=0` from a prompt


class OneLineErrors(click.Group):
    """A group whose errors are one line on stderr with exit code 2, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            sys.exit(super().main(*args, **{"prog_name": "rlhub", **kwargs, "standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help(), err=True)
            sys.exit(2)
        except click.NoSuchOption as error:
            fail(f"{error.format_message().rstrip('.')}; recipe keys are written key=value, without dashes (see --help)")
        except click.ClickException as error:
            fail(error.format_message())
        except UserError as error:
            # Ray hands on an error of a worker with the worker's traceback in its text; the cause is the error itself.
            fail(str(vars(error).get("cause", error)))
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped", err=True)
            sys.exit(INTERRUPTED)


def fail(message: str) -> NoReturn:
    """Ends the program with one line."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rlhub")
def main() -> None:
    """Reinforcement-learning post-training for diffusion large language models.

    A run is described by a recipe (YAML) and lives in one folder. Start with `rlhub train recipes/sort.yaml`.
    """
    here = os.getcwd()
    if sys.path[0] in ("", here):  # as `python -m` has it
        sys.path.pop(0)
    if here not in sys.path:
        sys.path.append(here)  # a recipe may name modules of the user's; at the end, where they hide nothing that is installed


main.add_command(bench)
main.add_command(model)
main.add_command(lab)
main.add_command(reward)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train what RECIPE describes. An existing run continues from its last checkpoint.

    \b
    Examples:
      rlhub train recipes/sort.yaml
      rlhub train recipes/sort.yaml run.name=fast run.steps=20 algorithm.objective.name=token_clip
      rlhub train recipes/sort.yaml run.resume=false
    """
    from rlhub.config.checks import check_devices
    from rlhub.config.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    check_devices(resolved)
    from rlhub.training.run import train as run_train

    try:
        click.echo(run_train(resolved))
    except KeyboardInterrupt:
        kept = [text for text in overrides if not text.startswith("run.resume=")]
        command = shlex.join(["rlhub", "train", recipe, *kept])
        click.echo(f"stopped; the same command continues from the last checkpoint: {command}", err=True)
        sys.exit(INTERRUPTED)


@main.command("eval")
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
        click.echo(json.dumps(results))
    else:
        _print_results(results)


def _evaluate_choices(path: Path, data: str, overrides: tuple[str, ...], out: Path | None) -> dict[str, Any]:
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


@main.command()
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


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE and show what it will do: batches, forwards, placement and memory. Writes nothing.

    \b
    Examples:
      rlhub plan recipes/sort.yaml
      rlhub plan recipes/sort.yaml roles.learners=4 --json
    """
    from rlhub.config.recipe import load_recipe
    from rlhub.planning.plan import make_plan, plan_view

    made = make_plan(load_recipe(recipe, overrides))
    if as_json:
        click.echo(json.dumps(made.to_dict()))
    else:
        from rich.console import Console

        Console().print(plan_view(made))


@main.command()
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


@main.command()
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


@main.command()
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


@main.command()
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


def split_prompts(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts and the overrides.

    >>> split_prompts(["3 + 4 = 7", "seed=3"])
    (['3 + 4 = 7'], ['seed=3'])
    """
    return [text for text in arguments if not OVERRIDE.match(text)], [text for text in arguments if OVERRIDE.match(text)]


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
