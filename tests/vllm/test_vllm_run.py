"""A run whose generator is vLLM: the same tokens as with the torch engine, also after the generator was killed."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from helpers import rows, silent

from rlhub.config.schema import Recipe
from rlhub.records.metrics import read_metrics
from rlhub.records.rollout_log import read_rollouts, rollout_path
from rlhub.training.run import train

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("quick_report")]

# Heads of 32 dimensions, the smallest of vLLM's CPU attention.
MODEL = "model.config={d_model: 64, n_layers: 2, n_heads: 2, mlp_hidden_size: 64, max_sequence_length: 32}"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def samples(run: Path, step: int) -> list[dict]:
    return [{key: value for key, value in sample.items() if key != "logp"} for sample in read_rollouts(rollout_path(run, step))]


@pytest.fixture(scope="module")
def torch_run(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('torch')}", MODEL), silent())


def test_the_same_tokens_and_learning_as_the_torch_engine(tiny: Callable[..., Recipe], torch_run: Path, tmp_path: Path) -> None:
    """Also with weights through gloo, and a generator that is killed with work in its hands, rebuilt and brought up to date."""
    run = tmp_path / "tiny"
    killed: list[int] = []

    def kill_in_mid_run() -> None:
        until = time.monotonic() + 240
        while ("online", 1) not in [(row["phase"], row["step"]) for row in read_metrics(run / "metrics.jsonl")]:
            if time.monotonic() > until:
                return
            time.sleep(0.02)
        process = int(re.findall(r"starts as process (\d+)", (run / "logs" / "generator-0.log").read_text())[-1])
        os.kill(process, signal.SIGKILL)
        killed.append(process)

    thread = threading.Thread(target=kill_in_mid_run, daemon=True)
    thread.start()
    overrides = ("run.runtime=ray", "roles.engine=vllm", "weights.transport=gloo")
    train(tiny(f"run.output_dir={tmp_path}", MODEL, *overrides), silent())
    thread.join(1)
    assert killed and read_metrics(run / "metrics.jsonl")[-1]["system/workers_lost"] >= 1
    for step in range(1, 5):
        assert samples(run, step) == samples(torch_run, step)
    for ours, theirs in zip(rows(run), rows(torch_run), strict=True):
        for key in theirs.keys() & {"reward/mean", "eval/accuracy"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-6)
