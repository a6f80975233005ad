"""The learner in one process: inner updates against a loop that is written out here, with the weights that began the batch held fixed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhub.algorithm.batching import make_batch, micro_batches
from rlhub.algorithm.scoring import micro_batch_log_probs, token_log_probs
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import AlgorithmConfig, KLConfig, LearnerConfig, OptimizerConfig
from rlhub.models.llada import Config, LLaDA
from rlhub.types import Batch, LogLikelihood, RewardResult, Rollout, Views
from workers.learner import Learner

LENGTH, MASK = 6, 0
REWARDS = [[1.0, 0.0, 0.5, 2.0], [0.0, 3.0, 1.0, 0.0]]
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="constant", max_grad_norm=1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 24, "max_sequence_length": 32, "init_std": 0.3}
    config = Config(**shape, vocab_size=12, mask_token_id=MASK, eos_token_id=1)
    save_network(LLaDA(config).initialize(torch.Generator().manual_seed(1)), path)
    return path


def learner_of(folder: Path, algorithm: AlgorithmConfig, optimizer: OptimizerConfig = OPTIMIZER, tokens: int = 4096) -> Learner:
    learner = Learner(str(folder), LearnerConfig(backend="torch", micro_batch_tokens=tokens), run_seed=3)
    learner.begin(algorithm, optimizer, total_updates=100)
    return learner


def graded_batch() -> Batch:
    """Two prompts with four completions each."""
    random = np.random.default_rng(0)
    rollouts = []
    for number, reward in enumerate(np.ravel(REWARDS)):
        prompt, completion = random.integers(2, 12, 3).astype(np.int32), random.integers(2, 12, LENGTH).astype(np.int32)
        steps, none = np.arange(LENGTH, dtype=np.int16), np.zeros(LENGTH, np.float32)
        rollout = Rollout(number, number // 4, prompt, completion, LENGTH, steps, none, none, np.zeros(LENGTH, np.int32), LENGTH)
        rollouts.append(rollout.graded(RewardResult(float(reward))))
    return make_batch(rollouts, scored_length="canvas")


def elbo(log_prob: torch.Tensor, views: Views) -> torch.Tensor:
    """float64 [B]: the mean over draws of the weighted sums."""
    weighted = log_prob.double() * views.score_weight.double() / views.num_draws
    return torch.zeros(views.num_samples, dtype=torch.float64).index_add(0, views.score_sample, weighted)


def written_out(
    folder: Path, views: list[Views], updates: int, clip: float, reference: torch.nn.Module | None, coefficient: float
) -> tuple[torch.nn.Module, float]:
    """PPO's loop on sequences: the network after all updates, and the share of the last one whose gradient is cut.

    Each update lowers -mean min(r A, clip(r) A) + coefficient mean (L - L_reference)^2 / 2 with r = exp((L - L_began) / length).
    """
    network = load_network(folder)
    began = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, weight_decay=0.0)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()
    for update in range(updates):
        seen = views[update if len(views) > 1 else 0]
        (whole,) = micro_batches(seen, 10**9)
        likelihood = elbo(micro_batch_log_probs(network, seen, whole), seen)
        ratio = ((likelihood - elbo(token_log_probs(began, seen, 10**9), seen)) / LENGTH).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
        if reference is not None:
            loss = loss + coefficient * ((likelihood - elbo(token_log_probs(reference, seen, 10**9), seen)) ** 2 / 2).mean()
        cut = (ratio.clamp(1 - clip, 1 + clip) * advantage < ratio * advantage).double().mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, cut


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("tokens", [4096, 30], ids=["one forward", "two passes"])
@pytest.mark.parametrize("fresh", ["update", "step"])
@pytest.mark.parametrize("coefficient", [0.0, 0.05])
def test_inner_updates_are_clipped_against_the_weights_that_began_the_batch(folder, tokens, fresh, coefficient):
    clip, updates = 0.02, 4
    algorithm = AlgorithmConfig(
        advantage={"name": "group_mean"},
        views={"name": "elbo", "draws": 3},
        objective={"name": "sequence_clip", "clip_low": clip, "clip_high": clip},
        kl=KLConfig(kind="k2", coefficient=coefficient, normalize="none"),
        updates=updates,
        fresh_views=fresh,
        reference="frozen",
    )
    learner, batch = learner_of(folder, algorithm, tokens=tokens), graded_batch()
    before, views = flat(learner.network), learner.make_views(learner.algorithm.credited(batch))
    assert len(views) == (updates if fresh == "update" else 1)
    other = load_network(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    reference = [{index: token_log_probs(other, one, 10**9)} for index, one in enumerate(views)] if coefficient else []
    metrics = learner.step(learner.algorithm.credited(batch), views, *reference)
    expected, cut = written_out(folder, views, updates, clip, other if coefficient else None, coefficient)
    change = flat(expected) - before
    assert (flat(learner.network) - flat(expected)).norm() <= 1e-3 * change.norm()
    assert cut > 0, "the clip must act for this to compare anything"
    assert metrics["clip/fraction"] == pytest.approx(cut) and metrics["ratio/max"] > 1 + clip


def test_a_ratio_starts_at_one_in_every_batch(folder):
    """The first update of a batch is compared with the weights of now, not with those of an earlier batch."""
    learner, batch = learner_of(folder, AlgorithmConfig(views={"name": "elbo"}, updates=2)), graded_batch()
    learner.step(learner.algorithm.credited(batch))
    learner.begin(AlgorithmConfig(views={"name": "elbo"}, updates=1), OPTIMIZER, 100)
    assert learner.step(learner.algorithm.credited(batch))["ratio/max"] == 1.0


def test_views_that_are_made_here_are_those_that_are_handed_in(folder):
    algorithm, batch = AlgorithmConfig(views={"name": "elbo"}, updates=2), graded_batch()
    one, other = learner_of(folder, algorithm), learner_of(folder, algorithm)
    one.step(one.algorithm.credited(batch))
    other.step(other.algorithm.credited(batch), other.make_views(other.algorithm.credited(batch)))
    assert torch.equal(flat(one.network), flat(other.network))


def test_an_estimate_of_the_reference_serves_as_its_log_probs(folder):
    algorithm = AlgorithmConfig(views={"name": "elbo"}, kl=KLConfig(coefficient=0.1), reference="frozen")
    batch, found = graded_batch(), []
    for ready in (False, True):
        learner = learner_of(folder, algorithm)
        (views,) = learner.make_views(learner.algorithm.credited(batch))
        log_prob = token_log_probs(learner.network, views, 10**9) - 0.5
        value = elbo(log_prob, views)
        estimate = LogLikelihood(value, "lower", "sequence", views.scored_length, draws=value[:, None].expand(-1, views.num_draws))
        found.append(
            (learner.step(learner.algorithm.credited(batch), [views], {0: estimate if ready else log_prob})["kl"], flat(learner.network))
        )
    assert found[0][0] == pytest.approx(found[1][0]) and found[0][0] > 0
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_norm_and_learning_rate_of_a_step_are_told(folder):
    """The mean norm over its updates, and the rate of the last of them; the schedule counts updates."""
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="linear", final_fraction=0.0, max_grad_norm=1e9)
    algorithm, batch = AlgorithmConfig(views={"name": "elbo"}, updates=3), graded_batch()
    learner = Learner(str(folder), LearnerConfig(backend="torch"), run_seed=3)
    learner.begin(algorithm, optimizer, total_updates=6)
    norms, step = [], learner.backend.step

    def noted() -> tuple[float, float]:
        norm, rate = step()
        norms.append(norm)
        return norm, rate

    learner.backend.step = noted
    told = [learner.step(learner.algorithm.credited(batch)) for _ in range(2)]
    assert [one["learning_rate"] for one in told] == pytest.approx([0.01 * (1 - 2 / 6), 0.01 * (1 - 5 / 6)])
    assert [one["grad_norm"] for one in told] == pytest.approx([np.mean(norms[:3]), np.mean(norms[3:])])
    assert len(set(norms)) == 6


def test_what_is_saved_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    """Moments and the place in the schedule included."""
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="cosine", final_fraction=0.0)
    algorithm, batch = AlgorithmConfig(views={"name": "elbo"}, updates=2), graded_batch()
    learner = learner_of(folder, algorithm, optimizer)
    learner.step(learner.algorithm.credited(batch))
    learner.save(str(tmp_path))
    after = learner.step(learner.algorithm.credited(batch)), flat(learner.network)
    again = learner_of(folder, algorithm, optimizer)
    again.load(str(tmp_path))
    assert torch.equal(flat(load_network(tmp_path / "hf")), flat(again.network))
    assert again.step(again.algorithm.credited(batch)) == after[0] and torch.equal(flat(again.network), after[1])
