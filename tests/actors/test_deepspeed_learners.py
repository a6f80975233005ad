"""Two DeepSpeed learners against one torch learner: adapters alone, and mixtures of experts, at every ZeRO stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import distance
from safetensors.torch import load_file, save_file

from rlhub.algorithm.batching import make_batch
from rlhub.algorithm.compose import Algorithm
from rlhub.checkpoints.adapters import write_fresh_adapter
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import AlgorithmConfig, KLConfig, LearnerConfig, OptimizerConfig, RouterConfig
from rlhub.networks.experts import routers
from rlhub.networks.lora import training_state
from rlhub.parts import load_part
from rlhub.types import Batch, RewardResult, Rollout
from workers.learner import Learner
from workers.sync import load_buckets

BUCKET_BYTES = 1 << 12


@dataclass(frozen=True)
class Case:
    """What two learners train."""

    family: str
    stage: int
    rank: int = 0  # of adapters; 0: all weights
    router: RouterConfig = field(default_factory=lambda: RouterConfig(load_balance=0.5, z=0.2))
    updates: int = 1
    learning_rate: float = 1e-3

    @property
    def algorithm(self) -> AlgorithmConfig:
        adapted = {"reference": "adapter_off", "kl": KLConfig(coefficient=0.1)} if self.rank else {}
        return AlgorithmConfig(views={"name": "elbo", "draws": 2}, updates=self.updates, fresh_views="step", **adapted)


CASES = {
    "adapters at ZeRO 1": Case("llada", 1, rank=2),
    "adapters at ZeRO 2": Case("llada", 2, rank=2),
    "adapters at ZeRO 3": Case("llada", 3, rank=2),
    "adapters of a mixture at ZeRO 3": Case("llada_moe", 3, rank=2),
    "mixture at ZeRO 1": Case("llada2", 1),
    "mixture at ZeRO 3": Case("llada2", 3),
    "frozen routers at ZeRO 2": Case("llada2", 2, router=RouterConfig(freeze=True)),
    "frozen routers at ZeRO 3": Case("llada2", 3, router=RouterConfig(freeze=True)),
    "replayed routes at ZeRO 3": Case("llada2", 3, router=RouterConfig(replay=True), updates=2, learning_rate=0.02),
}
ADAPTED = [name for name, case in CASES.items() if case.rank]
MIXTURES = [name for name, case in CASES.items() if case.family != "llada"]


def write_model(folder: Path, case: Case) -> None:
    """A model with a selection bias where the family has one, and an adapter that changes it."""
    family = load_part("models", case.family)
    network = family.build(family.Config.from_published(family.TINY)).initialize(torch.Generator().manual_seed(3))
    for _, buffer in network.named_buffers():
        buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    save_network(network, folder / "base" if case.rank else folder / "model")
    if case.rank:
        generator = torch.Generator().manual_seed(4)
        write_fresh_adapter(folder / "base", folder / "model", case.rank, 4.0, "auto", generator)
        file = folder / "model" / "adapter_model.safetensors"
        save_file({name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in load_file(file).items()}, file)


def graded_batch(learner: Learner) -> Batch:
    """Eight completions of six tokens, none of them special in any family, in two groups."""
    rng = np.random.default_rng(0)
    steps, none, version = np.arange(6, dtype=np.int16), np.zeros(6, np.float32), np.zeros(6, np.int32)
    rollouts = []
    for number in range(8):
        prompt, completion = rng.integers(2, 12, 3).astype(np.int32), rng.integers(2, 12, 6).astype(np.int32)
        rollout = Rollout(number, number // 4, prompt, completion, 6, steps, none, none, version, num_forwards=6)
        rollouts.append(rollout.graded(RewardResult(float(rng.integers(0, 3)))))
    return make_batch(rollouts, scored_length="canvas")


def make_learner(folder: Path, case: Case, backend: str, tokens: int, rank: int = 0, num_learners: int = 1) -> Learner:
    config = LearnerConfig(backend=backend, micro_batch_tokens=tokens, zero_stage=case.stage)
    return Learner(str(folder / "model"), config, 0, router=case.router, threads=1, rank=rank, num_learners=num_learners)


def begin(learner: Learner, case: Case, folder: Path | None = None) -> None:
    optimizer = OptimizerConfig(learning_rate=case.learning_rate, warmup_steps=0, schedule="constant")
    learner.begin(case.algorithm, optimizer, 8, folder and str(folder))


def one_of_two(rank: int, root: Path) -> None:
    """Every case in one process group, with unequal numbers of micro-batches on the ranks."""
    for number, name in enumerate(CASES):
        folder = root / name
        learner = make_learner(folder, CASES[name], "deepspeed", 40, rank, 2)
        if number == 0:
            meet(learner, root)
        torch.save(work(learner, CASES[name], folder), folder / f"found-{rank}.pt")
    learner.leave()


def meet(learner: Learner, root: Path) -> None:
    if learner.rank == 0:
        (root / "address.partial").write_text(learner.rendezvous())
        (root / "address.partial").rename(root / "address")
    while not (root / "address").exists():
        time.sleep(0.05)
    learner.join((root / "address").read_text())


def work(learner: Learner, case: Case, folder: Path) -> dict:
    """The first gradient; then two steps, the second of them once more from what was saved after the first."""
    found = {"gradient": gradient(learner, case)}
    begin(learner, case, folder / "model")
    # Before the first forward, which leaves small parameters whole.
    with learner.backend.full_parameters(trained_only=True):
        found["held"] = {name: parameter.numel() for name, parameter in learner.network.named_parameters()}
    found["metrics"] = learner.step(learner.algorithm.credited(graded_batch(learner)))
    learner.save(str(folder / "saved"))
    learner.step(learner.algorithm.credited(graded_batch(learner)))
    found["after"] = published(learner)
    learner.step(learner.algorithm.credited(graded_batch(learner)))  # somewhere else
    begin(learner, case, folder / "model")
    learner.load(str(folder / "saved"))
    learner.step(learner.algorithm.credited(graded_batch(learner)))
    found["again"] = published(learner)
    found["receipt"] = learner.receipt(1, BUCKET_BYTES)
    return found


def gradient(learner: Learner, case: Case) -> dict[str, torch.Tensor]:
    """Of the first update, averaged over the ranks, before any optimizer."""
    learner.algorithm, learner.backend = Algorithm.compose(case.algorithm), Summing(learner.network)
    batch = learner.algorithm.credited(graded_batch(learner))
    views = learner.make_views(batch)
    reference = learner._base_reference(batch, views, 0) if learner.algorithm.needs_reference else None
    learner._update(batch, views[0], None, reference)
    return {name: averaged(parameter.grad) for name, parameter in learner.network.named_parameters() if parameter.grad is not None}


class Summing:
    """A backend that only collects gradients."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def forward(self, function):
        return function(self.network)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def averaged(gradient: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return gradient


def published(learner: Learner) -> list[np.ndarray]:
    if learner.rank == 0:
        return list(learner.publish(BUCKET_BYTES))
    learner.gather_only(BUCKET_BYTES)
    return []


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did in every case."""
    root = tmp_path_factory.mktemp("learners")
    for name, case in CASES.items():
        (root / name).mkdir()
        write_model(root / name, case)
    mp.spawn(one_of_two, (root,), nprocs=2)
    return root


def found(root: Path, name: str, rank: int = 0) -> dict:
    return torch.load(root / name / f"found-{rank}.pt", weights_only=False)


def state_of(root: Path, name: str, buckets: list[np.ndarray] | None) -> dict[str, torch.Tensor]:
    """What is published, as a generator holds it; None: at the start."""
    state = training_state(load_network(root / name / "model", merge_adapter=False))
    if buckets is not None:
        load_buckets(state, buckets, BUCKET_BYTES)
    return state


def reference_learner(root: Path, name: str, case: Case, steps: int) -> tuple[Learner, dict[str, float]]:
    """The torch backend in this process, and the metrics of its first step."""
    learner = make_learner(root / name, case, "torch", 10**6)
    begin(learner, case)
    metrics = [learner.step(learner.algorithm.credited(graded_batch(learner))) for _ in range(steps)]
    return learner, metrics[0]


def size(tensors: dict[str, torch.Tensor]) -> float:
    return distance(tensors, {name: torch.zeros(()) for name in tensors})


@pytest.mark.parametrize("name", CASES)
def test_two_learners_equal_one(root: Path, name: str) -> None:
    single, metrics = reference_learner(root, name, CASES[name], 2)
    start, ours = state_of(root, name, None), state_of(root, name, found(root, name)["after"])
    theirs = training_state(single.network)
    assert ours.keys() == theirs.keys()
    assert distance(ours, theirs) <= 1e-3 * distance(theirs, start) != 0
    for rank in range(2):
        assert found(root, name, rank)["metrics"] == pytest.approx(metrics, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", CASES)
def test_two_learners_have_the_gradient_of_one(root: Path, name: str) -> None:
    single = make_learner(root / name, CASES[name], "torch", 10**6)
    ours, whole = found(root, name)["gradient"], gradient(single, CASES[name])
    assert ours.keys() == whole.keys()
    assert distance(ours, whole) <= 1e-6 * size(whole) != 0
    if CASES[name].rank:
        assert all(".lora_" in parameter for parameter in ours)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_state_continues_bit_for_bit_with_its_buffers(root: Path, name: str) -> None:
    after, again = (state_of(root, name, found(root, name)[key]) for key in ("after", "again"))
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert found(root, name, 0)["receipt"] == found(root, name, 1)["receipt"]
    start, saved = load_network(root / name / "model"), load_network(root / name / "saved" / "hf")
    biases = [key for key in after if key.endswith("expert_bias")]
    assert bool(biases) == (CASES[name].family == "llada2")
    for key in biases:
        assert start.state_dict()[key].any()
        assert torch.equal(after[key], start.state_dict()[key]) and torch.equal(saved.state_dict()[key], start.state_dict()[key])


@pytest.mark.parametrize("name", ADAPTED)
def test_nothing_of_the_base_is_published_saved_or_gathered_for_it(root: Path, name: str) -> None:
    network = load_network(root / name / "model", merge_adapter=False)
    adapters = sum(tensor.numel() * tensor.element_size() for tensor in training_state(network).values())
    assert found(root, name)["receipt"].num_bytes == sum(bucket.nbytes for bucket in found(root, name)["after"]) == adapters
    whole = {key: parameter.numel() for key, parameter in network.named_parameters()}
    held = found(root, name)["held"]
    base = [key for key in whole if ".lora_" not in key]
    assert all(held[key] == (0 if key in base and CASES[name].stage == 3 else whole[key]) for key in whole)
    for file in (root / name / "saved").rglob("*.pt"):
        stored = torch.load(file, weights_only=False)
        assert not [key for key in stored.get("module", {}) if key.endswith("weight") and ".lora_" not in key], file
    assert not list((root / name / "saved" / "hf").glob("model*.safetensors"))


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_reported_by_noise_level_and_frozen_ones_stay(root: Path, name: str) -> None:
    levels = [key for key in found(root, name)["metrics"] if key.startswith("router/level_")]
    assert len(levels) >= 4
    start, saved = (routers(load_network(root / name / folder)) for folder in ("model", "saved/hf"))
    stay = CASES[name].router.freeze or CASES[name].rank > 0
    assert all(torch.equal(one.weight, other.weight) == stay for one, other in zip(start, saved, strict=True))


def test_replayed_routes_are_not_those_of_the_weights_in_between(root: Path) -> None:
    """Else the equality of two learners that replay and one that does would say nothing."""
    (name,) = [name for name, case in CASES.items() if case.router.replay]
    case = CASES[name]
    start, ours = state_of(root, name, None), state_of(root, name, found(root, name)["after"])
    free = Case(case.family, case.stage, updates=case.updates, learning_rate=case.learning_rate, router=RouterConfig())
    other, _ = reference_learner(root, name, free, 2)
    assert distance(ours, other.network.state_dict()) > 0.01 * distance(ours, start)
