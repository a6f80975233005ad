"""Samples of older weights: corrected, they give the gradient of the newer ones."""

from __future__ import annotations

import itertools
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.off_policy import correction_metrics, correction_weights, weighted_credit
from rlhub.config.schema import AlgorithmConfig
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.parts import part_names
from rlhub.types import Batch, Credit, LogLikelihood, Scores

VOCABULARY, MASK = 5, 5
PROFILE = Profile(mask_id=MASK, eos_id=0, stop_ids=(0,), pad_id=0, lora_targets="")
REWARD = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25], dtype=torch.float64)


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_token(behavior: Tensor) -> Batch:
    """Every one-token completion once, with the log-probs that `behavior` [V] recorded."""
    return Batch(
        uid=np.arange(VOCABULARY, dtype=np.uint64),
        group=np.zeros(VOCABULARY, dtype=np.int64),
        prompts=[np.zeros(1, np.int32)] * VOCABULARY,
        completions=[np.array([token], np.int32) for token in range(VOCABULARY)],
        response_length=np.ones(VOCABULARY, dtype=np.int64),
        scored_length=np.ones(VOCABULARY, dtype=np.int64),
        rewards=REWARD.numpy()[None],
        member=np.arange(VOCABULARY),
        unmask_step=[np.zeros(1, np.int16)] * VOCABULARY,
        logp_model=[np.array([value]) for value in behavior.tolist()],
    )


def algorithm(**keys: object) -> Algorithm:
    parts = {"views": {"name": "prefix"}, "likelihood": {"name": "exact"}, "objective": {"name": "weighted_likelihood"}}
    return Algorithm.compose(AlgorithmConfig(**(parts | {"max_staleness": 1, "behavior": "detach", "correction_cap": 1e9} | keys)))


def expected_gradient(composed: Algorithm, policy: Tensor, behavior: Tensor, proximal: Tensor | None = None) -> Tensor:
    """Of the reward, by the algorithm, with respect to the policy's logits [V], under samples of the behavior, by enumeration.

    Every completion is in the batch once, so each is given its probability as a factor of its advantage.
    """
    policy = policy.clone().requires_grad_()
    log_policy, log_behavior = policy.log_softmax(0), behavior.log_softmax(0)
    batch = one_token(log_behavior)
    credit = Credit(REWARD * log_behavior.exp() * VOCABULARY, torch.ones(VOCABULARY, dtype=torch.bool))
    views = composed.make_views(batch, credit, Noise(0), 0, PROFILE)
    log_probs = LogProbs(log_policy[views.score_target], None if proximal is None else proximal.log_softmax(0)[views.score_target])
    coefficient, _, _ = composed.coefficients(log_probs, views, batch, credit)
    (gradient,) = torch.autograd.grad((log_policy[views.score_target] * coefficient).sum(), policy)
    return -gradient


def on_policy_gradient(policy: Tensor) -> Tensor:
    """Of E[R] under softmax(policy): p (R - E[R])."""
    share = policy.softmax(0)
    return share * (REWARD - share @ REWARD)


@pytest.mark.parametrize("objective", ["weighted_likelihood", "sequence_clip", "token_clip", "policy_gradient"])
def test_the_corrected_gradient_is_the_on_policy_one(objective: str) -> None:
    likelihood = {"name": "exact", "granularity": "sequence" if objective == "sequence_clip" else "token"}
    parts = {"objective": {"name": objective}, "likelihood": likelihood}
    policy, behavior = logits(0, VOCABULARY), logits(1, VOCABULARY)
    wanted = on_policy_gradient(policy)
    torch.testing.assert_close(expected_gradient(algorithm(**parts), policy, behavior), wanted, atol=1e-12, rtol=0)
    for biased in (algorithm(**parts, correction="none"), algorithm(**parts, correction_cap=1.0)):
        assert (expected_gradient(biased, policy, behavior) - wanted).norm() > 0.1 * wanted.norm()


def test_the_cap_holds_a_weight_at_the_cap() -> None:
    policy, behavior = logits(0, VOCABULARY), logits(1, VOCABULARY)
    share, other = policy.softmax(0).numpy(), behavior.softmax(0).numpy()
    weight = np.minimum(1.5, share / other)
    assert 0 < (weight == 1.5).sum() < VOCABULARY, "some are capped, some are not"
    scale = other * weight * REWARD.numpy()
    wanted = scale - share * scale.sum()
    got = expected_gradient(algorithm(correction_cap=1.5), policy, behavior)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-12)


def test_the_weight_lies_between_what_generated_and_what_began_the_batch() -> None:
    """The step from the proximal policy to the one that is trained is the ratio's, which clipping bounds."""
    policy, proximal, behavior = (logits(seed, VOCABULARY) for seed in range(3))
    composed = algorithm(objective={"name": "token_clip", "clip_low": 1e9, "clip_high": 1e9}, behavior="recompute", updates=2)
    got = expected_gradient(composed, policy, behavior, proximal)
    torch.testing.assert_close(got, on_policy_gradient(policy), atol=1e-12, rtol=0)


def test_recorded_ratios_and_fresh_rollouts_need_no_weights() -> None:
    for keys in ({"behavior": "rollout"}, {"correction": "none"}, {"max_staleness": 0}):
        assert not algorithm(**keys).corrects
    assert algorithm().corrects


def estimate(value: Tensor, length: list[int], mask: Tensor | None = None) -> LogLikelihood:
    return LogLikelihood(value, "exact", "sequence" if mask is None else "token", torch.tensor(length), mask=mask)


def test_full_ratios_of_sequences_are_without_bias() -> None:
    """Two tokens of a chain, by enumeration; the division by the length is what the docstring says it is."""
    policy, behavior = ((logits(seed, 3), logits(seed + 10, 3, 3)) for seed in (0, 1))
    pairs = list(itertools.product(range(3), repeat=2))

    def log_prob(chain: tuple[Tensor, Tensor]) -> Tensor:
        first, second = chain[0].log_softmax(0), chain[1].log_softmax(1)
        return torch.stack([first[a] + second[a, b] for a, b in pairs])

    reward = torch.tensor([a - 2.0 * b + a * b for a, b in pairs], dtype=torch.float64)
    new, old = log_prob(policy), log_prob(behavior)
    full = correction_weights(estimate(new, [1] * 9), estimate(old, [1] * 9), cap=1e9)
    torch.testing.assert_close((old.exp() * full) @ reward, new.exp() @ reward)
    divided = correction_weights(estimate(new, [2] * 9), estimate(old, [2] * 9), cap=1e9)
    torch.testing.assert_close(divided, full.sqrt())


def test_tokens_are_summed_where_they_count() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    new = estimate(torch.tensor([[-1.0, -1.0, -50.0], [-3.0, 7.0, 7.0]]), [2, 1], mask)
    old = estimate(torch.tensor([[-2.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]), [2, 1], mask)
    torch.testing.assert_close(correction_weights(new, old, cap=9.0), torch.tensor([0.5, -2.0]).exp())


def test_metrics_say_how_much_was_corrected() -> None:
    metrics = correction_metrics(torch.tensor([0.5, 2.0, 2.0, 1.0]), cap=2.0)
    assert metrics == {"async/correction_mean": 1.375, "async/correction_max": 2.0, "async/correction_capped_share": 0.5}
    assert correction_metrics(torch.ones(0), cap=2.0) == {}


@pytest.mark.parametrize("name", part_names("objectives"))
def test_objectives_scale_with_the_advantage_of_each_sample(name: str) -> None:
    """Which is what a weight changes; the others say that they have none."""
    module = import_module(f"rlhub.objectives.{name}")
    generator = torch.Generator().manual_seed(0)
    by_token = name == "token_clip"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def scored() -> LogLikelihood:
        draws = random(4, 2) - 4
        if by_token:
            return LogLikelihood(random(4, 3), "exact", "token", torch.full((4,), 3), mask=torch.ones(4, 3, dtype=torch.bool))
        return LogLikelihood(draws.mean(1), "lower", "sequence", torch.full((4,), 3), draws=draws)

    scores = Scores(scored(), scored(), scored(), scored())
    credit = Credit(random(4), torch.ones(4, dtype=torch.bool), torch.tensor([1, -1, 1, -1]), torch.tensor([[0, 1], [2, 3]]))

    def loss(weights: list[float]) -> Tensor:
        value, _ = module.loss(scores, weighted_credit(credit, torch.tensor(weights, dtype=torch.float64)), module.Config())
        return value

    whole, without, more = loss([1, 1, 1, 1]), loss([1, 0, 1, 1]), loss([1, 3, 1, 1])
    if getattr(module, "ADVANTAGES", True):
        assert abs(whole - without) > 1e-6
        torch.testing.assert_close(more - without, 3 * (whole - without))
    else:
        torch.testing.assert_close(more, without)
