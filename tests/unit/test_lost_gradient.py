"""A gradient that is not finite: the weights are lost, so nobody gets them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from rlhub.config.schema import Recipe
from rlhub.errors import UserError
from rlhub.records.metrics import read_metrics
from rlhub.training.run import train
from workers.generator import Generator
from workers.learner import Learner


class Diverging(Learner):
    """Its second step ends with weights that are lost."""

    num_steps = 0

    def step(self, *args: object) -> dict[str, float]:
        self.num_steps += 1
        return super().step(*args) | ({"grad_norm": float("nan")} if self.num_steps == 2 else {})


class Watched(Generator):
    """Keeps the versions that arrived."""

    versions: ClassVar[list[int]] = []

    def receive(self, version: int, *rest: object) -> object:
        self.versions.append(version)
        return super().receive(version, *rest)


@pytest.mark.parametrize("phase", ["online", "sft"])
def test_weights_that_are_lost_are_neither_published_nor_saved(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr("workers.placement.Learner", Diverging)
    monkeypatch.setattr("workers.placement.Generator", Watched)
    monkeypatch.setattr(Watched, "versions", [])
    every = ("run.eval_every=1", "run.checkpoint_every=1", "sft.eval_every=1")
    recipe = tiny(f"run.output_dir={tmp_path}", f"run.phases=[{phase}]", *every)
    with pytest.raises(UserError, match=r"the gradient norm is nan after this step, so the weights are lost; the last checkpoint is whole"):
        train(recipe, Console(file=io.StringIO()))
    assert Watched.versions == [0, 1], "the start and the first step"
    assert [row["step"] for row in read_metrics(tmp_path / "tiny" / "metrics.jsonl")] == [0, 1]
    assert [path.name.rpartition("_")[2] for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["00001"]
