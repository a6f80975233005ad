"""Runs an experiment of `rlhub.studies.labs` and writes its folder: `verdict.json`, `plot.png`, `report.md` and the arms it consists of."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhub.config.recipe import load_options
from rlhub.errors import RecipeError
from rlhub.files import plain, replace_file
from rlhub.parts import load_part, part_names, short_name
from rlhub.records.progress import RunProgress
from rlhub.studies.labs import Check, Verdict, seconds_of_arms

RECIPES = Path("recipes") / "labs"
ANSWERS = {True: "yes", False: "no", None: "undecided"}


def claims() -> dict[str, str]:
    """Name and claim, the first line of the docstring, of every experiment that ships."""
    return {name: claim_of(load_part("labs", name)) for name in part_names("labs")}


def claim_of(module: ModuleType) -> str:
    """The first line of an experiment's docstring."""
    return inspect.getdoc(module).splitlines()[0].rstrip(".")


def run_lab(name: str, overrides: Sequence[str] = (), out: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run what is missing of an experiment, write its folder and return what `verdict.json` holds.

    Args:
        name: a module of `rlhub.studies.labs`, or the dotted path or file of your own; its settings are in `recipes/labs/<name>.yaml`.
        out: the folder; `runs/lab_<name>` by default.

    Raises:
        RecipeError: there is no such experiment or setting, or no seeds are left.
    """
    console = console or Console()
    module = load_part("labs", name)
    short = short_name(name)
    config = load_options(module, _recipe_of(short), overrides)
    if not config.seeds:
        raise RecipeError("seeds: none are left; give at least one, such as seeds=[0]")
    out = out or Path("runs") / f"lab_{short}"
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with RunProgress(console) as progress:
        verdict = module.run(config, progress, out)
    result = plain(
        {
            "schema": 1,
            "lab": name,
            "claim": claim_of(module),
            "kind": module.KIND,
            "outcome": verdict.outcome,
            "checks": [asdict(check) for check in verdict.checks],
            "control": asdict(verdict.control),
            "numbers": verdict.numbers,
            "settings": asdict(config),
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds_of_arms": round(seconds_of_arms(config, out), 1),
            "out": str(out),
        }
    )
    replace_file(out / "verdict.json", json.dumps(result, indent=2) + "\n")
    if verdict.figure is not None:
        verdict.figure.savefig(out / "plot.png")
    replace_file(out / "report.md", _report(module, verdict, result))
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print the verdict with its checks."""
    table = Table("condition", "met", "measured", title=f"{result['claim']} ({result['kind']}): {result['outcome']}", title_justify="left")
    for check in result["checks"]:
        table.add_row(check["name"], ANSWERS[check["passed"]], check["detail"])
    control = result["control"]
    table.add_row(f"control: {control['name']}", ANSWERS[control["passed"]], control["detail"])
    console.print(table)


def _recipe_of(name: str) -> Path | None:
    """The settings that ship with an experiment, from the current folder or beside the package."""
    places = [RECIPES, Path(__file__).resolve().parents[2] / RECIPES]
    return next((file for place in places if (file := place / f"{name}.yaml").exists()), None)


def _report(module: ModuleType, verdict: Verdict, result: dict[str, Any]) -> str:
    """The page of a laboratory experiment: claim, checks, control, numbers over seeds, settings."""
    numbers = [
        f"| {name} | {mean(values):.4g} | {f'{stdev(values):.2g}' if len(values) > 1 else '-'} | {' '.join(f'{v:.4g}' for v in values)} |"
        for name, values in verdict.numbers.items()
    ]
    control = verdict.control
    parts = [
        f"# {result['lab']}: {result['outcome']}",
        inspect.getdoc(module),
        "\n".join(["| condition | met | measured |", "|---|---|---|", *map(_line, verdict.checks)]),
        "\n".join(["| control | failed as it must | measured |", "|---|---|---|", _line(control)]),
        "\n".join(["| number | mean | spread (standard deviation over seeds) | each seed |", "|---|---|---|---|", *numbers]),
        "![plot](plot.png)" if verdict.figure is not None else "",
        f"{result['seconds']} s for this call on {os.cpu_count()} CPU cores, {result['cpu_seconds_of_arms']} CPU-seconds for all its arms.",
        "Settings: `" + json.dumps(result["settings"]) + "`",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _line(check: Check) -> str:
    return f"| {check.name} | {ANSWERS[check.passed]} | {check.detail} |"
