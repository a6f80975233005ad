"""`report.html`: one self-contained page about a run, or about several that are compared (seeds, controls, ablations).

Everything is read from the run folders, so a report can be written at any time, also of a run in progress or one that has
written nothing yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex
from omegaconf import OmegaConf

from rlhub.errors import CheckpointError, DataError
from rlhub.files import replace_file
from rlhub.parts import flatten
from rlhub.phases import TRAINING, Phase
from rlhub.records.metrics import MetricsRow, Summary, read_metrics, series, summarize
from rlhub.records.progress import accuracy_text, clock_text, describe_test_set, gain_text
from rlhub.records.rollout_log import read_rollouts, rollout_files
from rlhub.reports.plots import PANELS, SeedGroup, draw_panel, draw_plots
from rlhub.reports.timeline import render, timeline_data

SAMPLES_PER_DUMP = 6
UNCOMPARED = ("run.name", "run.output_dir", "run.seed", "about")
BOOKKEEPING = ("phase", "step", "wall_s")
ARROW = "\u2192"
STEP_COLORS = colormaps["viridis"]


@dataclass(frozen=True)
class Run:
    """A run folder as far as it has been written."""

    path: Path
    config: dict[str, Any]  # dotted keys
    rows: list[MetricsRow]
    summary: Summary | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def group(self) -> str:
        """The name without its seed, shared by the runs that differ in nothing else."""
        return group_name(self.path.resolve(), self.config.get("run.seed"))

    @property
    def num_problems(self) -> int | None:
        return self.summary.num_problems if self.summary else None


def write_report(runs: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Writes the report of one or more run folders, to `report.html` of the first unless told otherwise; returns where it is."""
    loaded = [load_run(Path(path)) for path in runs]
    target = Path(output) if output else loaded[0].path / "report.html"
    replace_file(target, render_report(loaded))
    return target


def save_accuracy_plot(runs: Sequence[Path | str], file: Path) -> Path:
    """Saves the held-out accuracy of one or more runs over their steps as a picture of its own; returns where it is.

    Raises:
        DataError: no run has an evaluation yet.
    """
    loaded = [load_run(Path(path)) for path in runs]
    groups = [SeedGroup(name, [run.rows for run in members]) for name, members in grouped(loaded).items()]
    plot = draw_panel(PANELS[0], groups, loaded[0].num_problems)
    if plot is None:
        raise DataError(f"{loaded[0].path} has no evaluation yet: there is nothing to plot")
    plot.save(file)
    return file


def render_report(runs: Sequence[Run]) -> str:
    """The page as text."""
    groups = grouped(runs)
    plots = draw_plots([SeedGroup(name, [run.rows for run in members]) for name, members in groups.items()], runs[0].num_problems)
    first = runs[0]
    several = len(runs) > 1
    accuracies = [group_row(name, members) for name, members in groups.items()]
    running = any(not finished(run) for run in runs)
    dumps = [dump_view(path) for path in first_middle_last(rollout_files(first.path))]
    return render(
        "report.html.j2",
        title=" / ".join(groups) if several else first.name,
        subtitle=f"{len(runs)} runs" if several else f"rlhub run, {progress_text(first)}",
        about=first.config.get("about") or "",
        alarms=[alarm for run in runs for alarm in alarms(run, several)],
        running=running,
        state="in progress" if running else "finished",
        cards=[group_card(row) for row in accuracies] if several else headline(first),
        accuracies=accuracies if several else [],
        every_run=[run_row(run) for run in runs] if several else [],
        plots=[{"title": plot.title, "note": plot.note, "wide": plot.wide, "image": plot.data_uri()} for plot in plots],
        health=number_rows(first.rows) if not several else [],
        dumps=dumps,
        timelines=[sample["timeline"] for dump in dumps for sample in dump["samples"]],
        gradient=", ".join(token_color(share) for share in (0, 0.25, 0.5, 0.75, 1)),
        recipe=sorted((key, str(value)) for key, value in first.config.items() if key != "about"),
        recipe_name=first.name,
        differences=differences({name: members[0].config for name, members in groups.items()}) if several else [],
        difference_names=list(groups),
    )


def alarms(run: Run, several: bool) -> list[str]:
    """What of a run should not be read past: steps whose completions could not be graded, and steps without any signal."""
    steps = [row for row in run.rows if row["step"] > 0]
    failed = [row for row in steps if row.get("reward/invalid_share", 0.0) > 0]
    silent = sum(row.get("group/no_signal_share") == 1.0 for row in steps)
    name = f"{run.name}: " if several else ""
    found = []
    if failed:
        share = sum(row["reward/invalid_share"] for row in failed) / len(failed)
        reason = next(
            (f", first of step {row['step']}: {row['reward/first_failure']}" for row in failed if "reward/first_failure" in row), ""
        )
        found.append(f"{name}{len(failed)} steps have completions that could not be graded ({share:.0%} of theirs){reason}")
    if silent:
        found.append(f"{name}{silent} of {len(steps)} steps taught nothing: all completions of each prompt had the same reward")
    return found


def load_run(path: Path) -> Run:
    """Reads what a run folder holds; the folder itself must exist."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a run folder; give the folder that holds metrics.jsonl, such as runs/<name>")
    config_path = path / "config.yaml"
    config = dict(flatten(OmegaConf.to_container(OmegaConf.load(config_path)))) if config_path.is_file() else {}
    rows = read_metrics(path / "metrics.jsonl")
    return Run(path, config, rows, summarize(rows))


def group_name(path: Path, seed: int | None = None) -> str:
    """The name of a run folder without the seed at its end.

    >>> [str(group_name(Path(name), 1)) for name in ("runs/espo-seed1", "runs/espo_s2", "runs/espo-1", "runs/llada-8", "runs/espo/seed0")]
    ['espo', 'espo', 'espo', 'llada-8', 'espo']
    """
    if re.fullmatch(r"(seed[-_=]?|s)?\d+", path.name):
        return path.parent.name
    marked = re.sub(r"[-_.](seed[-_=]?|s)\d+$", "", path.name)
    return marked if marked != path.name or seed is None else re.sub(rf"[-_.]0*{seed}$", "", path.name)


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by group, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group if len(runs) > 1 else run.name, []).append(run)
    return groups


def planned_steps(run: Run) -> dict[str, int]:
    """Steps that the recipe asks of each phase."""
    wanted = {phase: run.config.get("sft.steps" if phase == Phase.SFT else "run.steps") for phase in TRAINING}
    return {phase: wanted[phase] for phase in run.config.get("run.phases", []) if wanted.get(phase) is not None}


def finished(run: Run) -> bool:
    """Whether the last phase has reached its last step; a run without a recipe counts as finished."""
    planned = list(planned_steps(run).items())
    if not planned:
        return bool(run.rows)
    phase, steps = planned[-1]
    return any(row.get("phase") == phase and row.get("step", 0) >= steps for row in run.rows)


def progress_text(run: Run) -> str:
    """How far the run is, in words."""
    if not run.rows:
        return "nothing recorded yet"
    phase, step = run.rows[-1].get("phase", ""), run.rows[-1].get("step", 0)
    steps = planned_steps(run).get(phase)
    return f"{phase} step {step}" + (f" of {steps}" if steps else "")


def headline(run: Run) -> list[dict[str, str]]:
    """What a reader wants first: accuracies before and after, on what, in how long."""
    summary = run.summary
    if summary is None:
        return []
    cards = []
    for name, before, after in (("greedy", summary.before, summary.after), ("temperature 1", summary.before_t1, summary.after_t1)):
        if after is not None and before is not None:
            intervals = f"{accuracy_text(before, summary.num_problems)} to {accuracy_text(after, summary.num_problems)}"
            cards.append(
                {
                    "label": f"Held-out accuracy, {name}",
                    "value": f"{before:.1%} {ARROW} {after:.1%}",
                    "gain": gain_text(before, after),
                    "detail": f"{summary.phase}, steps {summary.first_step} to {summary.last_step}; {intervals}"
                    + (" (95 % Wilson)" if summary.num_problems else ""),
                }
            )
    phase = f"{summary.phase} phase {clock_text(summary.phase_seconds)}" if summary.phase_seconds is not None else ""
    seconds = clock_text(summary.seconds) if summary.seconds is not None else "-"
    problems = f"{summary.num_problems} problems" if summary.num_problems else "-"
    cards.append({"label": "Time", "value": seconds, "gain": "", "detail": phase})
    cards.append({"label": "Test set", "value": problems, "gain": "", "detail": describe_test_set(summary)})
    return cards


def group_row(name: str, members: Sequence[Run]) -> dict[str, Any]:
    """Final accuracies of one group: mean over its seeds and the value of each."""
    found = [run.summary for run in members if run.summary]

    def cell(values: Sequence[float | None], form: str, scale: float = 1.0) -> tuple[str, str]:
        known = [scale * value for value in values if value is not None]
        if not known:
            return "-", ""
        return form.format(sum(known) / len(known)), ", ".join(map(form.format, known)) if len(known) > 1 else ""

    def cells(before: Sequence[float | None], after: Sequence[float | None]) -> list[tuple[str, str]]:
        gains = [None if None in pair else pair[1] - pair[0] for pair in zip(before, after, strict=True)]
        return [cell(before, "{:.1%}"), cell(after, "{:.1%}"), cell(gains, "{:+.1f}", 100)]

    greedy = cells([summary.before for summary in found], [summary.after for summary in found])
    tempered = cells([summary.before_t1 for summary in found], [summary.after_t1 for summary in found])
    return {"name": name, "seeds": len(members), "cells": [*greedy, *tempered]}


def group_card(row: Mapping[str, Any]) -> dict[str, str]:
    """A headline card of a group: greedy accuracies before and after, as means over its seeds."""
    (before, _), (after, _), (gain, gains) = row["cells"][:3]
    seeds = f"mean of {row['seeds']} seeds; gains {gains}" if gains else ""
    return {
        "label": f"{row['name']}: held-out accuracy, greedy",
        "value": f"{before} {ARROW} {after}",
        "gain": f"{gain} points",
        "detail": seeds,
    }


def run_row(run: Run) -> dict[str, Any]:
    """Final accuracies of one run with their intervals."""
    summary = run.summary
    if summary is None:
        return {"name": run.name, "cells": ["-"] * 6, "test_set": "no evaluation yet"}
    pairs = (summary.before, summary.after, summary.before_t1, summary.after_t1)
    accuracies = [accuracy_text(value, summary.num_problems) for value in pairs]
    seconds = clock_text(summary.seconds) if summary.seconds is not None else "-"
    return {"name": run.name, "cells": [str(summary.last_step), *accuracies, seconds], "test_set": describe_test_set(summary)}


def number_rows(rows: Sequence[MetricsRow]) -> list[dict[str, Any]]:
    """First, last, mean and extremes of every metric of the last phase."""
    if not rows:
        return []
    phase = rows[-1].get("phase")
    keys = sorted({key for row in rows if row.get("phase") == phase for key in row} - set(BOOKKEEPING))
    table = []
    for key in keys:
        values = series(rows, key, phase)[1]
        if values:
            numbers = (values[0], values[-1], sum(values) / len(values), min(values), max(values))
            table.append({"name": key, "cells": [f"{number:.4g}" for number in numbers]})
    return table


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys that the recipes of several groups set differently, with the value in each."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    rows = [(key, [str(config.get(key, "-")) for config in configs.values()]) for key in keys if key not in UNCOMPARED]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def first_middle_last(items: Sequence[Any]) -> list[Any]:
    """At most three items.

    >>> first_middle_last([10, 20, 30, 40, 50]), first_middle_last([10])
    ([10, 30, 50], [10])
    """
    return [items[index] for index in sorted({0, len(items) // 2, len(items) - 1})] if items else []


def dump_view(path: Path) -> dict[str, Any]:
    """A few samples of one dump, evenly chosen, so that several prompts are seen."""
    rows = read_rollouts(path)
    chosen = [rows[index] for index in sorted({index * len(rows) // SAMPLES_PER_DUMP for index in range(SAMPLES_PER_DUMP)})] if rows else []
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    return {
        "step": rows[0]["step"] if rows else int(path.stem.removeprefix("step_")),
        "shown": len(chosen),
        "total": len(rows),
        "reward": f"{sum(rewards) / len(rewards):.3f}" if rewards else "-",
        "samples": [sample_view(row) for row in chosen],
    }


def sample_view(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with the colour and tooltip of each token."""
    steps, length = row["unmask_step"], row.get("length", len(row["tokens"]))
    logps = row.get("logp") or [None] * len(steps)
    last = max([1, *steps])
    tokens = []
    for index, (text, step, logp) in enumerate(zip(row["tokens"], steps, logps, strict=True)):
        shown = text.replace("\n", "\\n").replace("\t", "\\t") or "\u2205"
        tip = f"{shown!r} at step {step + 1}" + (f", log-prob {logp:.3f}" if logp is not None else "")
        if step < 0:
            tokens.append({"text": "_", "kind": "never", "style": "", "tip": "never filled"})
            continue
        color = token_color(step / last)
        kind = "tail" if index >= length else ""
        ink = "#ffffff" if step / last < 0.55 else "#1f2933"
        tokens.append({"text": "" if kind else shown, "kind": kind, "style": f"background:{color};color:{ink}", "tip": tip})
    reward = row.get("reward")
    return {
        "prompt": row.get("prompt", ""),
        "tokens": tokens,
        "reward": "-" if reward is None else f"{reward:g}",
        "status": row.get("status", "ungraded"),
        "length": length,
        "timeline": timeline_data(row),
    }


def token_color(share: float) -> str:
    """Colour of a token that was unmasked after this share of the steps."""
    return to_hex(STEP_COLORS(0.15 + 0.8 * share))
