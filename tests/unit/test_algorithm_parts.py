"""Advantages and objectives by hand: numbers, edges and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhub.advantages import best_worst, constant, softmax, step_difference, z_score
from rlhub.objectives import dpo, linear_bound, policy_gradient, self_normalized, token_clip, weighted_likelihood
from rlhub.types import Batch, Credit, LogLikelihood, Scores

NAN = math.nan


def make_batch(rewards) -> Batch:
    rewards = np.asarray(rewards, dtype=float)
    prompts, members = rewards.shape
    size = prompts * members
    return Batch(
        uid=np.arange(size, dtype=np.uint64),
        group=np.repeat(np.arange(prompts), members),
        prompts=[],
        completions=[],
        response_length=np.full(size, 2),
        scored_length=np.full(size, 2),
        rewards=rewards,
        member=np.tile(np.arange(members), prompts),
    )


def assign(module, rewards, **options):
    outcome = np.asarray(rewards, dtype=float)
    return module.assign(outcome, make_batch(outcome if outcome.ndim == 2 else outcome[:, :, -1]), module.Config(**options))


def credit_of(advantages, valid=None, pairs=None) -> Credit:
    advantages = torch.as_tensor(advantages, dtype=torch.float64)
    valid = torch.ones(len(advantages), dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return Credit(advantages, valid, pairs=None if pairs is None else torch.as_tensor(pairs))


def sequence(draws, length) -> LogLikelihood:
    draws = torch.as_tensor(draws, dtype=torch.float64)
    return LogLikelihood(draws.mean(1), "lower", "sequence", torch.as_tensor(length), draws=draws)


# ---------------------------------------------------------------------------------------------------------------- advantages


def test_softmax_weights_are_signed_and_sum_to_zero():
    credit = assign(softmax, [[1.0, 0.0, NAN], [2.0, 2.0, 2.0], [0.0, NAN, NAN]], psi=2.0)
    up, down = math.exp(2.0) / (math.exp(2.0) + 1), 1 / (math.exp(2.0) + 1)
    expected = [2 * (up - down), 2 * (down - up), 0, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(credit.advantages, torch.tensor(expected, dtype=torch.float64))
    assert credit.valid.tolist() == [True, True, False, True, True, True, True, False, False]
    shifted = assign(softmax, [[1001.0, 1000.0, NAN]], psi=2.0).advantages
    torch.testing.assert_close(shifted, credit.advantages[:3])


def test_best_and_worst_make_a_pair_where_rewards_differ():
    credit = assign(best_worst, [[0.0, 3.0, 3.0, -1.0], [NAN, 1.0, NAN, 0.5], [2.0, 2.0, 2.0, 2.0], [NAN, NAN, NAN, 1.0]])
    assert credit.pairs.tolist() == [[1, 3], [5, 7]]
    assert credit.labels.nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert credit.labels[[1, 3, 5, 7]].tolist() == [1, -1, 1, -1] == credit.advantages[[1, 3, 5, 7]].tolist()
    assert assign(best_worst, [[0.0, 0.4]], margin=0.5).pairs.shape == (0, 2)


def test_step_difference_by_hand():
    rewards = np.array([[[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, NAN, 1.0]]])
    credit = assign(step_difference, rewards, epsilon=0.0)
    gains = np.array([[0.0, 1.0, -0.5], [1.0, -1.0, 1.0], [0.0, 0.0, 1.0]])
    futures = np.array([[0.75, 0.5, 0.5], [0.5, 1.0, 1.0], [0.5, 1.0, 1.0]])
    raw = gains + futures
    expected = (raw - raw.mean(0)) / raw.std(0, ddof=1)
    torch.testing.assert_close(credit.advantages[:3], torch.from_numpy(expected))
    assert (credit.advantages[3] == 0).all()
    with pytest.raises(ValueError, match=r"\[P, G, S\]"):
        assign(step_difference, [[1.0, 0.0]])


def test_standard_scores_and_constants():
    values = assign(z_score, [[1.0, 3.0, NAN]], epsilon=0.0).advantages
    torch.testing.assert_close(values, torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0], dtype=torch.float64))
    credit = assign(constant, [[0.0, NAN], [5.0, 5.0]])
    assert credit.advantages.tolist() == [1, 0, 1, 1] and credit.valid.tolist() == [True, False, True, True]


# ---------------------------------------------------------------------------------------------------------------- objectives


def test_policy_gradient_weighs_tokens_or_samples():
    scores = Scores(sequence([[-4.0], [-9.0], [-100.0]], [2, 3, 5]))
    credit = credit_of([1.0, -2.0, 0.0], valid=[True, True, False])
    assert policy_gradient.loss(scores, credit, policy_gradient.Config())[0].item() == pytest.approx(-(-4 + 18) / 5)
    by_sample = policy_gradient.loss(scores, credit, policy_gradient.Config(normalize="sample"))[0].item()
    assert by_sample == pytest.approx(-(-2 + 6) / 2) == weighted_likelihood.loss(scores, credit, weighted_likelihood.Config())[0].item()
    with pytest.raises(ValueError, match="normalize"):
        policy_gradient.loss(scores, credit, policy_gradient.Config(normalize="token"))


def test_linear_bound_is_below_the_ratio_and_touches_it():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, 0.0, -3.0], dtype=torch.float64)
    credit, length = credit_of(advantages), [4] * 6
    for shift, slack in ((0.0, 0.0), (1.0, 1e-3)):
        new = (old + shift * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()
        scores = Scores(sequence(new, length), proximal=sequence(old, length))
        loss, metrics = linear_bound.loss(scores, credit, linear_bound.Config())
        exact = -(advantages * ((scores.policy.value - scores.proximal.value) / 4).exp()).mean()
        assert loss.item() >= exact.item() + slack - 1e-12
        if shift == 0:
            gradients = [torch.autograd.grad(value, new, retain_graph=True)[0] for value in (loss, exact)]
            torch.testing.assert_close(*gradients)
            assert metrics["ratio/mean"] == 1.0


def test_linear_bound_has_no_gradient_of_an_overflow():
    draws = torch.tensor([[4000.0, 0.0]], dtype=torch.float64, requires_grad=True)
    scores = Scores(sequence(draws, [1]), proximal=sequence([[0.0, 0.0]], [1]))
    linear_bound.loss(scores, credit_of([1.0]), linear_bound.Config())[0].backward()
    assert draws.grad.tolist() == [[-0.5, -0.5]]


def test_self_normalized_shares_are_clipped_and_sum_to_one():
    policy, proximal = sequence([[2 * math.log(20.0)], [0.0], [2 * math.log(0.5)], [8.0]], [2] * 4), sequence([[0.0]] * 4, [2] * 4)
    value = policy.value.clone().requires_grad_()
    scores = Scores(LogLikelihood(value, "lower", "sequence", policy.scored_length), proximal=proximal)
    credit = credit_of([1.0, -1.0, 2.0, 1.0], valid=[True, True, True, False])
    loss, metrics = self_normalized.loss(scores, credit, self_normalized.Config(clip_high=5.0))
    loss.backward()
    share = torch.tensor([5.0, 1.0, 0.5, 0.0], dtype=torch.float64) / 6.5
    torch.testing.assert_close(value.grad, -share * credit.advantages / 2)
    assert metrics["ratio/effective_samples"] == pytest.approx(6.5**2 / (25 + 1 + 0.25))


def test_dpo_by_hand():
    value = torch.tensor([-3.0, -5.0, -1.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(
        LogLikelihood(value, "lower", "sequence", torch.tensor([4, 4, 4])), reference=sequence([[-3.5], [-4.0], [-1.0]], [4, 4, 4])
    )
    margin = 0.2 * (0.5 + 1.0)
    loss, metrics = dpo.loss(scores, credit_of([1, -1, 0], pairs=[[0, 1]]), dpo.Config(beta=0.2))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin))) and metrics["dpo/margin"] == pytest.approx(margin)
    loss.backward()
    slope = 0.2 / (1 + math.exp(margin))
    torch.testing.assert_close(value.grad, torch.tensor([-slope, slope, 0.0], dtype=torch.float64))
    swapped = dpo.loss(scores, credit_of([-1, 1, 0], pairs=[[1, 0]]), dpo.Config(beta=0.2))[0]
    smooth = dpo.loss(scores, credit_of([1, -1, 0], pairs=[[0, 1]]), dpo.Config(beta=0.2, label_smoothing=0.25))[0]
    assert smooth.item() == pytest.approx(0.75 * loss.item() + 0.25 * swapped.item())
    same = Scores(scores.policy, reference=scores.policy)
    assert dpo.loss(same, credit_of([1, -1, 0], pairs=[[0, 1]]), dpo.Config())[0].item() == pytest.approx(math.log(2))
    empty, metrics = dpo.loss(scores, credit_of([0, 0, 0], pairs=np.zeros((0, 2), dtype=np.int64)), dpo.Config())
    assert empty.item() == 0 and metrics == {"pairs": 0.0} and torch.autograd.grad(empty, value)[0].abs().sum() == 0


def test_token_clip_takes_advantages_per_sample_token_or_step():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    policy = torch.tensor([[0.1, -0.1, 9.0], [0.0, 0.5, -0.4]], dtype=torch.float64)
    for granularity in ("token", "step"):
        likelihood = LogLikelihood(policy, "exact", granularity, mask.sum(1), mask=mask)
        scores = Scores(likelihood, proximal=LogLikelihood(torch.zeros_like(policy), "exact", granularity, mask.sum(1), mask=mask))
        whole = token_clip.loss(scores, credit_of([1.0, -1.0]), token_clip.Config())[0].item()
        ratio = policy.exp()
        surrogate = [
            torch.minimum(ratio[0, :2], ratio[0, :2].clamp(0.8, 1.2)).mean(),
            torch.minimum(-ratio[1], -ratio[1].clamp(0.8, 1.2)).mean(),
        ]
        assert whole == pytest.approx(-sum(surrogate).item() / 2)
        spread = token_clip.loss(scores, credit_of([[1.0] * 3, [-1.0] * 3]), token_clip.Config())[0].item()
        assert spread == pytest.approx(whole)
        with pytest.raises(ValueError, match=f"do not fit a {granularity} likelihood"):
            token_clip.loss(scores, credit_of(np.ones((2, 5))), token_clip.Config())
