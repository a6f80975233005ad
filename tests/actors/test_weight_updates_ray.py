"""Weights that reach Ray actors in the middle of a batch: beside the running call where that is asked for, after it otherwise."""

from __future__ import annotations

import copy
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import announcing
import numpy as np
import pytest
import ray
import torch
from announcing import PATIENCE, Announcing

from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import Recipe, SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.noise import Noise
from rlhub.parts import load_part
from rlhub.tasks import task_tokenizer
from rlhub.types import Request, Rollout
from workers.crew import Crew
from workers.generator import Generator
from workers.placement import assemble
from workers.runtimes.ray_runtime import RayRuntime
from workers.runtimes.runtime import Resources
from workers.sync import buckets_of, receipt_of
from workers.transports.gloo import Transport as Gloo
from workers.transports.object_store import Transport as ObjectStore

for module in (sys.modules[__name__], announcing):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import a test file
STOP = 3  # steps that are taken before the weights arrive
BUCKET = 20_000  # bytes
SETTINGS = SamplerConfig(length=8, steps=8, block_length=4, temperature=0.7, early_stop="off")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Stopping(Generator):
    """A generator that stands still after some steps until weights are on their way to it."""

    def stop(self) -> None:
        self.there = threading.Event()
        self.gate = Announcing({STOP: self.there.set})

    def wait_for_stop(self) -> bool:
        return self.there.wait(PATIENCE)

    def threads(self) -> int:
        return torch.get_num_threads()


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    tokenizer, family = task_tokenizer("sort", {}), load_part("models", "llada")
    vocabulary = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = family.build(family.Config.from_published({**tiny().model.config, **vocabulary, "pad_token_id": tokenizer.pad_token_id}))
    path = tmp_path_factory.mktemp("model")
    save_network(network.initialize(torch.Generator().manual_seed(0)), path, tokenizer)
    return path


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    return [Request(uid=31 * row + 5, group_uid=row, prompt_ids=random.integers(4, 12, 5).astype(np.int32)) for row in range(6)]


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return network


def expected(old: torch.nn.Module, new: torch.nn.Module, versions: tuple[int, int]) -> list[Rollout]:
    """What an engine in this process generates when it gets the new weights after the same step."""
    network, steps = copy.deepcopy(old), []
    engine = Engine(network)

    def on_step() -> None:
        steps.append(1)
        if len(steps) == STOP:
            network.load_state_dict(new.state_dict())
            engine.weights_changed(versions[1])

    return engine.generate(requests(), SETTINGS, Noise(0), versions[0], on_step)


def assert_same(found: list[Rollout], theirs: list[Rollout]) -> None:
    for ours, other in zip(found, theirs, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, other.completion_ids)
        np.testing.assert_array_equal(ours.policy_version, other.policy_version)


def test_weights_overtake_a_running_batch_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    """Beside it the worker answers pings; weights that are submitted as usual wait for the end of the batch."""
    runtime = RayRuntime([Resources(1, concurrent=True)], tmp_path)
    try:
        generator = runtime.spawn("generator-0", Stopping, Resources(1, concurrent=True), model_path=str(model), run_seed=0, threads=1)
        old, new = load_network(model), shaken(load_network(model))
        buckets = [list(buckets_of(network.state_dict(), BUCKET)) for network in (old, new)]
        runtime.get(runtime.submit(generator, Stopping.receive, 0, BUCKET, *buckets[0]))
        runtime.get(runtime.submit(generator, Stopping.stop))
        generation = runtime.submit(generator, Stopping.generate, requests(), SETTINGS, 0)
        waits = runtime.submit(generator, Stopping.receive, 2, BUCKET, *buckets[0])
        assert runtime.get(runtime.submit(generator, Stopping.wait_for_stop, concurrent=True))
        assert runtime.get(runtime.ping(generator)) > 0
        assert runtime.wait([generation, waits], timeout=0) == []
        receipt = runtime.get(runtime.submit(generator, Stopping.receive, 1, BUCKET, *buckets[1], concurrent=True))
        assert receipt == receipt_of(new, 1, BUCKET)
        found = runtime.get(generation)
        assert_same(found, expected(old, new, (0, 1)))
        assert all(set(rollout.policy_version) == {0, 1} for rollout in found)
        assert runtime.get(waits) == receipt_of(old, 2, BUCKET)
        later = runtime.get(runtime.submit(generator, Stopping.generate, requests(), SETTINGS, 1))
        assert_same(later, Engine(old).generate(requests(), SETTINGS, Noise(0), 2))
        for concurrent in (False, True):
            assert runtime.get(runtime.submit(generator, Stopping.threads, concurrent=concurrent)) == 1
        assert len(runtime.take_intervals()["generator-0"]) == 9
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def crew(tiny: Callable[..., Recipe], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """One learner and one generator, which takes weights in flight."""
    recipe = tiny("run.runtime=ray", "roles.scorers=0", "algorithm.kl.coefficient=0", "weights.bucket_megabytes=0.02")
    recipe.weights.in_flight = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.placement.Generator", Stopping)
        crew = assemble(recipe, model, tmp_path_factory.mktemp("crew"))
    crew.recipe = recipe
    yield crew
    crew.close()


@pytest.mark.parametrize("transport", [ObjectStore, Gloo])
def test_both_transports_deliver_in_the_middle_of_a_batch(crew: Crew, model: Path, transport: type, tmp_path: Path) -> None:
    """With receipts that agree; gloo's first push also forms its group beside the batch."""
    crew.transport = transport(crew.runtime, crew.learners.handles, crew.recipe.weights)
    old, new = load_network(model), shaken(load_network(model))
    save_network(new, tmp_path, task_tokenizer("sort", {}))
    (generator,) = crew.generators.handles
    load = (crew.recipe.algorithm, crew.recipe.learner.optimizer, 8)
    crew.learners.begin(*load, str(model))
    ObjectStore(crew.runtime, crew.learners.handles, crew.recipe.weights).push([generator], 10)
    crew.runtime.get(crew.runtime.submit(generator, Stopping.stop))
    generation = crew.runtime.submit(generator, Stopping.generate, requests(), SETTINGS, 10)
    assert crew.runtime.get(crew.runtime.submit(generator, Stopping.wait_for_stop, concurrent=True))
    crew.learners.begin(*load, str(tmp_path))
    assert crew.publish(11, concurrent=True) == receipt_of(new, 11, crew.bucket_bytes)
    assert_same(crew.runtime.get(generation), expected(old, new, (10, 11)))
