"""The plots of a report, drawn from rows of metrics; `PANELS` says what is shown, one entry a plot.

A panel with one run shows one colour per metric; with several groups of runs one colour per group, the mean over the seeds of a
group as a line and their range as a band.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from rlhub.phases import TRAINING, Phase
from rlhub.records.metrics import MetricsRow, phases, series, wilson_interval

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#9aa3ad",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "rlhub",
}
COLORS = ["#2563eb", "#e2711d", "#1a936f", "#a4356b", "#6d597a", "#b8860b", "#3a7ca5", "#7a7a7a"]
INK = "#57606a"
DASHES = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))]
SPANS = ["generate", "reward", "score", "learn", "sync", "eval", "checkpoint", "overhead", "replay"]
TIMED_PHASES = (Phase.ONLINE, Phase.PAIRS)
IDLE = "system/idle_share/"
PHASE_TITLES = {Phase.SFT: "SFT", Phase.ONLINE: "RL", Phase.PAIRS: "preferences"}


class SeedGroup(NamedTuple):
    """Runs that differ in their seed only: their common name and the rows of each."""

    name: str
    runs: list[list[MetricsRow]]


@dataclass(frozen=True)
class Curve:
    """A metric in a panel; `band` names the metrics of its lower and upper edge."""

    key: str
    label: str
    smooth: bool = False
    band: tuple[str, str] | None = None


@dataclass(frozen=True)
class Panel:
    """One plot: its curves over the steps of each of `phases` that the runs have, side by side."""

    title: str
    ylabel: str
    curves: Sequence[Curve]
    phases: Sequence[str] = TIMED_PHASES
    percent: bool = False
    log: bool = False
    note: str = ""
    reference: float | None = None  # a horizontal line at the value that means "nothing happened"
    intervals: bool = False  # error bars: 95 % Wilson intervals over the test problems


PANELS = [
    Panel(
        "Held-out accuracy",
        "solved problems",
        [Curve("eval/accuracy", "greedy"), Curve("eval/accuracy_t1", "temperature 1")],
        TRAINING,
        percent=True,
        intervals=True,
        note="Bars: 95 % Wilson intervals over the test problems.",
    ),
    Panel("Reward", "mean reward of a batch", [Curve("reward/mean", "reward", smooth=True)]),
    Panel("Loss", "loss", [Curve("loss", "loss", smooth=True)], TRAINING),
    Panel(
        "ELBO of the samples",
        "nats per token",
        [Curve("elbo/per_token", "ELBO", smooth=True)],
    ),
    Panel(
        "Monte-Carlo error of the ELBO difference",
        "nats per sequence",
        [Curve("elbo/standard_error", "standard error", smooth=True)],
        note="Mean over sequences of the standard error of policy minus reference (or proximal).",
    ),
    Panel(
        "Probability ratio",
        "policy / proximal",
        [Curve("ratio/mean", "mean and range", band=("ratio/min", "ratio/max"))],
        reference=1.0,
        note="Band: smallest and largest ratio of the batch.",
    ),
    Panel(
        "Clipping",
        "share of sequences",
        [Curve("clip/fraction", "clipped", smooth=True), Curve("clip/flip_share", "would flip under other draws", smooth=True)],
        percent=True,
    ),
    Panel("Effective sample size", "share of the batch", [Curve("ess", "ESS", smooth=True)], percent=True),
    Panel("KL to the reference", "nats", [Curve("kl", "KL", smooth=True)]),
    Panel("Groups without signal", "share of groups", [Curve("group/no_signal_share", "all rewards equal", smooth=True)], percent=True),
    Panel(
        "End of text",
        "share of completions",
        [
            Curve("eos/flood_rate", "EOS flood", smooth=True),
            Curve("eos/early_rate", "early EOS", smooth=True),
            Curve("eos/missing_rate", "no EOS", smooth=True),
        ],
        percent=True,
    ),
    Panel("Gradient norm", "before clipping", [Curve("grad_norm", "norm", smooth=True)], TRAINING, log=True),
    Panel("Learning rate", "learning rate", [Curve("learning_rate", "learning rate")], TRAINING),
    Panel(
        "Replay check",
        "nats",
        [Curve("replay/max_gap", "largest"), Curve("replay/mean_gap", "mean")],
        log=True,
        note="Recorded log-probs against the learner's, before the update; exact fp32 stays below 1e-5.",
    ),
    Panel("Throughput", "samples per second", [Curve("throughput/samples_per_s", "samples", smooth=True)]),
]


@dataclass(frozen=True)
class Plot:
    """A drawn panel."""

    title: str
    figure: Figure
    note: str = ""
    wide: bool = False

    def save(self, file: Any, **options: Any) -> None:
        """Writes the image; the ending of a path, or `format=`, says which kind."""
        with rc_context(STYLE):
            self.figure.savefig(file, **options)

    def data_uri(self) -> str:
        """The image as SVG inside a link: sharp at any zoom, no network, no names that clash within a page."""
        buffer = io.BytesIO()
        self.save(buffer, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_plots(groups: Sequence[SeedGroup], num_problems: int | None = None) -> list[Plot]:
    """Every plot that the runs have data for."""
    plots = [draw_panel(panel, groups, num_problems) for panel in PANELS]
    return [plot for plot in [*plots, draw_time(groups), draw_idle(groups), draw_sync(groups)] if plot]


@rc_context(STYLE)
def draw_panel(panel: Panel, groups: Sequence[SeedGroup], num_problems: int | None = None) -> Plot | None:
    """A panel, None where no run has its metrics."""
    shown = [phase for phase in _phases(groups) if phase in panel.phases and _measured(groups, panel.curves, phase)]
    if not shown:
        return None
    curves = [curve for curve in panel.curves if any(_measured(groups, [curve], phase) for phase in shown)]
    wide = len(shown) > 1
    figure = _figure(panel.title, wide)
    all_axes = figure.subplots(1, len(shown), sharey=panel.percent, squeeze=False)[0]
    one = len(groups) == 1
    for axes, phase in zip(all_axes, shown, strict=True):
        for group_index, group in enumerate(groups):
            for curve_index, curve in enumerate(curves):
                style = {"color": _color(curve_index if one else group_index), "linestyle": DASHES[curve_index % len(DASHES)]}
                runs = [series_of(rows, curve, phase) for rows in group.runs]
                _draw_curve(axes, curve, runs, style, num_problems if panel.intervals else None)
    for axes, phase in zip(all_axes, shown, strict=True):
        _finish(axes, panel, phase if wide else None)
    all_axes[0].set_ylabel(panel.ylabel)
    keys = [] if one else [Line2D([], [], color=_color(index), label=group.name) for index, group in enumerate(groups)]
    if len(curves) > 1:
        colors = [_color(index) if one else INK for index in range(len(curves))]
        keys += [
            Line2D([], [], color=color, linestyle=dashes, label=curve.label)
            for curve, color, dashes in zip(curves, colors, DASHES, strict=False)
        ]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=6 if wide else 3)
    seeds = any(len(group.runs) > 1 for group in groups)
    return Plot(panel.title, figure, "Line: mean over seeds; band: their range." if seeds else panel.note, wide)


class _Series(NamedTuple):
    """A metric of one run with the edges of its band."""

    steps: list[int]
    values: list[float]
    low: list[float]
    high: list[float]


def series_of(rows: Sequence[MetricsRow], curve: Curve, phase: str) -> _Series:
    """A curve's points in one run."""
    steps, values = series(rows, curve.key, phase)
    low, high = values, values
    if curve.band:
        lower, upper = (dict(zip(*series(rows, key, phase), strict=True)) for key in curve.band)
        low = [lower.get(step, value) for step, value in zip(steps, values, strict=True)]
        high = [upper.get(step, value) for step, value in zip(steps, values, strict=True)]
    return _Series(steps, values, low, high)


def over_seeds(runs: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that every run has measured, and mean, minimum and maximum over the runs there."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in runs if steps]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = np.array([[table[step] for step in steps] for table in tables]).reshape(len(tables), len(steps))
    if not steps:
        return np.array([]), np.array([]), np.array([]), np.array([])
    return np.array(steps), values.mean(0), values.min(0), values.max(0)


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the points, over those that exist at the ends."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index, reach = np.arange(len(values)), len(values) // 40
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _draw_curve(axes: Axes, curve: Curve, runs: Sequence[_Series], style: dict[str, Any], num_problems: int | None) -> None:
    """Draws a metric of one group: its line, its band, and error bars where the number of test problems is given."""
    runs = [run for run in runs if run.steps]
    if not runs:
        return
    color = style["color"]
    if len(runs) == 1:
        steps, values, low, high = map(np.asarray, runs[0])
        if curve.smooth and len(steps) >= 40:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = smoothed(values)
    else:
        steps, values, low, high = over_seeds([(run.steps, smoothed(run.values) if curve.smooth else run.values) for run in runs])
    if np.any(high > low):
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(steps, values, marker="o" if len(steps) <= 30 else None, markersize=3, **style)
    if num_problems and len(runs) == 1:
        bounds = np.array([wilson_interval(value, num_problems) for value in values]).T
        axes.errorbar(steps, values, yerr=np.abs(bounds - values), fmt="none", ecolor=color, elinewidth=0.8, alpha=0.5)


def _finish(axes: Axes, panel: Panel, phase: str | None) -> None:
    if phase:
        axes.set_title(PHASE_TITLES.get(phase, phase), fontsize=9, fontweight="normal", color=INK)
    _step_axis(axes)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=INK, linewidth=0.8, linestyle=":")
    if panel.log and any(np.nanmax(line.get_ydata(), initial=0.0) > 0 for line in axes.get_lines()):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(max(high, 0.05), 1.02))


@rc_context(STYLE)
def draw_time(groups: Sequence[SeedGroup]) -> Plot | None:
    """Time per part of a step: stacked over the steps for one run, mean bars for several."""
    rows = [[row for run in group.runs for row in _timed(run)] for group in groups]
    spans = [span for span in SPANS if any(row.get(f"time/{span}_s") for part in rows for row in part)]
    if not spans:
        return None
    colors = [_color(SPANS.index(span)) for span in spans]
    figure = _figure("Time per phase of a step")
    axes = figure.subplots()
    one = len(groups) == 1 and len(groups[0].runs) == 1
    if one:
        timed = [row for row in rows[0] if any(row.get(f"time/{span}_s") is not None for span in spans)]
        parts = [smoothed([row.get(f"time/{span}_s") or 0.0 for row in timed]) for span in spans]
        axes.stackplot([row["step"] for row in timed], parts, labels=spans, colors=colors, alpha=0.85, linewidth=0)
        axes.set_ylabel("seconds per step")
        _step_axis(axes)
    else:
        left = np.zeros(len(groups))
        for span, color in zip(spans, colors, strict=True):
            values = np.array([_mean([row.get(f"time/{span}_s") for row in part]) for part in rows])
            axes.barh([group.name for group in groups], values, left=left, label=span, color=color, alpha=0.85, height=0.6)
            left += values
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("mean seconds per step")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1] if one else handles, labels[::-1] if one else labels, loc="outside right center")
    return Plot("Time per phase of a step", figure, "Running mean." if one else "Mean over steps and seeds.")


def draw_idle(groups: Sequence[SeedGroup]) -> Plot | None:
    """Idle share of each role."""
    keys = sorted({key for group in groups for run in group.runs for row in run for key in row if key.startswith(IDLE)})
    curves = [Curve(key, key.removeprefix(IDLE), smooth=True) for key in keys]
    return draw_panel(Panel("Idle share per role", "share of the step", curves, percent=True), groups)


@rc_context(STYLE)
def draw_sync(groups: Sequence[SeedGroup]) -> Plot | None:
    """Time of each weight exchange, with a cross where its receipt did not agree."""
    rows = [(index, _timed(run)) for index, group in enumerate(groups) for run in group.runs]
    runs = [(index, series(run, "time/sync_s"), dict(zip(*series(run, "sync/receipt_ok"), strict=True))) for index, run in rows]
    if not any(steps for _, (steps, _), _ in runs):
        return None
    figure = _figure("Weight exchange")
    axes = figure.subplots()
    for index, (steps, seconds), receipts in runs:
        axes.plot(steps, 1000 * np.array(seconds), ".", color=_color(index), markersize=4, label=groups[index].name)
        failed = [(step, 1000 * value) for step, value in zip(steps, seconds, strict=True) if receipts.get(step, 1) < 1]
        axes.plot([step for step, _ in failed], [value for _, value in failed], "x", color="#c1121f", markersize=8, markeredgewidth=2)
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    _step_axis(axes)
    if len(groups) > 1:
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2)
    return Plot("Weight exchange", figure, receipt_text([row for _, run in rows for row in run]))


def receipt_text(rows: Sequence[MetricsRow]) -> str:
    """How many weight exchanges were proven, and their size."""
    receipts = series(rows, "sync/receipt_ok")[1]
    if not receipts:
        return "No receipts recorded."
    agree = sum(value >= 1 for value in receipts)
    megabytes = _mean(series(rows, "system/sync_bytes")[1]) / 1e6
    size = f", {megabytes:.2f} MB each" if megabytes else ""
    crosses = "" if agree == len(receipts) else " Crosses: receipts that differ."
    return f"{agree} of {len(receipts)} receipts agree{size}.{crosses}"


def _figure(title: str, wide: bool = False) -> Figure:
    figure = Figure(figsize=(8.8 if wide else 4.4, 2.9), layout="constrained", dpi=150)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _phases(groups: Sequence[SeedGroup]) -> list[str]:
    return list(dict.fromkeys(phase for group in groups for run in group.runs for phase in phases(run)))


def _timed(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    return [row for row in rows if row.get("phase") in TIMED_PHASES]


def _measured(groups: Sequence[SeedGroup], curves: Sequence[Curve], phase: str) -> bool:
    return any(series(run, curve.key, phase)[0] for group in groups for run in group.runs for curve in curves)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
