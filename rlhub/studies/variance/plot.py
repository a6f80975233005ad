"""The plot of the variance laboratory."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rlhub.reports.plots import COLORS, INK, STYLE, Plot

PRIMARY = "8 x 1"
TITLE = "Variance of the preference score"


@rc_context(STYLE)
def draw_variance(result: dict[str, Any]) -> Plot:
    """Left: every estimator at the last policy. Right, with several policies: what sharing gains as they leave their reference."""
    policies = result["policies"]
    several = len(policies) > 1
    figure = Figure(figsize=(8.8 if several else 5.2, 3.4), layout="constrained", dpi=150)
    figure.suptitle(TITLE, x=0.01, ha="left", fontsize=10, fontweight="bold")
    axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    _draw_cells(axes[0], policies[-1])
    if several:
        _draw_trajectory(axes[1], policies)
    return Plot(TITLE, figure, wide=several)


def _draw_cells(axes: Axes, policy: dict[str, Any]) -> None:
    """Bars of the measured variance per pair (nats^2) of one policy's cells, with what theory expects as marks."""
    names = list(dict.fromkeys(row["cell"] for row in policy["cells"]))
    for offset, shared, label in ((-0.2, True, "shared noise"), (0.2, False, "independent noise")):
        rows = {row["cell"]: row for row in policy["cells"] if row["shared"] == shared}
        places = [names.index(name) + offset for name in rows]
        axes.bar(places, [row["score_variance"] for row in rows.values()], 0.36, color=COLORS[not shared], alpha=0.85, label=label)
        known = "exact" if all("exact" in row for row in rows.values()) else "predicted"
        expected = [(place, row[known]) for place, row in zip(places, rows.values(), strict=True) if row[known] is not None]
        axes.plot(*zip(*expected, strict=True), "_", color="black", markersize=9, label=None if shared else f"{known}")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("variance per pair")
    axes.set_title(f"{policy['policy']}, mean abs. score {policy['mean_absolute_score']:.2g}", fontsize=9, fontweight="normal", color=INK)
    axes.legend()


def _draw_trajectory(axes: Axes, policies: list[dict[str, Any]]) -> None:
    """The ratio of independent to shared variance against the mean absolute score, a line for each allocation of draws."""
    for index, (cell, label) in enumerate([(PRIMARY, "8 x 1"), ("1 x 8", "1 x 8"), ("1 x 1", "1 x 1")]):
        points = [
            (policy["mean_absolute_score"], row["factor"])
            for policy in policies
            for row in policy["cells"]
            if row["cell"] == cell and row["shared"] and row["factor"] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLORS[index], label=label)
    for factor in (20, 5):
        axes.axhline(factor, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(0.02, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter("{x:,.4g}")
    axes.set_xlabel("mean absolute score")
    axes.set_ylabel("independent / shared variance")
    axes.set_title("gain of sharing while training", fontsize=9, fontweight="normal", color=INK)
    axes.legend(title="n_t x n_y", title_fontsize=8)
