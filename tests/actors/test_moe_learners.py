"""Two DeepSpeed learners of a mixture of experts against one torch learner, with auxiliary losses, a selection bias and ZeRO-3."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from rlhub.batching import make_batch
from rlhub.config import AlgorithmConfig, LearnerConfig, OptimizerConfig, RouterConfig
from rlhub.model_files import load_network, save_network
from rlhub.models import llada2
from rlhub.types import Batch, RewardResult, Rollout
from workers.learner import Learner
from workers.sync import load_buckets

ROUTER = RouterConfig(load_balance=0.5, z=0.2)
BUCKET_BYTES = 1 << 16


def graded_batch() -> Batch:
    rng = np.random.default_rng(0)
    steps, none, version = np.arange(6, dtype=np.int16), np.zeros(6, np.float32), np.zeros(6, np.int32)
    rollouts = []
    for number in range(8):
        prompt, completion = rng.integers(0, 12, 3).astype(np.int32), rng.integers(0, 12, 6).astype(np.int32)
        rollout = Rollout(number, number // 4, prompt, completion, 6, steps, none, none, version, num_forwards=6)
        rollouts.append(rollout.graded(RewardResult(float(rng.integers(0, 3)))))
    return make_batch(rollouts, mask_id=llada2.TINY["mask_token_id"], span="canvas")


def make_learner(folder: Path, backend: str, tokens: int, **kwargs) -> Learner:
    config = LearnerConfig(backend=backend, micro_batch_tokens=tokens, zero_stage=3)
    return Learner(str(folder / "model"), config, 0, router=ROUTER, threads=1, **kwargs)


def begin(learner: Learner) -> None:
    algorithm = AlgorithmConfig(views={"name": "elbo", "draws": 2})
    learner.begin(algorithm, OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant"), 8)


def one_of_two(rank: int, folder: Path) -> None:
    """Unequal numbers of micro-batches on the ranks, two steps, then what rank 0 publishes."""
    learner = make_learner(folder, "deepspeed", 40, rank=rank, num_learners=2)
    if rank == 0:
        (folder / "address.partial").write_text(learner.rendezvous())
        (folder / "address.partial").rename(folder / "address")
    while not (folder / "address").exists():
        time.sleep(0.05)
    learner.join((folder / "address").read_text())
    begin(learner)
    metrics = [learner.step(graded_batch()) for _ in range(2)][-1]
    torch.save(metrics, folder / f"metrics-{rank}.pt")
    if rank == 0:
        torch.save(list(learner.publish(BUCKET_BYTES)), folder / "buckets.pt")
    else:
        learner.gather_only(BUCKET_BYTES)
    learner.leave()


def test_two_learners_equal_one(tmp_path: Path) -> None:
    network = llada2.build(llada2.Config.from_published(llada2.TINY)).initialize(torch.Generator().manual_seed(3))
    for name, buffer in network.named_buffers():
        assert name.endswith("expert_bias")
        buffer.copy_(torch.linspace(-0.1, 0.1, 8))
    save_network(network, tmp_path / "model")
    single = make_learner(tmp_path, "torch", 10**6)
    begin(single)
    wanted_metrics = [single.step(graded_batch()) for _ in range(2)][-1]

    mp.spawn(one_of_two, (tmp_path,), nprocs=2)
    found = load_network(tmp_path / "model")
    start = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    load_buckets(found.state_dict(), torch.load(tmp_path / "buckets.pt", weights_only=False), BUCKET_BYTES)
    state, wanted = found.state_dict(), single.network.state_dict()
    biases = [name for name in state if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(torch.equal(state[name], wanted[name]) for name in biases)

    def distance(one, other):
        return sum(float((one[name] - other[name]).double().square().sum()) for name in one) ** 0.5

    assert distance(wanted, start) > 0 and distance(state, wanted) <= 1e-3 * distance(wanted, start)
    for rank in range(2):
        metrics = torch.load(tmp_path / f"metrics-{rank}.pt")
        for key in wanted_metrics:
            if key.startswith("router/"):
                np.testing.assert_allclose(metrics[key], wanted_metrics[key], rtol=1e-4)
