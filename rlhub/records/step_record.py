"""What one step leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhub.phases import Phase
from rlhub.records.metrics import MetricsRow

Metric = float | int | str
Metrics = Mapping[str, Metric]


@dataclass
class StepRecord:
    """The metrics of one step of a phase, collected as they arise; `row` is its line of `metrics.jsonl`. Step 0 is before training.

    Example:
        >>> record = StepRecord(Phase.ONLINE, 3)
        >>> record.add({"reward/mean": 0.5})
        >>> record.row(41.2)
        {'phase': <Phase.ONLINE: 'online'>, 'step': 3, 'wall_s': 41.2, 'reward/mean': 0.5}
    """

    phase: Phase
    step: int
    metrics: dict[str, Metric] = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        """Take metrics in; what was measured twice stands as it was measured last."""
        self.metrics.update(metrics)

    def row(self, wall_seconds: float) -> MetricsRow:
        """The line of the log, `wall_seconds` after the start of the run."""
        return {"phase": self.phase, "step": self.step, "wall_s": wall_seconds, **self.metrics}
