"""What a person sees while a run goes on: a live bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlhub.records.metrics import Summary, wilson_interval

SHOWN = {  # metric -> label and format
    "reward/mean": ("reward", "{:.3f}"),
    "loss": ("loss", "{:.4f}"),
    "eval/accuracy": ("held-out", "{:.1%}"),
    "throughput/samples_per_s": ("", "{:,.1f} samples/s"),
}
PLAIN_SECONDS = 5.0  # between two lines when the output is not a terminal


class RunProgress:
    """Progress of a run, phase by phase.

    >>> with RunProgress(enabled=False) as progress:
    ...     progress.phase("sft", total=100)
    ...     progress.update(1, **{"loss": 2.3, "throughput/samples_per_s": 410.0})
    ...     progress.message("checkpoint written")

    `update` takes a whole row of metrics and shows the newest value of those in `SHOWN`. Without a terminal it prints the first
    and the last step of each phase and in between at most one line every `PLAIN_SECONDS`.
    """

    def __init__(self, console: Console | None = None, enabled: bool = True, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._enabled = enabled
        self._now = now
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._first = "", 0, 0
        self._started = self._printed = now()
        self._values: dict[str, float] = {}

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begins a phase of `total` steps, of which `done` were made before a resume."""
        self._name, self._total, self._first = name, total, done
        self._started, self._printed = self._now(), float("-inf")
        self._values = {}
        if self._enabled and self._console.is_terminal:
            self._finish_bar()
            self._bar().start()
            self._task = self._bar().add_task(name, total=total, completed=done, values="")

    def update(self, step: int, /, **values: object) -> None:
        """Says that `step` steps of the phase are done; unknown values are ignored, so a row of metrics can be passed as it is."""
        self._values |= {key: float(value) for key, value in values.items() if key in SHOWN and isinstance(value, int | float)}
        if not self._enabled:
            return
        if self._task is not None:
            self._bar().update(self._task, completed=step, values=self._shown())
        elif step >= self._total or self._now() - self._printed >= PLAIN_SECONDS:
            self._printed = self._now()
            self._print(self._plain_line(step))

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._enabled:
            self._print(text)

    def close(self) -> None:
        self._finish_bar()

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _bar(self) -> Progress:
        """The live bar, made when first asked for."""
        if self._live is None:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("[cyan]{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
                speed_estimate_period=120,
            )
        return self._live

    def _finish_bar(self) -> None:
        """Leaves the bar of a phase standing above what follows."""
        if self._live is not None:
            self._live.stop()
        self._live = self._task = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _shown(self) -> str:
        parts = [f"{label} {form.format(self._values[key])}".strip() for key, (label, form) in SHOWN.items() if key in self._values]
        return "  ".join(parts)

    def _plain_line(self, step: int) -> str:
        elapsed = self._now() - self._started
        made = step - self._first
        left = f"{clock_text(elapsed / made * (self._total - step))} left" if made > 0 else ""
        return "  ".join(filter(None, [f"{self._name} {step}/{self._total}", self._shown(), f"{clock_text(elapsed)} elapsed", left]))


def clock_text(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss.

    >>> clock_text(125), clock_text(3725)
    ('2:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def accuracy_text(accuracy: float | None, num_problems: int | None) -> str:
    """An accuracy in percent with its 95 % Wilson interval where the number of problems is known."""
    if accuracy is None:
        return "-"
    if not num_problems:
        return f"{accuracy:.1%}"
    low, high = wilson_interval(accuracy, num_problems)
    return f"{accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def gain_text(before: float | None, after: float | None) -> str:
    """The difference of two accuracies in points."""
    return "-" if before is None or after is None else f"{100 * (after - before):+.1f} points"


def describe_test_set(summary: Summary) -> str:
    """The test set in words: name, size and hash, as far as they are known."""
    problems = f"{summary.num_problems} problems" if summary.num_problems else ""
    digest = f"hash {summary.test_hash}" if summary.test_hash else ""
    return ", ".join(filter(None, [summary.test_set, problems, digest])) or "not named in metrics.jsonl"


def summary_panel(summary: Summary, run_dir: Path | str) -> Panel:
    """The end of a run on one screen: held-out accuracy before and after, on what, in how long, and where everything is."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("held-out")
    table.add_column(f"before (step {summary.first_step})", justify="right")
    table.add_column(f"after (step {summary.last_step})", justify="right")
    table.add_column("gain", justify="right")
    for name, before, after in (("greedy", summary.before, summary.after), ("temperature 1", summary.before_t1, summary.after_t1)):
        if before is not None or after is not None:
            table.add_row(
                name, accuracy_text(before, summary.num_problems), accuracy_text(after, summary.num_problems), gain_text(before, after)
            )
    lines = Table.grid(padding=(0, 3, 0, 0))
    lines.add_row("test set", Text(describe_test_set(summary), overflow="fold"))
    if summary.seconds is not None:
        phase = f" ({summary.phase} {clock_text(summary.phase_seconds)})" if summary.phase_seconds is not None else ""
        lines.add_row("time", clock_text(summary.seconds) + phase)
    lines.add_row("run folder", Text(str(run_dir), overflow="fold"))
    body = Table.grid()
    body.add_row(table)
    if summary.num_problems:
        body.add_row(Text("in brackets: 95 % Wilson interval", style="dim"))
    body.add_row("")
    body.add_row(lines)
    return Panel(body, title=f"{summary.phase} finished", title_align="left", border_style="green", expand=False, padding=(1, 2))
