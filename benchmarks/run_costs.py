"""What a finished run spent on weight sync and on the controller itself, against the limits that we hold ourselves to.

    python benchmarks/run_costs.py runs/quickstart

Sync is the span from the first byte published to the last receipt compared. Overhead is the part of a step in which no worker was busy
by the workers' own clocks; its limit is 50 ms plus 2 % of the step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from rlhub.records.metrics import read_metrics

SYNC_LIMIT = 0.040  # seconds, for the quickstart's model
OVERHEAD_LIMIT = (0.050, 0.02)  # seconds, share of the step


def main(folder: Path) -> None:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "online" and row["step"] > 0]
    sync = [row["time/sync_s"] for row in rows]
    overhead = [row["time/overhead_s"] for row in rows]
    allowed = [OVERHEAD_LIMIT[0] + OVERHEAD_LIMIT[1] * row["time/step_s"] for row in rows]
    table = Table("cost", "median", "90th percentile", "limit", "steps within", title=f"{folder}, {len(rows)} online steps")
    for name, values, limits in (("weight sync with receipt", sync, [SYNC_LIMIT] * len(rows)), ("controller overhead", overhead, allowed)):
        within = sum(value <= limit for value, limit in zip(values, limits, strict=True))
        cells = [f"{1000 * value:.1f} ms" for value in (median(values), quantiles(values, n=10)[-1], median(limits))]
        table.add_row(name, *cells, f"{within} of {len(rows)}")
    step = median(row["time/step_s"] for row in rows)
    table.add_row("step", f"{1000 * step:.0f} ms", "", "", "")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
