"""Rollouts ahead of training on Ray actors: the same as in one process between batches, and alive when a generator dies amid them."""

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

pytestmark = pytest.mark.usefixtures("quick_report")

STALE = ("run.phases=[online]", "algorithm.max_staleness=1", "algorithm.correction=none", "algorithm.updates=1")
ACTORS = ("run.runtime=ray", "roles.generators=2")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=12, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_batches_ahead_are_those_of_one_process(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    """Which weights generate a batch follows from the order of the calls, whoever is faster."""
    local = train(tiny(f"run.output_dir={tmp_path}/local", *STALE, "run.steps=3"), silent())
    actors = train(tiny(f"run.output_dir={tmp_path}/ray", *STALE, *ACTORS, "run.steps=3"), silent())
    assert [row["async/staleness_max"] for row in rows(actors)[1:]] == [0, 1, 1]
    assert rows(actors) == rows(local)


def test_kill_9_of_a_generator_while_weights_are_pushed_into_running_batches(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    """The worker is frozen first, so that it surely has calls in its hands when it is killed."""
    run, killed = tmp_path / "tiny", []

    def kill() -> None:
        until = time.monotonic() + 120
        while len(read_metrics(run / "metrics.jsonl")) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        process = int(re.findall(r"starts as process (\d+)", (run / "logs" / "generator-1.log").read_text())[-1])
        os.kill(process, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(process, signal.SIGKILL)
        killed.append(process)

    threading.Thread(target=kill, daemon=True).start()
    overrides = ("weights.in_flight=true", "run.steps=8", "run.eval_every=8", "run.checkpoint_every=8")
    train(tiny(f"run.output_dir={tmp_path}", *STALE, *ACTORS, *overrides), silent())
    written = read_metrics(run / "metrics.jsonl")[1:]
    assert killed and written[-1]["system/workers_lost"] >= 1
    assert [row["step"] for row in written] == [row["sync/version"] for row in written] == list(range(1, 9))
    assert max(row["async/staleness_max"] for row in written) == 1
    uids = [sample["uid"] for step in range(1, 9) for sample in read_rollouts(rollout_path(run, step))]
    assert len(set(uids)) == len(uids) == 8 * 16, "no rollout is lost or trained on twice"
    assert all(0 <= row["system/idle_share/generator"] <= 1 for row in written)
