"""Experiments: arms x seeds of one recipe, from a shared base per seed, with one table and one plot at the end.

    recipe: quickstart.yaml
    seeds: [0, 1, 2]
    parallel: 2                                  # runs at a time, each a process of its own
    base: ["run.phases=[sft]"]                   # once per seed; the arms start from its last checkpoint
    prepare: ["pairs <base> --out <base>/pairs.jsonl"]       # rlhub commands after each base, if the arms need what they make
    arms:
      espo: ["run.phases=[online]"]
      shuffled_rewards: ["run.phases=[online]", "task.shuffle_rewards=true"]

`<base>` stands for the folder of the seed's base, in `prepare` and in overrides. Every run is an ordinary run folder
`<output>/<arm>/seed<k>` that resumes by itself, so an interrupted experiment is continued by the same command.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlhub.config.recipe import load_recipe
from rlhub.errors import RecipeError
from rlhub.files import replace_file
from rlhub.records.metrics import Summary, read_metrics, student_interval, summarize
from rlhub.reports.page import write_report
from rlhub.reports.plots import PANELS, SeedGroup, draw_panel

BASE = "base"


@dataclass
class Experiment:
    """The file above. `about` and `hypothesis` are copied into the results, so that a protocol is committed before its numbers."""

    recipe: str
    seeds: list[int]
    arms: dict[str, list[str]]
    base: list[str] = field(default_factory=list)
    prepare: list[str] = field(default_factory=list)
    common: list[str] = field(default_factory=list)  # overrides of every run
    parallel: int = 1
    about: str = ""


@dataclass(frozen=True)
class Job:
    """One run of an experiment."""

    arm: str
    seed: int
    recipe: str
    folder: Path
    overrides: tuple[str, ...]
    prepare: tuple[str, ...] = ()  # rlhub commands that follow the run
    needs: str | None = None  # name of the run that must have finished before

    @property
    def name(self) -> str:
        return f"{self.arm}/seed{self.seed}"


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file and check the recipe of every run in it.

    Raises:
        RecipeError: the file or one of its runs cannot be used as written.
    """
    if not path.exists():
        raise RecipeError(f"no experiment file {path}")
    try:
        raw = OmegaConf.merge(OmegaConf.structured(Experiment), OmegaConf.create(yaml.safe_load(path.read_text())))
        experiment: Experiment = OmegaConf.to_object(raw)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path}: {str(error).splitlines()[0]}; see rlhub experiment --help") from None
    if not experiment.seeds or not experiment.arms or BASE in experiment.arms:
        raise RecipeError(f"{path}: an experiment needs seeds and arms, and no arm may be called {BASE!r}")
    return experiment


def run_experiment(path: Path, output: Path | None = None, console: Console | None = None) -> Path:
    """Run what is missing of an experiment and write `results.json`, `results.md`, `accuracy.png` and `report.html`.

    Raises:
        RecipeError: a run failed; its log is named.
    """
    console = console or Console()
    experiment = load_experiment(path)
    output = (output or Path("runs") / path.stem).resolve()
    recipe = str(path.parent / experiment.recipe)
    bases = [_job(experiment, recipe, output, BASE, seed, experiment.base) for seed in experiment.seeds] if experiment.base else []
    arms = [_job(experiment, recipe, output, arm, seed, options) for arm, options in experiment.arms.items() for seed in experiment.seeds]
    for job in [*bases, *arms]:
        # An arm's base does not exist yet, so everything but the model's path is checked.
        load_recipe(job.recipe, [override for override in job.overrides if not override.startswith("model.path=")])
    started = time.time()
    _run_all([*bases, *arms], experiment.parallel, console)
    write_results(experiment, arms, output, time.time() - started, console)
    return output


def write_results(experiment: Experiment, jobs: list[Job], output: Path, seconds: float, console: Console) -> None:
    """The table, the plot and the comparison report of finished runs."""
    rows = [_result(job) for job in jobs]
    arms = list(experiment.arms)
    headings = ["arm", "metric", "before (mean)", "after (mean)", "gain per seed (points)", "mean gain", "95 % interval"]
    table = Table(*headings)
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for arm in arms:
        for metric in ("greedy", "temperature 1"):
            pairs = [row[metric] for row in rows if row["arm"] == arm and row[metric] is not None]
            if not pairs:
                continue
            gains = [100 * (after - before) for before, after in pairs]
            before, after = (f"{mean(pair[index] for pair in pairs):.1%}" for index in (0, 1))
            cells = [arm, metric, before, after, " ".join(f"{gain:+.1f}" for gain in gains), f"{mean(gains):+.1f}", mean_interval(gains)]
            table.add_row(*cells)
            lines.append("| " + " | ".join(cells) + " |")
    replace_file(output / "results.json", json.dumps({"about": experiment.about, "seconds": seconds, "runs": rows}, indent=2) + "\n")
    replace_file(output / "results.md", "\n".join(lines) + "\n")
    groups = [SeedGroup(arm, [read_metrics(job.folder / "metrics.jsonl") for job in jobs if job.arm == arm]) for arm in arms]
    plot = draw_panel(PANELS[0], groups, rows[0]["num_problems"])
    if plot is not None:
        plot.save(output / "accuracy.png")
    report = write_report([job.folder for job in jobs], output / "report.html")
    console.print(table)
    console.print(f"results {output / 'results.md'}\nplot {output / 'accuracy.png'}\nreport {report}", soft_wrap=True, highlight=False)


def _job(experiment: Experiment, recipe: str, output: Path, arm: str, seed: int, options: list[str]) -> Job:
    folder = output / arm / f"seed{seed}"
    base = f"{BASE}/seed{seed}"
    options = [option.replace("<base>", str(output / base)) for option in (*experiment.common, *options)]
    overrides = [*options, f"run.seed={seed}", f"run.output_dir={output / arm}", f"run.name=seed{seed}"]
    if arm == BASE:
        commands = tuple(command.replace("<base>", shlex.quote(str(output / base))) for command in experiment.prepare)
        return Job(arm, seed, recipe, folder, tuple(overrides), commands)
    if not experiment.base:
        return Job(arm, seed, recipe, folder, tuple(overrides))
    return Job(arm, seed, recipe, folder, (*overrides, f"model.path={output / base}"), needs=base)


def _run_all(jobs: list[Job], parallel: int, console: Console) -> None:
    """Run jobs in processes of their own, `parallel` at a time, as soon as what they need has finished, with one bar for all."""
    bars = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[note]}")]
    with ThreadPoolExecutor(parallel) as pool, Progress(*bars, TimeElapsedColumn(), console=console) as progress:
        total = progress.add_task("runs", total=len(jobs), note="")
        waiting, finished = list(jobs), {None}
        running: dict[Future, Job] = {}
        while waiting or running:
            for job in [job for job in waiting if job.needs in finished][: parallel - len(running)]:
                waiting.remove(job)
                running[pool.submit(_run_one, job)] = job
            done, _ = wait(running, timeout=2.0, return_when=FIRST_COMPLETED)
            for future in done:
                finished.add(running.pop(future).name)
                future.result()
                progress.advance(total)
            progress.update(total, note=", ".join(f"{job.name} {_where(job)}" for job in running.values()))


def _run_one(job: Job) -> None:
    """Train a run and carry out what prepares those that follow, each command in a process of its own, with one log.

    Raises:
        RecipeError: a command failed; the last line of its log is in the message.
    """
    log = job.folder.parent / f"{job.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    commands = [["train", job.recipe, *job.overrides], *map(shlex.split, job.prepare)]
    for number, command in enumerate(commands):
        done = job.folder / f"prepared_{number}"
        if done.exists():
            continue
        with log.open("a") as handle:
            finished = subprocess.run(
                [sys.executable, "-m", "rlhub", *command], stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
            )
        if finished.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            raise RecipeError(f"run {job.name} failed ({' '.join(last)}); its log is {log}, the same command continues the experiment")
        if number:
            done.touch()


def _where(job: Job) -> str:
    rows = read_metrics(job.folder / "metrics.jsonl") if job.folder.exists() else []
    return f"{rows[-1]['phase']} {rows[-1]['step']}" if rows else "starting"


def _result(job: Job) -> dict[str, Any]:
    summary: Summary | None = summarize(read_metrics(job.folder / "metrics.jsonl"))
    if summary is None:
        raise RecipeError(f"run {job.name} has no evaluation; delete {job.folder} to run it again")
    return {
        "arm": job.arm,
        "seed": job.seed,
        "greedy": _pair(summary.before, summary.after),
        "temperature 1": _pair(summary.before_t1, summary.after_t1),
        "test_set": summary.test_set,
        "num_problems": summary.num_problems,
        "test_hash": summary.test_hash,
        "seconds": summary.seconds,
    }


def mean_interval(gains: list[float]) -> str:
    """Student's 95 % interval of the mean, such as `+1.2 to +3.4`; empty for fewer than three values."""
    if len(gains) < 3:
        return ""
    low, high = student_interval(gains)
    return f"{low:+.1f} to {high:+.1f}"


def _pair(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)
