"""What a person reads while a run goes on, on a terminal and in a log."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from rlhub.records.metrics import Summary
from rlhub.records.progress import RunProgress, accuracy_text, clock_text, gain_text, summary_panel

SUMMARY = Summary("online", 0, 300, 0.5, 0.766, 0.22, 0.676, "countdown_small held-out", 512, "sha256:3fa91c0d77", 316.2, 270.4)


class Clock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def log_console() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=False)


def test_log_gets_a_line_every_five_seconds_and_the_last_step() -> None:
    console, clock = log_console(), Clock()
    with RunProgress(console, now=clock) as progress:
        progress.phase("online", total=100, done=10)
        for step in range(11, 101):
            clock.time += 1.0
            values = {"eval/accuracy": 0.5} if step == 12 else {}
            row = {"phase": "online", "step": step, "reward/mean": step / 100, "throughput/samples_per_s": 1561.26, "kl": None} | values
            progress.update(step, **row)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "online 11/100  reward 0.110  1,561.3 samples/s  0:01 elapsed  1:29 left"
    assert lines[1] == "online 16/100  reward 0.160  held-out 50.0%  1,561.3 samples/s  0:06 elapsed  1:24 left"
    assert lines[-1] == "online 100/100  reward 1.000  held-out 50.0%  1,561.3 samples/s  1:30 elapsed  0:00 left"
    assert len(lines) == 19


def test_step_0_has_no_time_left_and_phases_do_not_mix() -> None:
    console, clock = log_console(), Clock()
    progress = RunProgress(console, now=clock)
    progress.phase("sft", total=2)
    progress.update(0, **{"eval/accuracy": 0.0})
    progress.update(2, loss=1.5)
    progress.phase("online", total=1)
    progress.update(0)
    assert console.file.getvalue().splitlines() == [
        "sft 0/2  held-out 0.0%  0:00 elapsed",
        "sft 2/2  loss 1.5000  held-out 0.0%  0:00 elapsed  0:00 left",
        "online 0/1  0:00 elapsed",
    ]


def test_messages_are_printed_as_they_are() -> None:
    console = log_console()
    RunProgress(console).message("wrote [bold]checkpoints/step_00010[/bold] " + "x" * 150)
    assert console.file.getvalue() == "wrote [bold]checkpoints/step_00010[/bold] " + "x" * 150 + "\n"


def test_disabled_is_silent() -> None:
    console = log_console()
    with RunProgress(console, enabled=False) as progress:
        progress.phase("sft", total=1)
        progress.update(1, loss=1.0)
        progress.message("hello")
    assert console.file.getvalue() == ""


def test_terminal_shows_a_bar_with_the_newest_values() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    with RunProgress(console) as progress:
        progress.phase("sft", total=5)
        progress.update(5, loss=0.5)
        progress.phase("online", total=40)
        progress.message("evaluated")
        progress.update(7, **{"reward/mean": 0.25, "eval/accuracy": 0.512, "throughput/samples_per_s": 88.0})
    text = console.file.getvalue()
    wanted = ("5/5", "loss 0.5000", "7/40", "reward 0.250", "held-out 51.2%", "88.0 samples/s", "evaluated", "left")
    assert all(part in text for part in wanted)


def test_summary_says_everything_on_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(summary_panel(SUMMARY, Path("runs") / "quickstart"))
    text = console.file.getvalue()
    accuracies = ("50.0% [45.7, 54.3]", "76.6% [72.7, 80.1]", "+26.6 points", "22.0%", "67.6%", "+45.6 points")
    wanted = (*accuracies, "countdown_small held-out", "512 problems", "3fa91c0d77", "5:16", "runs/quickstart")
    assert all(part in text for part in wanted)
    assert max(map(len, text.splitlines())) <= 80


def test_summary_without_temperature_or_test_set() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_panel(Summary("sft", 0, 10, 0.1, 0.2, None, None, "", None, "", None, None), "runs/x"))
    text = console.file.getvalue()
    assert "10.0%" in text and "temperature 1" not in text and "not named in metrics.jsonl" in text


def test_words_for_numbers() -> None:
    assert [clock_text(seconds) for seconds in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
    assert accuracy_text(None, 10) == "-" and accuracy_text(0.5, None) == "50.0%" and accuracy_text(0.5, 512) == "50.0% [45.7, 54.3]"
    assert gain_text(0.5, 0.4) == "-10.0 points" and gain_text(None, 0.4) == "-"
