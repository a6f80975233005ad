"""`rlhub eval --grid`: accuracy against forward passes per token over a grid of sampler settings.

Every cell is measured on the same problems with the same noise and kept in a JSON file as soon as it is done, so that a grid that was
stopped, or one that grows, measures only what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlhub.checkpoints.sealed import recipe_of_run
from rlhub.config.schema import Recipe, SamplerConfig
from rlhub.errors import DataError, RecipeError, UserError
from rlhub.evals.checkpoint import evaluation_crew, evaluation_recipe
from rlhub.files import plain, replace_file
from rlhub.parts import load_part, part_config
from rlhub.records.metrics import wilson_interval
from rlhub.records.progress import RunProgress, accuracy_text
from rlhub.reports.plots import COLORS, INK, STYLE, Plot
from rlhub.training.held_out import measure, num_test_problems

SCHEMA = 1
NAME = "eval_grid.json"
TEMPERATURE = "sampler.temperature"
OPTIONS = "sampler.options."
MARKERS = "osD^vP*X"
SAME = ("model", "dtype", "test_hash", "num_problems", "seed", "sampler")  # what makes two cells the same measurement


@dataclass(frozen=True)
class Cell:
    """A combination of the grid: its values by key, and the sampler that they make."""

    values: dict[str, str]
    sampler: SamplerConfig


@dataclass(frozen=True)
class Grid:
    """A measured grid: a result per cell (see `measure_cell`), and the combinations that do not fit with the reason."""

    keys: list[str]
    results: list[dict[str, Any]]
    skipped: list[tuple[dict[str, str], str]]
    file: Path


def run_grid(
    path: Path, arguments: Sequence[str], recipe_path: str | None = None, out: Path | None = None, console: Console | None = None
) -> Grid:
    """Measures every combination that is not in the file yet, then draws all of them beside it as a PNG.

    Args:
        path: model folder, checkpoint or run.
        arguments: `sampler.KEY=A,B,...` are axes of the grid, any other `key=value` an override. Without a temperature among them those of
            `eval_temperatures` are an axis.
        out: JSON file; `eval_grid.json` in the run folder when None.

    Raises:
        UserError: there is no axis, an axis is not of the sampler, no combination fits, or nothing says where to write.
    """
    axes, overrides = split_axes(arguments)
    recipe, model_path = evaluation_recipe(path, overrides, recipe_path)
    if recipe_path is None:
        recipe_path = str(recipe_of_run(model_path))
    elif out is None:
        raise UserError("with --recipe nothing says which run this belongs to; say where to write with --out FILE.json")
    file = out or Path(recipe_path).parent / NAME
    told = [text.partition("=")[0] for text in overrides]
    if TEMPERATURE not in axes and TEMPERATURE not in told:
        axes[TEMPERATURE] = [f"{value:g}" for value in recipe.eval_temperatures]
    cells, skipped = grid_cells(recipe_path, overrides, combinations(axes, recipe.sampler.name))
    if not cells:
        raise UserError(f"none of the {len(skipped)} combinations fits; the first one: {skipped[0][1]}")

    known = read_cells(file)
    results: list[dict[str, Any]] = []
    with evaluation_crew(recipe, model_path) as (crew, task, tokenizer), RunProgress(console) as progress:
        context = {
            "model": model_digest(model_path),
            "dtype": recipe.model.dtype,
            "test_hash": task.fingerprint()[:16],
            "num_problems": num_test_problems(recipe, task),
            "seed": recipe.run.seed,
        }
        wanted = [context | {"sampler": plain(dataclasses.asdict(cell.sampler))} for cell in cells]
        found = [next((result for result in known if all(result.get(key) == want[key] for key in SAME)), None) for want in wanted]
        done = sum(result is not None for result in found)
        progress.phase("grid", len(cells), done)
        for cell, want, result in zip(cells, wanted, found, strict=True):
            if result is None:
                result = want | measure_cell(crew, recipe, task, tokenizer, cell.sampler)
                known.append(result)
                replace_file(file, json.dumps({"schema": SCHEMA, "cells": known}, indent=1, allow_nan=False) + "\n")
                done += 1
                progress.update(done, **{"eval/accuracy": result["accuracy"]})
            results.append(result | {"values": cell.values})
    grid = Grid(list(axes), results, skipped, file)
    draw_grid(grid).save(file.with_suffix(".png"))
    return grid


def split_axes(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The axes, keys with several values apart by commas outside of brackets, and the overrides.

    >>> split_axes(["sampler.steps=2,4", "task.eval_rows=64", "eval_temperatures=[0.0, 1.0]"])
    ({'sampler.steps': ['2', '4']}, ['task.eval_rows=64', 'eval_temperatures=[0.0, 1.0]'])

    Raises:
        UserError: no key has several values, or one that is not of the sampler has.
    """
    axes, overrides = {}, []
    for text in arguments:
        key, _, value = text.partition("=")
        values = [part.strip() for part in value.split(",")] if not value.lstrip().startswith(("[", "{", '"', "'")) else [value]
        if len(values) == 1:
            overrides.append(text)
        elif not key.startswith("sampler."):
            raise UserError(f"{text!r}: a grid is over sampler settings (sampler.steps=2,4,8); put a list of another key in [brackets]")
        elif key in axes:
            raise UserError(f"{key} is given twice; write all of its values in one {key}=A,B")
        else:
            axes[key] = list(dict.fromkeys(filter(None, values)))
    if not axes:
        raise UserError("a grid needs a sampler setting with several values, for example sampler.steps=2,4,8")
    return axes, overrides


def combinations(axes: dict[str, list[str]], name: str) -> list[dict[str, str]]:
    """Every combination of values by key. A sampler that lacks an option which another one on the grid has is combined once without it.

    Args:
        name: the sampler where no axis names it.
    """
    owners: dict[str, list[str]] = {}
    for sampler in axes.get("sampler.name", [name]):
        with contextlib.suppress(RecipeError):  # an unknown sampler is reported with its cells
            for field in dataclasses.fields(load_part("samplers", sampler).Config):
                owners.setdefault(OPTIONS + field.name, []).append(sampler)
    made: dict[tuple[tuple[str, str], ...], None] = {}
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        sampler = values.get("sampler.name", name)
        made[tuple((key, value) for key, value in values.items() if key not in owners or sampler in owners[key])] = None
    return [dict(items) for items in made]


def grid_cells(recipe_path: str, overrides: list[str], made: list[dict[str, str]]) -> tuple[list[Cell], list[tuple[dict[str, str], str]]]:
    """Those of the combinations that make a sampler, and the others with the reason."""
    from rlhub.config.recipe import load_recipe

    cells, skipped = [], []
    for values in made:
        # A sampler drops the options of the one before, so its name comes first.
        ordered = sorted(values.items(), key=lambda item: item[0] != "sampler.name")
        try:
            sampler = load_recipe(recipe_path, [*overrides, *(f"{key}={value}" for key, value in ordered)]).sampler
            module = load_part("samplers", sampler.name)
            module.schedule(sampler.length, sampler.steps, sampler.block_length, part_config(module, sampler.options))
        except (RecipeError, ValueError) as error:
            skipped.append((values, re.sub(r"^override '[^']*': ", "", str(error))))
        else:
            cells.append(Cell(values, sampler))
    return cells, skipped


def measure_cell(crew: Any, recipe: Recipe, task: Any, tokenizer: Any, sampler: SamplerConfig) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, forwards per generated token (through the first EOS) and tokens per second."""
    measured = measure(crew, recipe, task, tokenizer, sampler)
    return {
        "accuracy": measured.accuracy,
        "interval": list(wilson_interval(measured.accuracy, len(measured.accurate))),
        "mean_reward": plain(measured.mean_reward),
        "invalid_share": measured.invalid_share,
        "forwards_per_token": measured.forwards / measured.tokens,
        "tokens_per_s": measured.tokens / measured.seconds,
        "forwards": measured.forwards,
        "tokens": measured.tokens,
        "seconds": measured.seconds,
    }


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The cells of a file that an earlier grid wrote.

    Raises:
        DataError: the file holds something else.
    """
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["schema"] == SCHEMA:
            return found["cells"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    raise DataError(f"{file} is not a grid of this version; choose another file with --out, or delete it")


def model_digest(folder: Path) -> str:
    """Names, sizes and times of a model's files: enough to know that nobody wrote to them since."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, quality) points that no other one beats in both, by rising cost.

    >>> pareto_front([(1.0, 0.9), (0.5, 0.5), (0.5, 0.6), (2.0, 0.8)])
    [2, 0]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def front_of(grid: Grid) -> list[int]:
    """The results of a grid on its Pareto front."""
    return pareto_front([(result["forwards_per_token"], result["accuracy"]) for result in grid.results])


def grid_view(grid: Grid) -> Group:
    """The table of a grid, what was skipped, and where the files are."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in grid.keys:
        table.add_column(_short(key), no_wrap=True)
    for name in ("accuracy", "forwards\nper token", "tokens\nper s", "Pareto"):
        table.add_column(name, justify="right", no_wrap=True)
    front = front_of(grid)
    for index, result in enumerate(grid.results):
        accuracy = accuracy_text(result["accuracy"], result["num_problems"])
        numbers = [accuracy, f"{result['forwards_per_token']:.3f}", f"{result['tokens_per_s']:,.0f}", "*" if index in front else ""]
        table.add_row(*(result["values"].get(key, "-") for key in grid.keys), *numbers)
    problems = grid.results[0]["num_problems"]
    notes = f"{problems} problems; in brackets: 95 % Wilson interval; tokens through the first end of text"
    lines = [skipped_text(reason, grid.skipped) for reason in dict.fromkeys(reason for _, reason in grid.skipped)]
    lines.append(f"{grid.file} and {grid.file.with_suffix('.png').name}")
    return Group(table, Text(notes, style="dim"), *(Text(line, overflow="fold") for line in lines))


def skipped_text(reason: str, skipped: Sequence[tuple[dict[str, str], str]]) -> str:
    """The combinations that were skipped for a reason, the first two of them by name."""
    names = [_text(values) for values, why in skipped if why == reason]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"skipped ({'; '.join(names[:2])}{more}): {reason}"


@rc_context(STYLE)
def draw_grid(grid: Grid) -> Plot:
    """Accuracy against forwards per token: colours are samplers, markers temperatures, the line is the Pareto front."""
    title = "Accuracy against forward passes"
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=150)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    axes = figure.subplots()
    names = list(dict.fromkeys(result["sampler"]["name"] for result in grid.results))
    temperatures = sorted({result["sampler"]["temperature"] for result in grid.results})
    for result in grid.results:
        sampler, accuracy = result["sampler"], result["accuracy"]
        low, high = result["interval"]
        axes.errorbar(
            [result["forwards_per_token"]],
            [accuracy],
            yerr=[[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]],
            fmt=MARKERS[temperatures.index(sampler["temperature"]) % len(MARKERS)],
            color=COLORS[names.index(sampler["name"]) % len(COLORS)],
            markersize=4.5,
            elinewidth=0.8,
            alpha=0.85,
        )
    front = [grid.results[index] for index in front_of(grid)]
    places = [(result["forwards_per_token"], result["accuracy"]) for result in front]
    axes.step(*zip(*places, strict=True), where="post", color=INK, linewidth=1.0, zorder=0)
    for number, (result, place) in enumerate(zip(front, places, strict=True)):
        shown = {key: value for key, value in result["values"].items() if key not in ("sampler.name", TEMPERATURE)}
        offset = (4, 5) if number % 2 == 0 else (4, -10)  # neighbours do not write over each other
        axes.annotate(_text(shown), place, xytext=offset, textcoords="offset points", fontsize=7, color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.12)
    axes.set_xlabel("forward passes per generated token")
    axes.set_ylabel("solved problems")
    keys = [Line2D([], [], color=COLORS[index % len(COLORS)], label=name) for index, name in enumerate(names)]
    if len(temperatures) > 1:
        keys += [
            Line2D([], [], color=INK, linestyle="", marker=MARKERS[index % len(MARKERS)], label=f"temperature {value:g}")
            for index, value in enumerate(temperatures)
        ]
    figure.legend(handles=[*keys, Line2D([], [], color=INK, linewidth=1.0, label="Pareto front")], loc="outside lower center", ncols=4)
    return Plot(title, figure, "Bars: 95 % Wilson intervals over the test problems.")


def _text(values: dict[str, str]) -> str:
    return ", ".join(f"{_short(key)} {value}" for key, value in values.items())


def _short(key: str) -> str:
    return key.removeprefix("sampler.").removeprefix("options.")
