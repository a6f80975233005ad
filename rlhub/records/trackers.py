"""Where metrics go: `metrics.jsonl` always, and the trackers that the recipe names in `run.trackers`.

Deliberately not a plug-in folder: a new tracker is one class here with `log` and `close`, and one line in `TRACKERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhub.errors import RecipeError
from rlhub.files import plain
from rlhub.parts import did_you_mean
from rlhub.records.metrics import MetricsLog, MetricsRow


class Tracker(Protocol):
    """A place that metrics are sent to."""

    def log(self, row: MetricsRow) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `logs/tensorboard/<phase>`; look at them with `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = Path(run_dir) / "logs" / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, row: MetricsRow) -> None:
        from torch.utils.tensorboard import SummaryWriter

        phase, step = row["phase"], row["step"]
        if phase not in self._writers:
            # The first row of a resumed run says from where on the events of the killed one are void.
            self._writers[phase] = SummaryWriter(str(self._folder / phase), purge_step=step)
        for key, value in plain(row).items():
            if key not in ("phase", "step") and isinstance(value, int | float):
                self._writers[phase].add_scalar(key, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


TRACKERS = {"tensorboard": TensorBoard}


class Trackers:
    """Sends every row to `metrics.jsonl` first, then to each named tracker."""

    def __init__(self, run_dir: Path | str, names: Sequence[str] = ()) -> None:
        check_trackers(names)
        self.metrics = MetricsLog(Path(run_dir) / "metrics.jsonl")
        self.others: list[Tracker] = [TRACKERS[name](Path(run_dir)) for name in dict.fromkeys(names)]

    def log(self, row: MetricsRow) -> None:
        self.metrics.write(row)
        for tracker in self.others:
            tracker.log(row)

    def truncate_after(self, phase: str, step: int, phases_order: Sequence[str]) -> int:
        """Drops what a resumed run makes again; the other trackers void their own from the next row on."""
        return self.metrics.truncate_after(phase, step, phases_order)

    def close(self) -> None:
        self.metrics.close()
        for tracker in self.others:
            tracker.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that does not exist."""
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"run.trackers: there is no tracker {name!r}{did_you_mean(name, TRACKERS)}")
