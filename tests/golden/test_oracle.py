"""The production paths against the executable specification, and the specification against the published formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhub import oracle
from rlhub.algorithm.batching import MicroBatch, make_batch, micro_batches
from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.scoring import micro_batch_log_probs, token_log_probs
from rlhub.config.schema import AlgorithmConfig, KLConfig, SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.models.llada import Config, LLaDA
from rlhub.networks.layout import pack_layout
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.types import Request, RewardResult, Rollout

MASK, EOS, VOCAB, LENGTH = 0, 1, 14, 12
PROFILE = Profile(mask_id=MASK, eos_id=EOS, stop_ids=(EOS,), pad_id=EOS, lora_targets="")
NEAR_TIE = 1e-5  # nats; below it two exact fp32 implementations may decide differently
NOISE = Noise(run_seed=11)


@cache
def network(seed: int = 3, **shape) -> LLaDA:
    """A random network, peaked enough that its choices differ from place to place; EOS appears in half of its canvases."""
    config = Config(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=EOS)
    shape = {"init_std": 0.2} | shape
    return LLaDA(replace(config, **shape)).initialize(torch.Generator().manual_seed(seed)).eval()


@cache
def requests() -> tuple[Request, ...]:
    """Eight prompts of 1 to 9 tokens with unrelated uids."""
    random = np.random.default_rng(3)
    prompts = [random.integers(2, VOCAB, size).astype(np.int32) for size in (1, 4, 4, 9, 2, 6, 3, 9)]
    return tuple(Request(uid=1000 * index + 7, group_uid=index // 2, prompt_ids=prompt) for index, prompt in enumerate(prompts))


def sampler(name="low_confidence", steps=LENGTH, block_length=LENGTH, temperature=1.0, **rest) -> SamplerConfig:
    return SamplerConfig(name, LENGTH, steps, block_length, temperature, **rest)


@cache
def specified(name: str, steps: int, block_length: int, temperature: float, early_stop: str, eos: str) -> tuple[tuple[Rollout, float], ...]:
    config = sampler(name, steps, block_length, temperature, early_stop=early_stop, eos=eos)
    return tuple(oracle.generate(network(), request, config, NOISE) for request in requests())


def assert_same(produced: Rollout, expected: Rollout) -> None:
    assert produced.uid == expected.uid and produced.sampler == expected.sampler
    np.testing.assert_array_equal(produced.completion_ids, expected.completion_ids)
    np.testing.assert_array_equal(produced.unmask_step, expected.unmask_step)
    assert (produced.length, produced.num_forwards) == (expected.length, expected.num_forwards)
    np.testing.assert_allclose(produced.logp_model, expected.logp_model, atol=2e-5)
    np.testing.assert_allclose(produced.logp_sample, expected.logp_sample, atol=2e-5 / min(1.0, produced.sampler["temperature"] or 1.0))


# ---------------------------------------------------------------------------------------------------------------- generation

SCHEDULES = [(12, 12), (6, 4), (5, 12), (12, 1)]  # steps, block length
GRID = [
    *itertools.product(["low_confidence", "random", "left_to_right"], SCHEDULES, [0.0, 0.7, 1.0]),
    ("low_confidence", (4, 6), 0.05),
    ("low_confidence", (4, 6), 3.0),
]
SHORT_GRID = list(itertools.product(["low_confidence", "random", "left_to_right"], SCHEDULES[1:2], [0.0, 1.0]))
STOPS = list(itertools.product(["fill_eos", "off"], ["allow", "last", "never"]))


@pytest.mark.parametrize(("early_stop", "eos"), STOPS)
def test_engine_equals_oracle(early_stop, eos):
    """Token-identical over samplers, schedules and temperatures, except where the oracle says that a choice hung on rounding."""
    near_ties, compared = [], 0
    for name, schedule, temperature in GRID if (early_stop, eos) == STOPS[0] else SHORT_GRID:
        expected = specified(name, *schedule, temperature, early_stop, eos)
        produced = Engine(network()).generate(requests(), settings_of(expected), NOISE)
        for rollout, (wanted, margin) in zip(produced, expected, strict=True):
            if margin < NEAR_TIE:
                near_ties.append((name, schedule, temperature, wanted.uid, margin))
                continue
            assert_same(rollout, wanted)
            compared += 1
    print(f"{len(near_ties)} of {compared + len(near_ties)} rollouts hold a near tie: {near_ties}")
    assert len(near_ties) <= 0.02 * compared


def settings_of(expected: tuple[tuple[Rollout, float], ...]) -> SamplerConfig:
    return SamplerConfig(**expected[0][0].sampler)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    order=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    max_rows=st.integers(1, 8),
    case=st.sampled_from(SHORT_GRID),
    stop=st.sampled_from(STOPS),
)
def test_a_rollout_does_not_depend_on_its_batch(order, max_rows, case, stop):
    name, schedule, temperature = case
    expected = specified(name, *schedule, temperature, *stop)
    produced = Engine(network(), max_rows=max_rows).generate([requests()[row] for row in order], settings_of(expected), NOISE)
    for row, rollout in zip(order, produced, strict=True):
        wanted, margin = expected[row]
        if margin >= NEAR_TIE:
            assert_same(rollout, wanted)


def published_generate(prompt: list[int], steps: int, block_length: int, temperature: float, uid: int) -> np.ndarray:
    """LLaDA's sampling procedure as its paper and code describe it, with the draw as argmax of exp(logit) / E^T.

    The one departure: the mask token cannot be predicted.
    """
    x = np.array(prompt + [MASK] * LENGTH)
    start = len(prompt)
    num_blocks = LENGTH // block_length
    steps_per_block = steps // num_blocks
    for block in range(num_blocks):
        end = start + (block + 1) * block_length
        masks_in_block = int((x[end - block_length : end] == MASK).sum())
        num_transfer = [masks_in_block // steps_per_block] * steps_per_block
        for i in range(masks_in_block % steps_per_block):
            num_transfer[i] += 1
        for i in range(steps_per_block):
            with torch.no_grad():
                logits = oracle.forward(network(), x).double().numpy()
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            logits[:, MASK] = -np.inf
            noised = np.exp(logits)
            if temperature > 0:
                for position in range(LENGTH):
                    u = NOISE.uniform("token", VOCAB, uid=uid, step=block * steps_per_block + i, position=position)
                    noised[start + position] /= (-np.log1p(-u)) ** temperature
            x0 = noised.argmax(1)
            confidence = p[np.arange(len(x)), x0]
            confidence[x != MASK] = -np.inf
            confidence[end:] = -np.inf
            top = np.argsort(-confidence, kind="stable")[: num_transfer[i]]
            x[top] = x0[top]
    return x[start:]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize(("steps", "block_length"), [(12, 12), (6, 4), (5, 12), (12, 3)])
def test_low_confidence_is_the_published_procedure(steps, block_length, temperature):
    config = sampler("low_confidence", steps, block_length, temperature, early_stop="off")
    produced = Engine(network()).generate(requests(), config, NOISE)
    for request, rollout in zip(requests(), produced, strict=True):
        specified_rollout, margin = oracle.generate(network(), request, config, NOISE)
        published = published_generate(request.prompt_ids.tolist(), steps, block_length, temperature, request.uid)
        np.testing.assert_array_equal(specified_rollout.completion_ids, published)
        if margin >= NEAR_TIE:
            np.testing.assert_array_equal(rollout.completion_ids, published)


@pytest.mark.parametrize("name", ["low_confidence", "left_to_right"])
def test_ties_go_to_the_lower_position_then_the_lower_token(name):
    """With a zero head every logit is exactly 0."""
    flat = LLaDA(network().config)
    flat.model["transformer"]["ff_out"].weight.data.zero_()
    config = sampler(name, 4, 12, 0.0, early_stop="off")
    expected, margin = oracle.generate(flat, requests()[0], config, NOISE)
    (produced,) = Engine(flat).generate(requests()[:1], config, NOISE)
    assert margin == 0
    assert_same(produced, expected)
    assert expected.completion_ids.tolist() == [EOS] * LENGTH  # the lowest id that is not the mask
    assert expected.unmask_step.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_eos_policies_and_early_stop_bite():
    """The grid above must contain what it claims to test."""
    base = ("low_confidence", 6, 4, 1.0)
    allow = [rollout for rollout, _ in specified(*base, "off", "allow")]
    filled = [rollout for rollout, _ in specified(*base, "fill_eos", "allow")]
    last = [rollout for rollout, _ in specified(*base, "off", "last")]
    never = [rollout for rollout, _ in specified(*base, "off", "never")]
    assert any(EOS in rollout.completion_ids for rollout in allow)
    assert not any(EOS in rollout.completion_ids for rollout in never)
    assert any((a.completion_ids != b.completion_ids).any() for a, b in zip(allow, last, strict=True))
    assert all(rollout.num_forwards == 6 for rollout in allow)
    stopped = [rollout for rollout in filled if rollout.num_forwards < 6]
    assert stopped
    for rollout in stopped:
        tail = rollout.unmask_step < 0
        assert tail.any() and (rollout.completion_ids[tail] == EOS).all() and np.isnan(rollout.logp_model[tail]).all()
    for rollout in allow:
        assert EOS not in rollout.completion_ids[: rollout.length - 1]
        assert rollout.length == LENGTH or rollout.completion_ids[rollout.length - 1] == EOS


def test_too_long_a_prompt_is_refused():
    short = LLaDA(Config(d_model=8, n_layers=1, n_heads=2, mlp_hidden_size=8, vocab_size=VOCAB, max_sequence_length=15))
    with pytest.raises(ValueError, match="prompt of 4 tokens plus a canvas of 12 exceeds the model's context of 15"):
        Engine(short).generate(requests()[:2], sampler(), NOISE)


# ------------------------------------------------------------------------------------------------------------------- the race

LOGITS = np.log([0.5, 0.3, 0.15, 0.0489, 0.001, 1e-4])
CHI_SQUARE_5 = 30.9  # exceeded with probability 1e-5 at five degrees of freedom


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def tempered(temperature: float) -> np.ndarray:
    weights = np.exp(LOGITS / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_exponential_race_draws_from_the_softmax(temperature):
    """A million draws from one stream, a token of probability 1e-4 (and one of 2e-6 at temperature 0.7) among them."""
    uniforms = NOISE.uniform("token", 1_000_000 * len(LOGITS), uid=5).reshape(-1, len(LOGITS))
    tokens = (LOGITS / temperature - np.log(-np.log1p(-uniforms))).argmax(1)
    for row in range(50):
        assert oracle.draw_token(torch.from_numpy(LOGITS), temperature, uniforms[row])[0] == tokens[row]
    assert chi_square(np.bincount(tokens, minlength=len(LOGITS)), tempered(temperature)) < CHI_SQUARE_5


class ConstantModel:
    """Predicts the same everywhere; ids 0 (mask) and 1 (EOS) come first. Counts the rows and positions that it is asked for."""

    mask_id, eos_id, max_length = 0, 1, 1 << 20
    profile = PROFILE

    def __init__(self, logits: np.ndarray = LOGITS) -> None:
        self.logits = torch.tensor([9.0, 9.0, *logits], dtype=torch.float32)  # mask and EOS would win if they were not ruled out
        self.vocab_size = len(self.logits)
        self.rows = self.positions = 0

    def denoise(self, tokens, layout, targets=None, cache=None):
        self.rows += len(layout.lengths)
        return torch.zeros(len(tokens if targets is None else targets), 1)

    def head(self, hidden, target_rows=None):
        count = len(hidden if target_rows is None else target_rows)
        self.positions += count
        return self.logits.expand(count, -1).clone()


def test_engine_draws_from_the_softmax():
    """120 000 positions through the whole engine, each with its own key."""
    config = SamplerConfig("random", 2000, 1, 2000, temperature=0.9, early_stop="off", eos="never")
    uids = range(60)
    rollouts = Engine(ConstantModel()).generate([Request(uid, uid, np.array([2], dtype=np.int32)) for uid in uids], config, NOISE)
    tokens = np.concatenate([rollout.completion_ids for rollout in rollouts]) - 2
    assert tokens.min() >= 0
    assert chi_square(np.bincount(tokens, minlength=len(LOGITS)), tempered(0.9)) < CHI_SQUARE_5
    logp = np.concatenate([rollout.logp_sample for rollout in rollouts])
    np.testing.assert_allclose(logp, np.log(tempered(0.9))[tokens], atol=1e-5)


TAIL = np.array([0.92, *[1e-4] * 800])
DRAWS = 100_000


def engine_draws(logits: np.ndarray) -> np.ndarray:
    config = SamplerConfig("random", 1000, 1, 1000, temperature=1.0, early_stop="off", eos="never")
    made = [Request(uid, uid, np.array([2], dtype=np.int32)) for uid in range(DRAWS // 1000)]
    rollouts = Engine(ConstantModel(logits)).generate(made, config, NOISE)
    return np.concatenate([rollout.completion_ids for rollout in rollouts]) - 2


def low_precision_draws(logits: np.ndarray) -> np.ndarray:
    """The Gumbel trick of several published trainers, whose noise has the model's number format."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.from_numpy(logits).bfloat16()
    parts = [torch.rand(DRAWS // 100, len(logits), dtype=torch.bfloat16, generator=generator) for _ in range(100)]
    return torch.cat([(scores - torch.log(-torch.log(part))).argmax(1) for part in parts]).numpy()


@pytest.mark.parametrize(("draw", "right"), [(engine_draws, True), (low_precision_draws, False)], ids=["engine", "bfloat16"])
def test_the_tail_of_a_law_is_drawn(draw, right):
    """800 tokens of probability 1e-4 beside one of 0.92: total variation at the noise floor, far above it with noise in bfloat16."""

    def total_variation(counts: np.ndarray) -> float:
        return 0.5 * np.abs(counts / DRAWS - TAIL / TAIL.sum()).sum()

    random = np.random.default_rng(0)
    floor = [total_variation(random.multinomial(DRAWS, TAIL / TAIL.sum())) for _ in range(50)]
    distance = total_variation(np.bincount(draw(np.log(TAIL)), minlength=len(TAIL)))
    assert (distance < np.mean(floor) + 5 * np.std(floor)) == right
    assert right or distance > 3 * np.mean(floor)


# ------------------------------------------------------------------------------------------------------------------- network


SHAPES = [{}, {"n_heads": 4, "n_kv_heads": 2}, {"n_kv_heads": 1}, {"weight_tying": True}, {"embedding_size": 24}, {"rope_theta": 100.0}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_network_equals_oracle(shape):
    """Ragged packed rows, all positions and a single one."""
    model = network(1, **shape)
    random = np.random.default_rng(0)
    rows = [random.integers(0, VOCAB, size) for size in (7, 1, 16, 7)]
    expected = torch.cat([oracle.forward(model, row) for row in rows])
    layout = pack_layout([len(row) for row in rows])
    tokens = torch.from_numpy(np.concatenate(rows))
    hidden = model.denoise(tokens, layout)
    logits = model.head(hidden, torch.arange(len(tokens)))
    assert logits.shape == (31, VOCAB) and expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.head(hidden, torch.tensor([9])), expected[9:10], atol=1e-5, rtol=1e-5)
    equal = model.denoise(torch.from_numpy(np.stack([rows[0], rows[3]]).ravel()), pack_layout([7, 7]))
    expected_equal = torch.cat([expected[:7], expected[24:]])
    torch.testing.assert_close(model.head(equal, torch.arange(14)), expected_equal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(9, 9, 9, 9), (5, 11, 8, 1)], ids=["equal", "ragged"])
def test_packing_hardly_matters(sizes):
    """Packed rows equal rows alone but for rounding (bit-equal for one length and one thread); a gradient changes no bit."""
    random = np.random.default_rng(1)
    rows = [torch.from_numpy(random.integers(0, VOCAB, size)) for size in sizes]

    def logits(*rows: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat(rows)
        return network().head(network().denoise(tokens, pack_layout([len(row) for row in rows])), torch.arange(len(tokens)))

    packed = logits(*rows)
    with torch.no_grad():
        assert torch.equal(packed, logits(*rows))
        alone = torch.cat([logits(row) for row in rows])
    assert (packed - alone).abs().max() <= 5e-6


# ---------------------------------------------------------------------------------------------------------------- likelihoods


def test_exact_elbo_of_two_tokens_by_hand():
    table = {(True, False): [-1.0, 9.0], (False, True): [9.0, -2.0], (True, True): [-3.0, -4.5]}
    elbo = oracle.elbo_exact(lambda masked: torch.tensor(table[tuple(masked.tolist())]), 2)
    assert elbo.item() == pytest.approx((-1.0 - 2.0 - 3.0 - 4.5) / 2)


def test_exact_elbo_of_exact_conditionals_is_the_log_probability():
    """With the conditionals of one joint law every order of filling gives the same sum."""
    length, size = 5, 3
    joint = np.random.default_rng(2).dirichlet(np.ones(size**length)).reshape([size] * length)
    answer = (0, 2, 1, 1, 0)

    def log_prob(masked):
        values = []
        for position in range(length):
            given_here = tuple(slice(None) if masked[other] else answer[other] for other in range(length))
            with_token = tuple(answer[other] if other == position else part for other, part in enumerate(given_here))
            values.append(math.log(joint[with_token].sum() / joint[given_here].sum()))
        return torch.tensor(values, dtype=torch.float64)

    assert oracle.elbo_exact(log_prob, length).item() == pytest.approx(math.log(joint[answer]), abs=1e-12)


def test_coupled_estimate_is_unbiased():
    """Its expectation over l and all masks, term by term, is the exact ELBO; a mask law on {1..L} would not do."""
    length = 5
    weights = torch.randn(length, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def log_prob(masked):
        return -(weights @ torch.from_numpy(~masked).double()).exp()

    expected = torch.zeros((), dtype=torch.float64)
    for count in range(length + 1):
        masks = [np.isin(np.arange(length), chosen) for chosen in itertools.combinations(range(length), count)]
        expected += sum(oracle.elbo_coupled(log_prob, [mask]) for mask in masks) / len(masks) / (length + 1)
    assert expected.item() == pytest.approx(oracle.elbo_exact(log_prob, length).item(), rel=1e-12)


# --------------------------------------------------------------------------------------------------------- algorithm and update


def espo(**changes) -> AlgorithmConfig:
    defaults = {
        "views": {"name": "coupled", "draws": 2},
        "objective": {"name": "sequence_clip", "clip_low": 0.05, "clip_high": 0.03},
        "kl": KLConfig("k2", 0.01, "none"),
        "updates": 2,
        "reference": "frozen",
    }
    return AlgorithmConfig(**(defaults | changes))


@cache
def graded(groups: int = 3, members: int = 4) -> tuple[Rollout, ...]:
    """Rollouts of the network with rewards, one of them a failure of the grader, one group with a single valid member."""
    random = np.random.default_rng(9)
    values = [0, 1, 2, 1, 3, 0, 1, 2, 1, 1, 2, 0]
    made = []
    for group in range(groups):
        prompt = random.integers(2, VOCAB, 3 + group).astype(np.int32)
        made += [Request(group << 12 | member, group, prompt) for member in range(members)]
    rollouts = Engine(network()).generate(made, sampler("random", 6, 6, early_stop="fill_eos"), NOISE)
    failed = {1, 8, 9, 11}
    return tuple(
        rollout.graded(RewardResult(float(values[index]), "timeout" if index in failed else "ok")) for index, rollout in enumerate(rollouts)
    )


def table_log_prob(theta: torch.Tensor, uid: int, completion: np.ndarray, masked: np.ndarray) -> torch.Tensor:
    """[L] made-up float64 log-probs that depend on the sample, on what is visible and on the parameters `theta` [L, L + 1]."""
    visible = torch.from_numpy(~masked).double()
    length = len(masked)
    return -torch.nn.functional.softplus(theta[:length, :length] @ visible + theta[:length, -1] * (1 + uid % 5) + 0.1 * completion[0])


def table_scores(theta: torch.Tensor, views, batch) -> torch.Tensor:
    """The same log-probs `[M]` for packed views."""
    parts = []
    for row in range(views.num_rows):
        sample = int(views.sample[row])
        begin, end = int(views.layout.row_offsets[row]) + int(views.completion_start[row]), int(views.layout.row_offsets[row + 1])
        masked = (views.tokens[begin:end] == MASK).numpy()
        assert (views.tokens[begin:end].numpy()[~masked] == batch.completions[sample][: end - begin][~masked]).all()
        values = table_log_prob(theta, int(batch.uid[sample]), batch.completions[sample], masked)
        parts.append(values[views.score_token[views.score_row == row]])
    return torch.cat(parts)


@pytest.mark.parametrize("kl", [KLConfig("k2", 0.01, "none"), KLConfig("k2", 0.3, "length"), KLConfig()], ids=["k2", "k2/length", "none"])
@pytest.mark.parametrize("scored_length", ["canvas", "response"])
def test_algorithm_equals_the_explicit_formulas(scored_length, kl):
    """Loss and gradient in float64 on a table model, with clipping on both sides and a reference."""
    config = espo(kl=kl, length=scored_length)
    algorithm = Algorithm.compose(config)
    draw = torch.Generator().manual_seed(3)
    theta, old, far = (0.5 * torch.randn(LENGTH, LENGTH + 1, generator=draw, dtype=torch.float64) for _ in range(3))
    theta = (0.3 * old + 0.7 * theta).requires_grad_()
    update = 3
    batch = make_batch(graded(), scored_length=scored_length)
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, NOISE, update, PROFILE)
    log_probs = LogProbs(table_scores(theta, views, batch), table_scores(old, views, batch), table_scores(far, views, batch))
    loss, metrics = algorithm.loss(algorithm.scores(log_probs, views, batch, credit), credit)
    (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
    coefficient, _, _ = algorithm.coefficients(log_probs, views, batch, credit)
    (two_pass,) = torch.autograd.grad((coefficient * log_probs.policy).sum(), theta)

    valid = [rollout for rollout in graded() if rollout.reward.valid]
    advantages = oracle.group_mean([rollout.reward.value for rollout in valid], [rollout.group_uid for rollout in valid])
    lengths = [LENGTH if scored_length == "canvas" else rollout.length for rollout in valid]
    elbos = [
        [
            oracle.elbo_coupled(
                lambda masked, weights=weights, rollout=rollout: table_log_prob(weights, rollout.uid, rollout.completion_ids, masked),
                oracle.coupled_masks(length, 2, NOISE, rollout.uid, update),
            )
            for rollout, length in zip(valid, lengths, strict=True)
        ]
        for weights in (theta, old, far)
    ]
    expected = oracle.espo_loss(elbos[0], [e.item() for e in elbos[1]], [e.item() for e in elbos[2]], lengths, advantages, config)
    (expected_gradient,) = torch.autograd.grad(expected, theta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative(gradient, expected_gradient) < 1e-6
    assert relative(two_pass, expected_gradient) < 1e-6
    assert metrics["clip/low"] > 0 and metrics["clip/high"] > 0, "the case must clip on both sides"
    assert 0.0 in advantages and min(advantages) < 0, "the case must hold a lonely sample and a bad one"
    assert scored_length == "canvas" or len(set(lengths)) > 1


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_update_equals_oracle_step():
    """The network's gradient through packed views and micro-batches against one plain graph, and the weights after AdamW."""
    config = espo()
    algorithm = Algorithm.compose(config)
    policy, twin = (LLaDA(network().config) for _ in range(2))
    for model in (policy, twin):
        model.load_state_dict(network().state_dict())
    old, reference = network(), network(7)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01) for model in (policy, twin)]
    for update in range(2):
        batch = make_batch(graded(), scored_length="canvas")
        credit = algorithm.credit(batch)
        views = algorithm.make_views(batch, credit, NOISE, update, PROFILE)
        proximal = token_log_probs(old, views, 200) if update else None
        log_probs = LogProbs(token_log_probs(policy, views, 200), proximal, token_log_probs(reference, views, 200))
        coefficient, _, metrics = algorithm.coefficients(log_probs, views, batch, credit)
        optimizers[0].zero_grad()
        for run in micro_batches(views, 200):
            scored = micro_batch_log_probs(policy, views, run)
            (scored * coefficient[run.first_score : run.last_score].float()).sum().backward()
        step = oracle.espo_step(twin, optimizers[1], graded(), config, NOISE, update, old if update else None, reference)
        assert metrics["loss"] == pytest.approx(step.loss, rel=2e-6)
        gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
        difference = math.sqrt(sum(float((gradients[name] - step.gradients[name]).norm() ** 2) for name in gradients))
        size = math.sqrt(sum(float(step.gradients[name].norm() ** 2) for name in gradients))
        assert difference < 2e-6 * size
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        assert float(norm) == pytest.approx(step.grad_norm, rel=1e-5)
        optimizers[0].step()
        before = network().state_dict()
        moved = math.sqrt(sum(float((step.weights[name] - before[name]).norm() ** 2) for name in before))
        apart = math.sqrt(sum(float((value - step.weights[name]).norm() ** 2) for name, value in policy.state_dict().items()))
        assert apart < 1e-4 * moved


def test_ratio_is_exactly_one_for_the_behavior_policy():
    """Both when the proximal is the detached policy and when it is evaluated again, without gradient."""
    algorithm = Algorithm.compose(espo())
    batch = make_batch(graded(), scored_length="canvas")
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, NOISE, 1, PROFILE)
    policy = torch.cat([micro_batch_log_probs(network(), views, run) for run in micro_batches(views, 100)])
    again = token_log_probs(network(), views, 100)
    assert policy.requires_grad and torch.equal(policy.detach(), again)
    for proximal in (None, again):
        scores = algorithm.scores(LogProbs(policy, proximal, again), views, batch, credit)
        assert torch.equal(scores.policy.value.detach(), scores.proximal.value)
        _, metrics = algorithm.loss(scores, credit)
        assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0 and metrics["kl"] == 0.0


def test_other_algorithms_are_refused_by_the_oracle():
    with pytest.raises(ValueError, match="z_score"):
        oracle.espo_step(network(), None, graded(), espo(advantage={"name": "z_score"}), NOISE)


def test_number_of_forwards():
    """K for a rollout and 2 M rows for one evaluation of its likelihood, less the empty halves."""
    requests = [Request(uid, 0, np.array([3], dtype=np.int32)) for uid in range(6)]
    for name, positions in [("low_confidence", 8 + 6 + 4 + 2), ("random", 8)]:
        stub = ConstantModel()
        rollouts = Engine(stub).generate(requests, SamplerConfig(name, 8, 4, 8, early_stop="off", eos="never"), NOISE)
        assert stub.rows == 6 * 4 == sum(rollout.num_forwards for rollout in rollouts)
        assert stub.positions == 6 * positions, "logits only where the active block is masked, or only for what is committed"
    algorithm = Algorithm.compose(espo(views={"name": "coupled", "draws": 5}))
    batch = make_batch([rollout.graded(RewardResult(1.0)) for rollout in rollouts], scored_length="canvas")
    views = algorithm.make_views(batch, algorithm.credit(batch), NOISE, 0, PROFILE)
    masks = [mask for rollout in rollouts for mask in oracle.coupled_masks(8, 5, NOISE, rollout.uid, 0)]
    empty = sum(bool(mask.all() or not mask.any()) for mask in masks)
    assert empty > 0
    stub.rows = stub.positions = 0
    assert len(token_log_probs(stub, views, 50)) == stub.positions == 6 * 5 * 8, "a pair scores every token once"
    assert stub.rows == 6 * 2 * 5 - empty
    assert MicroBatch(0, stub.rows, 0, stub.positions) == micro_batches(views, 10**6)[0]
