"""Likelihood estimators against enumeration on models that are small enough for it.

`Table` holds one law per state of the canvas, so every mask and every order can be summed over. `Joint` is the table of the exact
conditionals of one random joint law, for which the ELBO equals log p.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from rlhub.advantages import group_mean, leave_one_out
from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.kl import mean_penalty, penalty
from rlhub.algorithm.scoring import token_log_probs
from rlhub.config.schema import AlgorithmConfig, KLConfig
from rlhub.likelihoods import by_sign, elbo, eubo, exact, mean_field, trajectory
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.objectives import clipped_surrogate, sequence_clip
from rlhub.oracle import elbo_exact
from rlhub.types import NEVER, Batch, Credit, LogLikelihood, Scores
from rlhub.views import block_random, complement_plus_full, count_of, coupled, full_mask, mask_level, prefix, quadrature, time_form
from rlhub.views import elbo as l_form
from rlhub.views import trajectory as replay
from rlhub.views._rows import NoisyRow, build_views

VOCAB, LENGTH = 3, 4
NOISE = Noise(run_seed=3)


class Table(nn.Module):
    """Logits [V + 1 to the power L, L, V] by canvas state; token V is the mask and prompts have one token."""

    def __init__(self, seed: int, length: int = LENGTH, vocab: int = VOCAB, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.length, self.vocab = length, vocab
        logits = scale * torch.randn((vocab + 1) ** length, length, vocab, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(logits)

    def state(self, canvas):
        return (canvas.long() * (self.vocab + 1) ** torch.arange(self.length)).sum(-1)

    def denoise(self, tokens, layout, targets=None):
        hidden = self.logits[self.state(tokens.view(-1, self.length + 1)[:, 1:])]
        hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden], 1).flatten(0, 1)
        return hidden if targets is None else hidden[targets]

    def head(self, hidden, target_rows=None):
        return hidden if target_rows is None else hidden[target_rows]

    def log_prob(self, completion):
        """masked bool [L] -> log-probs [L] of the completion's tokens."""
        tokens = torch.as_tensor(np.asarray(completion), dtype=torch.int64)

        def of(masked):
            canvas = tokens.masked_fill(torch.as_tensor(masked), self.vocab)
            return self.logits[self.state(canvas)].log_softmax(-1)[torch.arange(self.length), tokens]

        return of


class Joint(Table):
    """The exact conditionals of a random joint law over V^L."""

    def __init__(self, seed: int, length: int = LENGTH, vocab: int = VOCAB) -> None:
        super().__init__(seed, length, vocab)
        generator = torch.Generator().manual_seed(seed + 100)
        self.joint = torch.randn((vocab,) * length, generator=generator, dtype=torch.float64).mul(1.5).flatten().softmax(0)
        everything = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        with torch.no_grad():
            for canvas in itertools.product(range(vocab + 1), repeat=length):
                visible = torch.tensor([token == vocab for token in canvas])
                weight = self.joint * ((everything == torch.tensor(canvas)) | visible).all(1)
                for position in range(length):
                    mass = torch.zeros(vocab, dtype=torch.float64).index_add(0, everything[:, position], weight)
                    self.logits[self.state(torch.tensor(canvas)), position] = mass.clamp(min=1e-300).log()

    def log_p(self, completion) -> float:
        return self.joint.view((self.vocab,) * self.length)[tuple(completion)].log().item()


def make_batch(completions, *, scored_length=None, unmask_step=None, block_length: int = 0) -> Batch:
    size = len(completions)
    return Batch(
        uid=np.arange(size, dtype=np.uint64),
        group=np.zeros(size, dtype=np.int64),
        prompts=[np.zeros(1, dtype=np.int32)] * size,
        completions=[np.asarray(completion, dtype=np.int32) for completion in completions],
        response_length=np.full(size, len(completions[0])) if scored_length is None else np.asarray(scored_length),
        scored_length=np.full(size, len(completions[0])) if scored_length is None else np.asarray(scored_length),
        rewards=np.ones((1, size)),
        member=np.arange(size),
        unmask_step=unmask_step,
        block_length=block_length,
    )


def profile_of(vocab: int) -> Profile:
    return Profile(mask_id=vocab, eos_id=0, stop_ids=(0,), pad_id=0, lora_targets="")


PROFILE = profile_of(VOCAB)


def credit_of(advantages) -> Credit:
    advantages = torch.as_tensor(advantages, dtype=torch.float64)
    return Credit(advantages, torch.ones(len(advantages), dtype=torch.bool))


def score(model, views):
    """fp64 [M] with gradient."""
    logits = model.head(model.denoise(views.tokens, views.layout), views.target_rows)
    return logits.log_softmax(-1).gather(1, views.score_target[:, None]).squeeze(1)


def subsets(length: int):
    for size in range(1, length + 1):
        for chosen in itertools.combinations(range(length), size):
            yield np.isin(np.arange(length), chosen)


def every_mask(completion, vocab: int = VOCAB):
    """Views whose mean over draws is the exact expectation over all masks."""
    length = len(completion)
    masks = list(subsets(length))
    weights = [len(masks) / (math.comb(length, int(mask.sum())) * int(mask.sum())) for mask in masks]
    rows = [NoisyRow(0, draw, mask, weight) for draw, (mask, weight) in enumerate(zip(masks, weights, strict=True))]
    return build_views(make_batch([completion]), rows, len(masks), profile_of(vocab))


def order_log_probs(model, completion):
    """[L!, L] log-prob of each position when positions are filled in each order."""
    of, rows = model.log_prob(completion), []
    for order in itertools.permutations(range(model.length)):
        masked, row = np.ones(model.length, dtype=bool), torch.zeros(model.length, dtype=torch.float64)
        for position in order:
            row[position] = of(masked)[position]
            masked[position] = False
        rows.append(row)
    return torch.stack(rows).detach()


def time_integral(model, completion, low: float) -> float:
    """Mean over t in (low, 1) of E[sum of masked log-probs] / t under Bernoulli(t) masks; a polynomial, so the quadrature is exact."""
    of, total = model.log_prob(completion), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(12), strict=True):
        t = low + (1 - low) * (node + 1) / 2
        for mask in subsets(model.length):
            total += weight / 2 * t ** (mask.sum() - 1) * (1 - t) ** (~mask).sum() * of(mask)[torch.from_numpy(mask)].sum().item()
    return total


COMPLETION = [2, 0, 1, 1]

# --------------------------------------------------------------------------------------------------------------- what the ELBO is


def test_four_forms_of_the_elbo_agree():
    model = Table(seed=0)
    expected = elbo_exact(model.log_prob(COMPLETION), LENGTH).item()
    assert order_log_probs(model, COMPLETION).sum(1).mean().item() == pytest.approx(expected, rel=1e-12)
    assert time_integral(model, COMPLETION, low=0.0) == pytest.approx(expected, rel=1e-12)
    views = every_mask(COMPLETION)
    assert elbo.estimate(score(model, views), views, None, elbo.Config()).value.item() == pytest.approx(expected, rel=1e-6)


def test_elbo_of_two_tokens_by_hand():
    views = every_mask([0, 1])
    a, b, c, d = -0.3, -1.1, -0.7, -2.0  # token 0 alone, token 1 alone, both
    value = elbo.estimate(torch.tensor([a, b, c, d], dtype=torch.float64), views, None, elbo.Config()).value
    assert value.item() == pytest.approx((a + b + c + d) / 2, rel=1e-7)


@pytest.mark.parametrize("completion", [COMPLETION, [0, 0, 2, 1]])
def test_exact_conditionals_have_an_elbo_without_gap(completion):
    model = Joint(seed=0)
    views = every_mask(completion)
    lower = elbo.estimate(score(model, views), views, None, elbo.Config())
    assert lower.kind == "lower" and lower.value.item() == pytest.approx(model.log_p(completion), rel=1e-6)
    assert elbo_exact(model.log_prob(completion), LENGTH).item() == pytest.approx(model.log_p(completion), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_enclose_the_log_likelihood(seed):
    """Any table: ELBO <= log of the mixture over orders <= EUBO with beta = L. Exact conditionals: log p <= EUBO for every beta."""
    model, views = Table(seed, scale=2.0), every_mask(COMPLETION)
    log_prob = score(model, views)
    lower = elbo.estimate(log_prob, views, None, elbo.Config()).value.item()
    mixture = (order_log_probs(model, COMPLETION).sum(1).logsumexp(0) - math.log(math.factorial(LENGTH))).item()
    uppers = {beta: eubo.estimate(log_prob, views, None, eubo.Config(beta=beta)) for beta in (1.0, 1.5, 2.0, LENGTH)}
    assert lower <= mixture <= uppers[LENGTH].value.item()
    assert lower <= uppers[1.0].value.item() <= uppers[1.5].value.item() <= uppers[2.0].value.item()
    assert uppers[1.5].kind == "upper"
    joint = Joint(seed, length=3, vocab=2)
    views = every_mask([1, 0, 1], vocab=2)
    for beta in (0.5, 1.0, 1.5):
        assert eubo.estimate(score(joint, views), views, None, eubo.Config(beta=beta)).value.item() >= joint.log_p([1, 0, 1]) - 1e-6


def test_upper_bound_needs_consistency_or_a_large_beta():
    """Two tokens, each certain in one context and impossible in the other: the mixture over orders is 1/2, beta = 1 gives 1/4."""
    views = every_mask([0, 1])
    log_prob = torch.tensor([1.0, 1e-9, 1e-9, 1.0], dtype=torch.float64).log()
    values = [eubo.estimate(log_prob, views, None, eubo.Config(beta=beta)).value.exp().item() for beta in (1.0, 2.0)]
    assert values == [pytest.approx(0.25, rel=1e-6), pytest.approx(0.5, rel=1e-6)]


# ------------------------------------------------------------------------------------------------------ estimators without bias


def block_elbo(model, completion, size: int) -> float:
    """Sum over blocks of the ELBO of a block given the blocks before it, the ones after it masked."""
    total, of = 0.0, model.log_prob(completion)
    for start in range(0, model.length, size):
        inside = np.arange(model.length)[start : start + size]

        def within(masked, inside=inside, start=start):
            state = np.arange(model.length) >= start
            state[inside] = masked
            return of(state)[torch.from_numpy(inside)]

        total += elbo_exact(within, len(inside)).item()
    return total


UNBIASED = {
    "l-form": (l_form, l_form.Config(draws=4)),
    "l-form, stratified": (l_form, l_form.Config(draws=4, levels="stratified")),
    "coupled": (coupled, coupled.Config(draws=4)),
    "coupled, stratified": (coupled, coupled.Config(draws=4, levels="stratified")),
    "t-form": (time_form, time_form.Config(draws=4, epsilon=0.1)),
    "t-form, stratified": (time_form, time_form.Config(draws=4, epsilon=0.1, levels="stratified")),
    "quadrature": (quadrature, quadrature.Config(points=2, draws=2)),  # exact up to L = 4
    "blocks": (block_random, block_random.Config(draws=3, block_length=2, prompt_mask=0.0, score="block")),
}


@pytest.mark.parametrize("case", UNBIASED)
def test_estimators_are_unbiased(case):
    """Samples differ in their noise only, so the standard error over samples holds for stratified draws too."""
    module, config = UNBIASED[case]
    model = Table(seed=1, scale=0.5)
    batch = make_batch([COMPLETION] * 1000)
    views = module.make(batch, credit_of(np.ones(1000)), config, NOISE.stream("views"), 0, PROFILE)
    estimate = elbo.estimate(token_log_probs(model, views, 10**9).double(), views, None, elbo.Config())
    expected = {
        "blocks": block_elbo(model, COMPLETION, 2),
        "t-form": time_integral(model, COMPLETION, low=0.1),
        "t-form, stratified": time_integral(model, COMPLETION, low=0.1),
    }.get(case, elbo_exact(model.log_prob(COMPLETION), LENGTH).item())
    error = (estimate.value.std() / 1000**0.5).item()
    assert abs(estimate.value.mean().item() - expected) < 4 * error
    assert 4 * error < 0.06 * abs(expected)  # L / l in place of (L + 1) / l would be off by 20 %
    # Each draw has the law of the others: no draw of a stratified sample may be tied to one stratum.
    assert (estimate.draws.mean(0) - expected).abs().max() < 4.5 * (estimate.draws.std(0) / 1000**0.5).max()
    tokens = elbo.estimate(token_log_probs(model, views, 10**9).double(), views, None, elbo.Config(granularity="token"))
    torch.testing.assert_close(tokens.value.sum(1), estimate.value)


def test_quadrature_has_a_small_bias_beyond_its_degree():
    model = Table(seed=1, scale=0.5)
    of, total = model.log_prob(COMPLETION), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(1), strict=True):
        t = (node + 1) / 2
        for mask in subsets(LENGTH):
            total += weight / 2 * t ** (mask.sum() - 1) * (1 - t) ** (~mask).sum() * of(mask)[torch.from_numpy(mask)].sum().item()
    views = quadrature.make(make_batch([COMPLETION] * 1000), None, quadrature.Config(points=1), NOISE.stream("views"), 0, PROFILE)
    draws = elbo.estimate(token_log_probs(model, views, 10**9).double(), views, None, elbo.Config()).value
    assert abs(draws.mean().item() - total) < 4 * (draws.std() / 1000**0.5).item()


def test_variance_of_the_uniform_model():
    """l-form: every draw is -L log V. Coupled: variance (L - 1) / 2 (log V)^2, from the two values of a draw and their odds."""
    length, draws = 6, 4000
    batch, log_vocab = make_batch([[0] * length]), math.log(VOCAB)
    views = l_form.make(batch, None, l_form.Config(draws=50), NOISE.stream("views"), 0, PROFILE)
    flat = elbo.estimate(torch.full((len(views.score_row),), -log_vocab, dtype=torch.float64), views, None, elbo.Config()).draws
    torch.testing.assert_close(flat, torch.full_like(flat, -length * log_vocab), rtol=1e-6, atol=0)
    views = coupled.make(batch, None, coupled.Config(draws=draws), NOISE.stream("views"), 0, PROFILE)
    pairs = elbo.estimate(torch.full((len(views.score_row),), -log_vocab, dtype=torch.float64), views, None, elbo.Config()).draws[0]
    high, low = -(length + 1) / 2 * log_vocab, -(length + 1) * log_vocab
    is_high = (pairs - high).abs() < 1e-5
    torch.testing.assert_close(pairs[~is_high], torch.full_like(pairs[~is_high], low), rtol=1e-6, atol=0)
    chance = 2 / (length + 1)  # l = 0 or l = L
    assert abs(is_high.double().mean().item() - chance) < 4 * math.sqrt(chance * (1 - chance) / draws)
    assert (high - low) ** 2 * chance * (1 - chance) == pytest.approx((length - 1) / 2 * log_vocab**2)
    assert pairs.var().item() == pytest.approx((length - 1) / 2 * log_vocab**2, rel=0.1)


# -------------------------------------------------------------------------------------------------------- the masks themselves


@pytest.mark.parametrize("levels", ["independent", "stratified"])
@pytest.mark.parametrize(("length", "low", "num_draws"), [(4, 1, 2), (5, 0, 3), (16, 0, 2), (10, 1, 8), (32, 0, 4)])
def test_mask_counts_are_uniform(levels, length, low, num_draws):
    """Chi-square of each single draw; rounding half to even would miss half of the counts of draw 1 at odd L + 1."""
    size = 3000
    batch, stream = make_batch([[0] * length] * size), NOISE.stream("views")
    counts = np.array(
        [[count_of(mask_level(stream, batch, s, d, num_draws, 0, levels), length, low) for s in range(size)] for d in range(num_draws)]
    )
    choices = length - low + 1
    assert counts.min() >= low and counts.max() <= length
    for row in counts:
        observed = np.bincount(row - low, minlength=choices)
        statistic = ((observed - size / choices) ** 2 / (size / choices)).sum()
        degrees = choices - 1
        assert statistic < degrees + 4.5 * math.sqrt(2 * degrees)


def test_stratified_draws_of_a_sample_fill_the_strata():
    batch, stream = make_batch([[0] * 8] * 20), NOISE.stream("views")
    for sample in range(20):
        assert sorted(count_of(mask_level(stream, batch, sample, draw, 8, 0, "stratified"), 8) for draw in range(8)) == list(range(1, 9))


def test_coupled_halves_partition_the_positions():
    batch = make_batch([COMPLETION] * 200)
    views = coupled.make(batch, None, coupled.Config(draws=2), NOISE.stream("views"), 0, PROFILE)
    draw = views.score_sample * 2 + views.score_draw
    scored = torch.zeros(400, LENGTH).index_put((draw, views.score_token), torch.ones(len(draw)), accumulate=True)
    assert (scored == 1).all()
    rows = torch.bincount(views.sample * 2 + views.draw, minlength=400)
    assert set(rows.tolist()) == {1, 2}  # the empty half of l = 0 and l = L is left out
    sizes = torch.bincount(views.score_row)
    torch.testing.assert_close(views.score_weight, (0.5 * (LENGTH + 1) / sizes[views.score_row]).float())


@pytest.mark.parametrize("case", UNBIASED)
def test_prompt_and_padding_stay_out(case):
    """Prompts are visible, tokens past the scored length are neither shown nor scored."""
    module, config = UNBIASED[case]
    first, second = (make_batch([[2, 0, 1, last]] * 20, scored_length=[3] * 20) for last in (0, 2))
    views, same = (module.make(batch, None, config, NOISE.stream("views"), 0, PROFILE) for batch in (first, second))
    assert torch.equal(views.tokens, same.tokens) and torch.equal(views.score_position, same.score_position)
    assert (views.layout.lengths == 4).all() and (views.tokens.view(-1, 4)[:, 0] == 0).all()
    assert views.score_token.max() == 2


def test_permuting_positions_changes_nothing():
    model, order = Table(seed=2), [2, 0, 3, 1]
    other = Table(seed=2)
    with torch.no_grad():
        for canvas in itertools.product(range(VOCAB + 1), repeat=LENGTH):
            moved = torch.tensor([canvas[position] for position in order])
            other.logits[other.state(moved)] = model.logits[model.state(torch.tensor(canvas))][order]
    moved = [COMPLETION[position] for position in order]
    values = []
    for table, completion in ((model, COMPLETION), (other, moved)):
        views = every_mask(completion)
        values.append([part.estimate(score(table, views), views, None, part.Config()).value.item() for part in (elbo, eubo)])
    assert values[0] == [pytest.approx(value, rel=1e-6) for value in values[1]]


# ----------------------------------------------------------------------------------------------- exact, trajectory, mean field


def test_prefix_views_give_the_exact_log_probability():
    model = Joint(seed=1)
    completions = [COMPLETION, [0, 0, 0, 0], [1, 2, 0, 2]]
    views = prefix.make(make_batch(completions), None, prefix.Config(), NOISE.stream("views"), 0, PROFILE)
    log_prob = score(model, views)
    sequence = exact.estimate(log_prob, views, None, exact.Config(granularity="sequence"))
    tokens = exact.estimate(log_prob, views, None, exact.Config())
    expected = torch.tensor([model.log_p(completion) for completion in completions], dtype=torch.float64)
    torch.testing.assert_close(sequence.value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(tokens.value.sum(1), expected, rtol=1e-12, atol=0)
    assert sequence.kind == tokens.kind == "exact"


def test_trajectory_views_replay_the_rollout():
    """Order 2, 0, 3 and one position that was never filled: each token is scored in the state that its step saw."""
    model = Table(seed=3)
    steps = np.array([1, NEVER, 0, 2], dtype=np.int16)
    batch = make_batch([[2, VOCAB, 1, 1]], unmask_step=[steps])
    views = replay.make(batch, credit_of([1.0]), replay.Config(), NOISE.stream("views"), 0, PROFILE)
    estimate = trajectory.estimate(score(model, views), views, credit_of([1.0]), trajectory.Config())
    of = model.log_prob([2, 0, 1, 1])
    everywhere = np.ones(LENGTH, dtype=bool)
    states = {2: everywhere, 0: everywhere & (np.arange(4) != 2), 3: np.array([False, True, False, True])}
    expected = [of(states[position])[position].item() if position in states else 0.0 for position in range(LENGTH)]
    assert estimate.value[0].tolist() == [pytest.approx(value) for value in expected]
    assert estimate.mask[0].tolist() == [True, False, True, True] and estimate.kind == "exact" and estimate.scored_length.tolist() == [3]
    filled = make_batch([[2, 0, 1, 1]], unmask_step=[steps])  # as when a stopped row is filled with EOS
    same = replay.make(filled, credit_of([1.0]), replay.Config(), NOISE.stream("views"), 0, PROFILE)
    assert torch.equal(same.tokens, views.tokens) and torch.equal(same.score_position, views.score_position)
    by_step = trajectory.estimate(score(model, views), views, credit_of(np.ones((1, 5))), trajectory.Config(granularity="step"))
    assert by_step.value[0].tolist() == [pytest.approx(value) for value in (expected[2], expected[0], expected[3], 0.0, 0.0)]
    assert by_step.mask[0].tolist() == [True, True, True, False, False]
    narrow = trajectory.estimate(score(model, views), views, credit_of([1.0]), trajectory.Config(granularity="step"))
    assert torch.equal(narrow.value, by_step.value[:, :3]), "as wide as the steps that were replayed"


def test_merged_slices_run_from_one_forward_to_one_step_each():
    """One segment is the full mask, as many segments as steps are the steps; `shrink` merges from the front; `top` keeps the largest."""
    model, steps = Table(seed=3), np.array([1, 3, 0, 2], dtype=np.int16)
    batch = make_batch([COMPLETION], unmask_step=[steps])

    def replayed(credit=None, **options):
        views = replay.make(batch, credit, replay.Config(**options), NOISE.stream("views"), 0, PROFILE)
        return views, trajectory.estimate(score(model, views), views, credit_of([1.0]), trajectory.Config(merged=True)).value

    whole = full_mask.make(batch, None, full_mask.Config(prompt_mask=0.0), NOISE.stream("views"), 0, PROFILE)
    marginal = mean_field.estimate(score(model, whole), whole, None, mean_field.Config()).value
    torch.testing.assert_close(replayed(segments=1)[1], marginal)
    torch.testing.assert_close(replayed(segments=4)[1], replayed(shrink=1)[1])
    assert replayed(segments=3)[0].step.tolist() == [0, 2, 3]
    views, _ = replayed(shrink=2)
    assert views.step.tolist() == [0, 2] and views.score_token.tolist() == [0, 2, 1, 3]
    assert views.tokens.view(2, 5)[:, 1:].tolist() == [[3, 3, 3, 3], [2, 3, 1, 3]]
    views, _ = replayed(credit_of([[0.1, -3.0, 0.0, 2.0]]), top=2)
    assert views.step.tolist() == [1, 3]


def test_full_mask_and_complement_average_two_contexts():
    size = 2000
    views = complement_plus_full.make(
        make_batch([COMPLETION] * size), None, complement_plus_full.Config(), NOISE.stream("views"), 0, PROFILE
    )
    token = (views.score_sample, views.score_token)
    assert (torch.zeros(size, LENGTH).index_put(token, torch.tensor(1.0), accumulate=True) == 2).all()  # fully masked, and in its half
    first = torch.searchsorted(views.score_row, torch.arange(views.num_rows))
    weight = views.score_weight[first]
    is_full = torch.diff(views.sample, prepend=torch.tensor([-1])) != 0
    assert (weight[is_full] == 0.5).all()
    share = 0.5 / weight[~is_full]
    assert share.min() >= 0.2 and share.max() <= 0.8
    sample = views.sample[~is_full]
    pairs = torch.bincount(sample, minlength=size) == 2
    both = torch.zeros(size).index_add(0, sample, share)[pairs]
    torch.testing.assert_close(both, torch.ones_like(both))  # t and 1 - t
    total = torch.zeros(size, LENGTH).index_put(token, views.score_weight, accumulate=True).mean(1)
    assert abs(total.mean().item() - 1.5) < 4 * (total.std() / size**0.5).item()


# --------------------------------------------------------------------------------------------------------- EUBO and by sign


def test_tokens_that_no_draw_masked_are_left_to_the_option():
    batch = make_batch([COMPLETION])
    masks = [np.arange(LENGTH) < 2, np.arange(LENGTH) < 1]
    views = build_views(batch, [NoisyRow(0, 0, masks[0], 2.0), NoisyRow(0, 1, masks[1], 4.0)], 2, PROFILE)
    log_prob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    covered = math.log((2 * math.exp(-1.5) + 4 * math.exp(-0.75)) / 2) / 1.5 + math.log(2 * math.exp(-3.0) / 2) / 1.5
    assert eubo.estimate(log_prob, views, None, eubo.Config(beta=1.5)).value.item() == pytest.approx(covered)
    assert eubo.estimate(log_prob, views, None, eubo.Config(beta=1.5, rescale=True)).value.item() == pytest.approx(2 * covered)


def test_upper_bound_survives_tiny_probabilities():
    views = every_mask(COMPLETION)
    log_prob = torch.full((len(views.score_row),), -2000.0, dtype=torch.float64, requires_grad=True)
    value = eubo.estimate(log_prob, views, None, eubo.Config()).value
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    assert value.item() == pytest.approx(-2000.0 * LENGTH) and gradient.sum().item() == pytest.approx(LENGTH, rel=1e-6)


def test_sign_of_the_advantage_picks_the_bound():
    model = Table(seed=4)
    batch = make_batch([COMPLETION] * 3)
    views = coupled.make(batch, None, coupled.Config(draws=2), NOISE.stream("views"), 0, PROFILE)
    log_prob = score(model, views).detach()
    lower = elbo.estimate(log_prob, views, None, elbo.Config()).value
    upper = eubo.estimate(log_prob, views, None, eubo.Config(beta=1.2)).value
    config = by_sign.Config(omega=0.3, beta=1.2, rescale=False)
    value = by_sign.estimate(log_prob, views, credit_of([1.0, 0.0, -2.0]), config).value
    expected = torch.stack([lower[0], 0.7 * lower[1] + 0.3 * upper[1], 0.7 * lower[2] + 0.3 * upper[2]])
    torch.testing.assert_close(value, expected)
    assert ((upper - lower).abs() > 1e-3).all()
    with pytest.raises(ValueError, match="one advantage per sample"):
        by_sign.estimate(log_prob, views, credit_of(np.ones((3, 2))), config)


# ---------------------------------------------------------------------------------------------------------- gradients and values


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "expected"),
    [
        *[(1.0, 1.0, 0.0, 1.0), (1.0, -1.0, 0.0, -1.0), (1.0, 2.0, 0.2, 2.0)],
        *[(1.1, 1.0, 0.0, 0.0), (1.1, -1.0, 0.0, -1.1), (0.9, 1.0, 0.0, 0.9), (0.9, -1.0, 0.0, 0.0)],
        *[(1.1, 1.0, 0.2, 1.1), (0.9, -1.0, 0.2, -0.9), (1.3, 1.0, 0.2, 0.0), (0.7, -1.0, 0.2, 0.0), (1.3, -1.0, 0.2, -1.3)],
    ],
)
def test_clipped_surrogate_gradient(ratio, advantage, clip, expected):
    log_ratio = torch.tensor(math.log(ratio) if ratio != 1 else 0.0, dtype=torch.float64, requires_grad=True)
    clipped_surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), clip, clip).backward()
    assert log_ratio.grad.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_espo_gradient_at_the_old_policy_is_reinforce_of_the_elbo(kl):
    """-A_i / (B L) times the ELBO's weights, draws with l = 0 included; a KL to the policy itself adds nothing."""
    config = AlgorithmConfig(objective={"name": "sequence_clip", "clip_low": 0.0, "clip_high": 0.0}, kl=KLConfig(coefficient=kl))
    algorithm = Algorithm.compose(config)
    batch = make_batch([COMPLETION, [0, 0, 1, 2], [1, 1, 1, 1]] * 4)
    advantages = torch.linspace(-1, 1, 12, dtype=torch.float64)
    views = algorithm.make_views(batch, credit_of(advantages), NOISE, 0, PROFILE)
    rows = torch.bincount(views.sample * 2 + views.draw, minlength=24)
    assert (rows == 1).any()  # l = 0 or l = L occurs
    log_prob = score(Table(seed=5), views).detach()
    log_probs = LogProbs(log_prob, reference=log_prob if kl else None)
    coefficient, scores, metrics = algorithm.coefficients(log_probs, views, batch, credit_of(advantages))
    torch.testing.assert_close(coefficient, -advantages[views.score_sample] / (12 * LENGTH) * views.score_weight.double() / 2)
    assert torch.equal(scores.policy.value, scores.proximal.value)
    assert metrics.get("kl", 0.0) == 0.0


def softmax_pair():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 7, generator=generator, dtype=torch.float64)).unbind()


@pytest.mark.parametrize(("kind", "forward"), [("k1", True), ("k2", True), ("k3", False)])
def test_expected_gradient_of_the_penalties(kind, forward):
    """k1 (with its score term) and k2: KL(policy || other); k3: KL(other || policy)."""
    theta, other = softmax_pair()
    theta = theta.requires_grad_()
    log_policy, log_other = theta.log_softmax(0), other.log_softmax(0)
    estimate = (log_policy.exp().detach() * penalty(kind, log_policy - log_other)).sum()
    (gradient,) = torch.autograd.grad(estimate, theta, retain_graph=True)
    pair = (log_policy, log_other) if forward else (log_other, log_policy)
    divergence = (pair[0].exp() * (pair[0] - pair[1])).sum()
    (expected,) = torch.autograd.grad(divergence, theta)
    torch.testing.assert_close(gradient, expected)


def test_expected_values_of_the_penalties():
    theta, other = softmax_pair()
    log_policy, log_other = theta.log_softmax(0), other.log_softmax(0)
    divergence = (log_policy.exp() * (log_policy - log_other)).sum()
    values = {kind: (log_policy.exp() * penalty(kind, log_policy - log_other)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(values["k1"], divergence)
    torch.testing.assert_close(values["k3"], divergence)
    assert (values["k2"] - divergence).abs() > 1e-3


def test_noise_adds_half_its_variance_to_k2():
    """D + e with e = +-s: the value gains s^2 / 2, the gradient s grad s unless the noise is shared and cancels."""
    spread = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    difference = 1.3
    value = (penalty("k2", difference + spread) + penalty("k2", difference - spread)) / 2
    assert value.item() == pytest.approx(0.5 * difference**2 + 0.4**2 / 2)
    value.backward()
    assert spread.grad.item() == pytest.approx(0.4)


def test_leave_one_out_is_a_stretched_group_mean():
    batch = make_batch([COMPLETION] * 6)
    rewards = np.array([[1.0, 0.0, 0.0, 3.0, 1.0, 0.5]])
    ours = leave_one_out.assign(rewards, batch, leave_one_out.Config()).advantages
    plain = group_mean.assign(rewards, batch, group_mean.Config()).advantages
    torch.testing.assert_close(ours, 6 / 5 * plain)
    assert ours.sum().item() == pytest.approx(0, abs=1e-12)
    for module in (leave_one_out, group_mean):
        assert (module.assign(np.full((1, 6), 2.0), batch, module.Config()).advantages == 0).all()


# ------------------------------------------------------------------------------------------------------------------- ratios


def test_shared_masks_cancel_in_the_difference():
    model, other = Table(seed=6), Table(seed=6)
    with torch.no_grad():
        other.logits += 0.05 * Table(seed=7).logits
    batch = make_batch([COMPLETION] * 400)
    first = coupled.make(batch, None, coupled.Config(draws=1), NOISE.stream("views"), 0, PROFILE)
    second = coupled.make(batch, None, coupled.Config(draws=1), NOISE.stream("views"), 1, PROFILE)

    def value(table, views):
        return elbo.estimate(score(table, views).detach(), views, None, elbo.Config()).value

    shared, independent = value(other, first) - value(model, first), value(other, second) - value(model, first)
    assert (value(model, first) - value(model, first) == 0).all()
    assert independent.var() > 50 * shared.var()
    first_value, other_value = value(model, first), value(other, first)
    covariance = torch.cov(torch.stack([first_value, other_value]))
    torch.testing.assert_close(shared.var(), covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])


def sequence(value, length) -> LogLikelihood:
    value = torch.as_tensor(value, dtype=torch.float64)
    return LogLikelihood(value, "lower", "sequence", torch.as_tensor(length))


def test_length_normalisation():
    """A completion followed by an independent copy of itself: the ratio stays, the plain k2 is four times and the normalised one twice."""
    short = sequence([-4.0, -6.0], [4, 4]), sequence([-4.4, -5.0], [4, 4])
    double = sequence([-8.0, -12.0], [8, 8]), sequence([-8.8, -10.0], [8, 8])
    credit = credit_of([1.0, -0.5])
    losses = [sequence_clip.loss(Scores(*pair), credit, sequence_clip.Config())[0].item() for pair in (short, double)]
    assert losses[0] == pytest.approx(losses[1])
    for normalize, factor in (("none", 4), ("length", 2)):
        penalties = [mean_penalty("k2", normalize, *pair, credit).item() for pair in (short, double)]
        assert penalties[1] == pytest.approx(factor * penalties[0])


def test_ratio_is_biased_by_half_the_variance():
    """E exp(d / L) = exp(E d / L) (1 + v / (2 L^2)) up to third order, over all masks of one l-form draw."""
    model, other = Table(seed=8), Table(seed=8)
    with torch.no_grad():
        other.logits += 0.1 * Table(seed=9).logits
    masks = list(subsets(LENGTH))
    chance = torch.tensor([1 / (LENGTH * math.comb(LENGTH, int(mask.sum()))) for mask in masks], dtype=torch.float64)
    rows = [NoisyRow(0, draw, mask, LENGTH / int(mask.sum())) for draw, mask in enumerate(masks)]
    views = build_views(make_batch([COMPLETION]), rows, len(masks), PROFILE)
    draws = [elbo.estimate(score(table, views).detach(), views, None, elbo.Config()).draws[0] for table in (other, model)]
    delta = (draws[0] - draws[1]) / LENGTH
    mean = (chance * delta).sum()
    variance = (chance * (delta - mean) ** 2).sum()
    third = (chance * (delta - mean).abs() ** 3).sum()
    assert (chance.sum() - 1).abs() < 1e-12 and variance > 0
    assert ((chance * delta.exp()).sum() / mean.exp() - 1 - variance / 2).abs() < third / 6 * delta.abs().max().exp() ** 2


@pytest.mark.parametrize("module", [l_form, coupled, prefix, full_mask])
def test_one_token_is_exact(module):
    """L = 1: each estimator is log p without variance, so ESPO is sequence-level PPO."""
    model = Table(seed=10, length=1)
    batch = make_batch([[0], [1], [2]] * 5)
    options = {"prompt_mask": 0.0} if module is full_mask else {"draws": 3} if module in (l_form, coupled) else {}
    views = module.make(batch, None, module.Config(**options), NOISE.stream("views"), 0, PROFILE)
    value = elbo.estimate(score(model, views).detach(), views, None, elbo.Config()).value
    log_policy = model.logits[model.state(torch.tensor([VOCAB])), 0].log_softmax(-1).detach()
    torch.testing.assert_close(value, log_policy.repeat(5), rtol=1e-6, atol=0)
    old = log_policy.repeat(5) + torch.linspace(-0.5, 0.5, 15, dtype=torch.float64)
    advantages = torch.linspace(1, -1, 15, dtype=torch.float64)
    loss, _ = sequence_clip.loss(Scores(sequence(value, [1] * 15), sequence(old, [1] * 15)), credit_of(advantages), sequence_clip.Config())
    ratio = (log_policy.repeat(5) - old).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
