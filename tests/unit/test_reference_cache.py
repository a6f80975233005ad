"""The reference's estimates on disk: what is computed, what is reused, and what a damaged file does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.pairs import PairOrder, Pairs
from rlhub.config.schema import AlgorithmConfig
from rlhub.errors import CheckpointError
from rlhub.noise import Noise
from rlhub.training import reference_cache
from rlhub.training.reference_cache import ReferenceCache, cache_key, weights_hash
from rlhub.types import Batch, LogLikelihood

N, K = 23, 3  # pairs, which make five steps of 4, 5, 4, 5 and 5


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD_STEPS", 2)


def pairs() -> Pairs:
    rows = np.arange(100, 100 + N)
    responses = [(np.arange(2 + row % 3, dtype=np.int32), np.arange(4, dtype=np.int32)) for row in range(N)]
    return Pairs(rows, [np.arange(3, dtype=np.int32)] * N, responses, np.tile([1.0, 0.0], (N, 1)), mask_id=9, eos_id=8)


def opened(folder: Path, plans: int = 2) -> ReferenceCache:
    return ReferenceCache(folder, {"why": "test"}, pairs(), PairOrder(N, 5, plans, Noise(1)))


class Scorers:
    """Estimates that name their sample and their noise plan; every request is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def submit(self, worker: int, batch: Batch) -> LogLikelihood:
        self.asked.append((worker, batch.epoch, len(batch)))
        return LogLikelihood(*self.of(batch))

    @staticmethod
    def of(batch: Batch):
        value = torch.from_numpy(batch.uid.astype(np.float64)) + 0.5 * batch.epoch
        return value, "lower", "sequence", torch.from_numpy(batch.scored_length), value[:, None] * torch.arange(1, K + 1)


def fill(cache: ReferenceCache, steps: int, workers: int = 2, stop_after: int | None = None) -> Scorers:
    scorers = Scorers()
    for done in cache.fill(cache.missing(steps), workers, scorers.submit, lambda future: future):
        if done == stop_after:
            break
    return scorers


def check_every_step(cache: ReferenceCache, steps: int) -> int:
    """Every step finds its own estimates; the number of sequences that were there before."""
    total = 0
    for step in range(1, steps + 1):
        epoch, which = cache.order.step(step)
        batch = cache.pairs.batch(which, cache.order.plan(epoch))
        estimate, hits = cache.look_up(batch.epoch, which, batch)
        value, *_, draws = Scorers.of(batch)
        assert torch.equal(estimate.value, value) and torch.equal(estimate.draws, draws)
        assert torch.equal(estimate.scored_length, torch.from_numpy(batch.scored_length))
        total += hits
    return total


def test_estimates_come_back_to_their_own_samples_in_every_epoch(tmp_path):
    cache = opened(tmp_path)
    fill(cache, steps=20)
    assert check_every_step(cache, 20) == 0
    again = opened(tmp_path)
    assert again.missing(20) == []
    assert check_every_step(again, 20) == 4 * N * 2  # four epochs of pairs of two


def test_only_what_the_run_uses_is_computed(tmp_path):
    scorers = fill(opened(tmp_path), steps=2)
    assert [(plan, size) for _, plan, size in scorers.asked] == [(0, 8), (0, 10)]
    more = fill(opened(tmp_path), steps=7)  # the rest of the first epoch, and one shard of the second
    assert [(plan, size) for _, plan, size in more.asked] == [(0, 8), (0, 10), (0, 10), (1, 8), (1, 10)]
    assert fill(opened(tmp_path), steps=7).asked == []


def test_all_scorers_work(tmp_path):
    asked = fill(opened(tmp_path), steps=20, workers=2).asked
    assert [worker for worker, *_ in asked] == [0, 1, 0, 1, 0] * 2  # shards of two steps, the last one of one


def test_a_killed_computation_goes_on(tmp_path):
    first = opened(tmp_path)
    fill(first, steps=5, workers=1, stop_after=1)
    assert len(list(tmp_path.rglob("shard_*.bin"))) == 1
    second = opened(tmp_path)
    assert len(fill(second, steps=5).asked) == 5 - 2
    assert check_every_step(second, 5) == (4 + 5) * 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_noticed_and_made_again(tmp_path, damage):
    fill(opened(tmp_path), steps=5)
    file = tmp_path / "plan_0" / "shard_00002.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"flip": bytes(content), "truncate": file.read_bytes()[:-8], "empty": b""}[damage])
    cache = opened(tmp_path)
    assert [(plan, size) for _, plan, size in fill(cache, steps=5).asked] == [(0, 10)]
    assert cache.num_damaged == 1
    check_every_step(cache, 5)


def test_a_shard_that_is_lost_while_it_is_used_is_one_line(tmp_path):
    cache = opened(tmp_path)
    fill(cache, steps=5)
    for file in (tmp_path / "plan_0").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="lost a shard while it was used; the same command makes it again"):
        check_every_step(cache, 5)


BASE = AlgorithmConfig(advantage={"name": "best_worst"}, views={"name": "elbo", "draws": 8}, objective={"name": "dpo"})


def key(algorithm: AlgorithmConfig = BASE, data: Pairs | None = None, size: int = 64, **facts: object) -> str:
    rest = {"run_seed": 0, "reference": "a", "dtype": "float32", **facts}
    return cache_key(Algorithm.compose(algorithm), data or pairs(), size, **rest)[0]


def test_the_key_changes_with_everything_that_estimates_depend_on():
    data = pairs()
    other_tokens = [(np.zeros(2, dtype=np.int32), responses[1]) for responses in data.responses]
    keys = [
        key(),
        key(replace(BASE, views={"name": "elbo", "draws": 4})),
        key(replace(BASE, views={"name": "elbo", "draws": 8, "levels": "stratified"})),
        key(replace(BASE, views={"name": "time_form", "draws": 8})),
        key(replace(BASE, likelihood={"name": "by_sign"})),
        key(replace(BASE, shared_noise=False)),
        key(data=replace(data, responses=other_tokens)),
        key(data=replace(data, row=data.row + 1)),
        key(data=replace(data, canvas=16)),
        key(size=32),
        key(run_seed=1),
        key(reference="b"),
        key(dtype="bfloat16"),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_how_the_policy_is_trained():
    trained_otherwise = replace(BASE, objective={"name": "ipo"}, auxiliary=[{"name": "sft", "weight": 0.1}])
    assert key(trained_otherwise) == key(replace(BASE, views={"name": "elbo", "draws": 8, "levels": "independent"})) == key()


def test_the_reference_is_known_by_its_weights(tmp_path):
    folders = []
    for number, content in enumerate((b"weights", b"weights", b"Weights")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        (folder / "config.json").write_text("{}")
        folders.append(folder)
    first, second, third = map(weights_hash, folders)
    assert first == second != third
