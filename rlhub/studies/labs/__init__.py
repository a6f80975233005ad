"""Laboratory experiments: a published claim on a network of toy size, with a control that must fail. `rlhub lab NAME` runs one.

A module here has a docstring whose first line is the claim and which goes on with `Source:`, `Experiment:`, `Control:` and `Pass:` (what
is written there was written before the measurement), and

    KIND: str                  identity (must hold to float error) or statistical (may come out negative)
    Config                     frozen dataclass of settings; every one has `seeds: list[int]` and `parallel: int`, processes at a time
    run(config, progress: RunProgress, out: Path) -> Verdict

An experiment consists of arms, one for each seed and variant, which `run_arms` spreads over processes and keeps in the folder `out`, so
that an experiment that was stopped continues and one more seed costs one more seed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlhub.files import replace_file
from rlhub.records.metrics import student_interval
from rlhub.records.progress import RunProgress
from rlhub.studies.lab_training import Tick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outcome = Literal["holds", "does not hold", "undecided"]

CONTRACT = ("Config", "run(config, progress, out)", "KIND")
NOT_SETTINGS = ("seeds", "parallel")  # do not change the result of an arm


@dataclass(frozen=True)
class Check:
    """A condition on measured numbers; `passed` None means that they do not decide it."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What an experiment says.

    Attributes:
        checks: the conditions of the claim.
        control: passed when the control failed as it must. One that does not fail leaves the claim undecided: the experiment cannot tell.
        numbers: a value per seed for each quantity.
    """

    checks: tuple[Check, ...]
    control: Check
    numbers: dict[str, list[float]]
    figure: Figure | None = None

    @property
    def outcome(self) -> Outcome:
        passed = [check.passed for check in self.checks]
        if False in passed:
            return "does not hold"
        return "holds" if all(passed) and self.control.passed else "undecided"


@dataclass(frozen=True)
class Arm:
    """A part of an experiment that runs alone: `function(config, tick, **arguments)` returns what JSON can hold.

    Attributes:
        name: unique, and the name of its file.
        ticks: how often the function calls `tick`, for the progress bar.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    ticks: int


def run_arms(arms: Iterable[Arm], config: Any, progress: RunProgress, out: Path) -> dict[str, dict[str, Any]]:
    """Results by name; those that `out` holds from an earlier call with the same settings are not computed again.

    Each arm runs single-threaded, `config.parallel` of them at a time.
    """
    arms = list(arms)
    folder = folder_of(config, out)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [arm for arm in arms if not (folder / f"{arm.name}.json").exists()]
    total = sum(arm.ticks for arm in arms)
    progress.phase(out.name, total, done=total - sum(arm.ticks for arm in missing))
    report = partial(_report, progress, total - sum(arm.ticks for arm in missing), total)
    if config.parallel > 1 and len(missing) > 1:
        _run_in_processes(missing, config, folder, report)
    else:
        count = [0]

        def tick() -> None:
            count[0] += 1
            report(count[0])

        for arm in missing:
            _run_one(arm, config, folder, tick)
    progress.update(total)
    return {arm.name: json.loads((folder / f"{arm.name}.json").read_text())["result"] for arm in arms}


def seconds_of_arms(config: Any, out: Path) -> float:
    """CPU-seconds that all kept arms of these settings took, whenever they ran."""
    return sum(json.loads(file.read_text())["cpu_seconds"] for file in folder_of(config, out).glob("*.json"))


def folder_of(config: Any, out: Path) -> Path:
    """Where arms with these settings are kept: under a hash of what changes their results."""
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_SETTINGS}
    return out / "arms" / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def above(name: str, values: Sequence[float], bound: float = 0.0) -> Check:
    """Does the mean over seeds lie above `bound`? Undecided while its 95 % interval holds `bound`."""
    low, high = student_interval(values)
    passed = True if low > bound else False if high < bound else None
    return Check(name, passed, f"{mean(values):.4g} [{low:.4g}, {high:.4g}], bound {bound:.4g}")


def not_above(name: str, values: Sequence[float], bound: float) -> Check:
    """Does the mean over seeds lie at most at `bound`? Undecided while its 95 % interval reaches across."""
    low, high = student_interval(values)
    passed = True if high <= bound else False if low > bound else None
    return Check(name, passed, f"{mean(values):.4g} [{low:.4g}, {high:.4g}], bound {bound:.4g}")


def _report(progress: RunProgress, before: int, total: int, count: int) -> None:
    progress.update(min(before + count, total))


def _run_one(arm: Arm, config: Any, folder: Path, tick: Tick) -> None:
    torch.set_num_threads(1)
    started = time.process_time()
    result = arm.function(config, tick, **arm.arguments)
    content = {"result": result, "cpu_seconds": time.process_time() - started}
    replace_file(folder / f"{arm.name}.json", json.dumps(content, indent=1) + "\n")


def _run_in_processes(arms: Sequence[Arm], config: Any, folder: Path, report: Callable[[int], None]) -> None:
    """Run arms in `config.parallel` processes, reporting finished units of work; the first failure stops all."""
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    count, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(config.parallel, context, _start_process, (count, stop)) as pool:
        waiting = {pool.submit(_in_process, arm, config, folder) for arm in arms}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                report(count.value)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


_count: Any = None  # of a process that trains arms: its counter of ticks, and the event that ends it
_stop: Any = None


def _start_process(count: Any, stop: Any) -> None:
    global _count, _stop
    _count, _stop = count, stop


def _in_process(arm: Arm, config: Any, folder: Path) -> None:
    _run_one(arm, config, folder, _tick_in_process)


def _tick_in_process() -> None:
    if _stop.is_set() or not multiprocessing.parent_process().is_alive():  # nobody would read the result
        raise KeyboardInterrupt
    with _count.get_lock():
        _count.value += 1
