"""RADD's identities by exact enumeration: four equal losses, each an upper bound of the NLL, and the chain rule in any order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import rlhub
from rlhub.algorithm.batching import sequence_batch
from rlhub.algorithm.scoring import token_log_probs
from rlhub.errors import UserError
from rlhub.inference import Model
from rlhub.likelihoods import exact
from rlhub.models import radd
from rlhub.networks.layout import pack_layout
from rlhub.noise import Noise
from rlhub.oracle.absorbing import any_order, lambda_dce, log_linear, t_dce, t_dse
from rlhub.types import Credit
from rlhub.views import chain as chain_views

LENGTH = 4
ANSWER = [3, 0, 7, 3]
PROMPT = [5, 9]
NODES, WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(8))
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2  # on (0, 1); exact for polynomials up to degree 15


@pytest.fixture(scope="module")
def model() -> Model:
    network = radd.build(radd.Config.from_published(radd.TINY | {"init_std": 0.4}))
    return Model(network.initialize(torch.Generator().manual_seed(0)).eval(), path=None)


@pytest.fixture(scope="module")
def law(model) -> dict[tuple[bool, ...], torch.Tensor]:
    """Mask -> log-probs [L, V] of every position in float64, over the tokens without the mask."""
    laws = {}
    for masked in itertools.product((False, True), repeat=LENGTH):
        row = [model.mask_id if hide else token for hide, token in zip(masked, ANSWER, strict=True)]
        tokens = torch.tensor(PROMPT + row)
        with torch.no_grad():
            logits = model.network.head(model.network.denoise(tokens, pack_layout([len(tokens)])))
        laws[masked] = logits[len(PROMPT) :, :-1].double().log_softmax(-1)
    return laws


def of_masked(law, masked):
    """(log-probs [m, V], targets [m], log-probs of the targets [m]) of the masked positions."""
    hidden = torch.tensor(masked)
    target = torch.tensor(ANSWER)[hidden]
    rows = law[masked][hidden]
    return rows, target, rows.gather(1, target[:, None]).squeeze(1)


T_LOSSES = {  # of the masked tokens, at a time
    "t_dse": lambda rows, target, chosen, sigma, rate: t_dse(rows, target, sigma, rate),
    "t_dce": lambda rows, target, chosen, sigma, rate: t_dce(chosen, sigma, rate),
    "lambda_dce": lambda rows, target, chosen, sigma, rate: lambda_dce(chosen, -torch.expm1(-sigma)),
}


def expectation(law, name: str, sigma: torch.Tensor, rate: torch.Tensor) -> float:
    """Of a loss summed over the masked tokens, when each is masked with probability 1 - exp(-sigma)."""
    level, total = float(-torch.expm1(-sigma)), 0.0
    for masked in itertools.islice(law, 1, None):
        count = sum(masked)
        total += level**count * (1 - level) ** (LENGTH - count) * float(T_LOSSES[name](*of_masked(law, masked), sigma, rate).sum())
    return total


def chain(law, order) -> float:
    """log p of generation in an order."""
    masked, total = [True] * LENGTH, 0.0
    for position in order:
        total += float(law[tuple(masked)][position, ANSWER[position]])
        masked[position] = False
    return total


def losses(law) -> dict[str, float]:
    found = dict.fromkeys((*T_LOSSES, "any_order"), 0.0)
    for node, weight in zip(NODES, WEIGHTS.tolist(), strict=True):
        for name in T_LOSSES:
            found[name] += weight * expectation(law, name, *log_linear(node))
    for masked in itertools.islice(law, 1, None):
        count = sum(masked)
        *_, chosen = of_masked(law, masked)
        share = 1 / (LENGTH * math.comb(LENGTH, count))
        found["any_order"] += share * float(any_order(chosen, LENGTH, torch.tensor(count)).sum())
    return found


def test_the_four_losses_are_equal_and_bound_the_likelihood(model, law):
    found = losses(law)
    orders = [chain(law, order) for order in itertools.permutations(range(LENGTH))]
    mean = -sum(orders) / len(orders)
    for name, value in found.items():
        assert value == pytest.approx(mean, rel=1e-9), name
    nll = -torch.tensor(orders).double().logsumexp(0).item() + math.log(len(orders))
    assert nll < mean - 1e-3 and max(orders) - min(orders) > 0.05, "the orders agree, which would hide a wrong weight"
    assert rlhub.log_likelihood(model, PROMPT, ANSWER, views="exact").value == pytest.approx(-mean, rel=1e-5)


def test_any_schedule_of_noise_gives_the_same_t_loss(law):
    """A cosine schedule: the masked share is 1 - cos(pi t / 2)."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(40))
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, (weights / 2).tolist(), strict=True):
        sigma = -(math.pi / 2 * node).cos().log()
        rate = math.pi / 2 * (math.pi / 2 * node).tan()
        total += weight * expectation(law, "t_dce", sigma, rate)
    assert total == pytest.approx(losses(law)["any_order"], rel=1e-9)


def test_score_entropy_is_cross_entropy_draw_by_draw_and_only_when_normalised(law):
    rows, target, chosen = of_masked(law, (True,) * LENGTH)
    sigma, rate = log_linear(torch.tensor([0.1, 0.4, 0.7, 0.95]).double(), epsilon=1e-3)
    torch.testing.assert_close(t_dse(rows, target, sigma, rate), t_dce(chosen, sigma, rate))
    shifted = rows + 0.1
    assert (t_dse(shifted, target, sigma, rate) - t_dce(chosen + 0.1, sigma, rate)).min() > 0.01


def test_gradients_of_score_and_cross_entropy_agree(law):
    rows, target, _ = of_masked(law, (True,) * LENGTH)
    sigma, rate = log_linear(torch.tensor(0.3).double())
    logits = rows.clone().requires_grad_()
    (entropy,) = torch.autograd.grad(t_dse(logits.log_softmax(-1), target, sigma, rate).sum(), logits)
    picked = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    (cross,) = torch.autograd.grad(t_dce(picked, sigma, rate).sum(), logits)
    torch.testing.assert_close(entropy, cross)


@pytest.mark.parametrize(("order", "permutation"), [("forward", range(LENGTH)), ("backward", range(LENGTH - 1, -1, -1))])
def test_chain_rule_in_a_given_order(model, law, order, permutation):
    estimate = rlhub.log_likelihood(model, PROMPT, ANSWER, views="chain", order=order)
    assert estimate.value == pytest.approx(chain(law, permutation), rel=1e-5) and estimate.standard_error == 0.0


def test_chain_views_with_the_exact_likelihood(model, law):
    """As an algorithm composes them."""
    batch = sequence_batch([PROMPT], [ANSWER], [0])
    credit = Credit(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool))
    views = chain_views.make(batch, credit, chain_views.Config(order="backward"), Noise(0).stream("views"), 0, model.network.profile)
    log_prob = token_log_probs(model.network, views, 10**6)
    estimate = exact.estimate(log_prob.double(), views, credit, exact.Config(granularity="sequence"))
    assert estimate.kind == "exact" and estimate.value.item() == pytest.approx(chain(law, range(LENGTH - 1, -1, -1)), rel=1e-5)
    assert views.num_rows == LENGTH == chain_views.rows_per_sample(chain_views.Config(), LENGTH)


def test_random_orders_are_permutations_whose_mean_is_the_elbo(model, law):
    every = [chain(law, order) for order in itertools.permutations(range(LENGTH))]
    found = [rlhub.log_likelihood(model, PROMPT, ANSWER, views="chain", order="random", seed=seed).value for seed in range(60)]
    assert all(min(abs(value - one) for one in every) < 1e-4 for value in found) and len({round(value, 3) for value in found}) > 10
    assert np.mean(found) == pytest.approx(np.mean(every), abs=4 * np.std(every) / 60**0.5)


def test_the_chain_rule_sums_to_one_over_all_answers(model):
    """Forward, over all answers of two tokens; the law of a fixed order is normalised."""
    probabilities = [
        math.exp(rlhub.log_likelihood(model, PROMPT, list(answer), views="chain", order="backward").value)
        for answer in itertools.product(range(15), repeat=2)
    ]
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)


def test_an_unknown_order_is_refused(model):
    with pytest.raises(UserError, match="order must be one of forward, backward, random, got 'sideways'"):
        rlhub.log_likelihood(model, PROMPT, ANSWER, views="chain", order="sideways")
