"""Health statistics against values worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.health import health_metrics, rollout_metrics, staleness, staleness_metrics
from rlhub.config.schema import AlgorithmConfig
from rlhub.types import NEVER, Batch, Credit, LogLikelihood, RewardResult, Rollout, Scores

LENGTH = torch.tensor([4, 4, 4, 4])


def estimate(draws: list[list[float]]) -> LogLikelihood:
    values = torch.tensor(draws, dtype=torch.float64)
    return LogLikelihood(values.mean(1), "lower", "sequence", LENGTH, draws=values)


def batch_of(rewards: list[list[float]]) -> Batch:
    matrix = np.array(rewards)
    groups, members = np.indices(matrix.shape)
    size = matrix.size
    return Batch(
        uid=np.arange(size, dtype=np.uint64),
        group=groups.ravel(),
        prompts=[np.zeros(1, dtype=np.int32)] * size,
        completions=[np.zeros(4, dtype=np.int32)] * size,
        response_length=np.full(size, 4),
        scored_length=np.full(size, 4),
        rewards=matrix,
        member=members.ravel(),
    )


def test_standard_error_ess_and_flips_are_those_of_the_formulas():
    algorithm = Algorithm.compose(AlgorithmConfig(objective={"name": "sequence_clip", "clip_low": 0.2, "clip_high": 0.2}))
    batch = batch_of([[1.0, 0.0], [0.5, 0.5]])
    credit = algorithm.credit(batch)
    proximal = estimate([[-8.0, -8.0]] * 4)
    # Mean log ratios per token: 0.25 (cut: ratio 1.28 with A > 0), 0, 0, 0; by single draws the first is 0.0 and 0.5.
    policy = estimate([[-8.0, -6.0], [-8.0, -8.0], [-8.0, -8.0], [-8.0, -8.0]])
    metrics = health_metrics(algorithm, Scores(policy, proximal), credit, batch)
    assert metrics["elbo/standard_error"] == pytest.approx((2**0.5 / 2**0.5) / 4)
    # Only the first group has signal: of its 2 x 2 decisions by single draws one differs (first sample, first draw).
    assert metrics["clip/flip_share"] == pytest.approx(1 / 4)
    weights = np.exp([0.25, 0, 0, 0])
    assert metrics["ess"] == pytest.approx(weights.sum() ** 2 / (4 * (weights**2).sum()))
    assert metrics["group/no_signal_share"] == 0.5
    assert metrics["elbo/per_token"] == pytest.approx((-7 / 4 - 2 * 3) / 4)


def test_one_draw_has_no_error_bar():
    algorithm = Algorithm.compose(AlgorithmConfig())
    batch = batch_of([[1.0, 0.0], [0.5, 0.5]])
    single = estimate([[-8.0]] * 4)
    metrics = health_metrics(algorithm, Scores(single, single), algorithm.credit(batch), batch)
    assert "elbo/standard_error" not in metrics and "clip/flip_share" not in metrics


def test_invalid_samples_count_in_no_mean():
    algorithm = Algorithm.compose(AlgorithmConfig())
    batch = batch_of([[1.0, 0.0], [np.nan, 0.5]])
    policy = estimate([[-8.0, -8.0], [-8.0, -8.0], [-800.0, -900.0], [-8.0, -8.0]])
    credit: Credit = algorithm.credit(batch)
    metrics = health_metrics(algorithm, Scores(policy, policy), credit, batch)
    assert metrics["elbo/per_token"] == pytest.approx(-2.0)
    assert metrics["group/no_signal_share"] == 0.5  # one valid member is no group


def rollout(completion: list[int], length: int, reward: RewardResult) -> Rollout:
    return Rollout(
        uid=0,
        group_uid=0,
        prompt_ids=np.zeros(1, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        length=length,
        unmask_step=np.full(len(completion), NEVER, dtype=np.int16),
        logp_sample=np.zeros(len(completion), dtype=np.float32),
        logp_model=np.zeros(len(completion), dtype=np.float32),
        policy_version=np.zeros(len(completion), dtype=np.int32),
        num_forwards=8,
        reward=reward,
    )


def test_rollout_metrics_count_floods_early_ends_and_failed_grades():
    eos = 7
    rollouts = [
        rollout([eos] * 8, 1, RewardResult(0.0, "unparsed")),
        rollout([1, eos] + [eos] * 6, 2, RewardResult(1.0)),
        rollout([1] * 8, 8, RewardResult(0.5)),
        rollout([1] * 7 + [eos], 8, RewardResult(float("nan"), "timeout")),
    ]
    metrics = rollout_metrics(rollouts, eos)
    assert metrics["reward/mean"] == pytest.approx(0.5)  # the failed grade is no zero
    assert metrics["reward/invalid_share"] == 0.25
    assert metrics["reward/correct_share"] == 0.25
    assert (metrics["eos/flood_rate"], metrics["eos/early_rate"], metrics["eos/missing_rate"]) == (0.25, 0.5, 0.25)


def test_a_rollout_is_as_old_as_its_oldest_token():
    versions = [[4, 4, 4, 4], [2, 3, 4, 4], [4, 4, 1, 4], [5, 5, 5, 5]]
    grade = RewardResult(0.0)
    rollouts = [replace(rollout([1] * 4, 4, grade), policy_version=np.array(row, dtype=np.int32)) for row in versions]
    assert staleness(rollouts, 5).tolist() == [1, 3, 4, 0]
    metrics = staleness_metrics(rollouts, 5)
    assert metrics == {"async/staleness_mean": 2.0, "async/staleness_max": 4.0, "async/mixed_share": 0.5}
