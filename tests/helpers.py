"""What tests of runs share: a console that keeps what it is told, and what a run folder holds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlhub.records.metrics import read_metrics, without_clocks
from rlhub.types import Rollout


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def rows(run: Path) -> list[dict]:
    """The metrics of each step, without what a clock says."""
    return [without_clocks(row) for row in read_metrics(run / "metrics.jsonl")]


def weights(run: Path, checkpoint: str = "step_00004") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / "hf" / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of two sets of weights, Euclidean."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def a_rollout(uid: int) -> Rollout:
    """Four tokens after a prompt of four, in groups of four."""
    logp = np.zeros(4, np.float32)
    return Rollout(
        uid=uid,
        group_uid=uid // 4,
        prompt_ids=np.arange(4),
        completion_ids=np.arange(4, dtype=np.int32),
        length=4,
        unmask_step=np.arange(4),
        logp_sample=logp,
        logp_model=logp,
        policy_version=np.zeros(4, np.int32),
        num_forwards=4,
    )
