"""The rollout engine's parts: the race, statistics in slices, who runs through the model and when, caches, traces. Which tokens come out is
compared with the oracle in tests/golden/test_samplers.py."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import rlhub
from rlhub.config.checks import check_sampler
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import SamplerConfig
from rlhub.engines import forward, row_stats
from rlhub.engines.agreement import agreement
from rlhub.engines.row_stats import Law, TokenNoise, streamed_stats
from rlhub.engines.torch_engine import Engine
from rlhub.errors import UserError
from rlhub.inference import Model
from rlhub.models import dream, llada, sdar
from rlhub.noise import Noise, from_lower_bounds
from rlhub.planning.plan import make_plan
from rlhub.types import NEVER, Request

NOISE = Noise(run_seed=4)
VOCAB, MASK, EOS = 16, 0, 1


class Watched:
    """A network that keeps what goes through it: rows and tokens of each call of denoise, positions of each call of head."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.rows, self.tokens, self.positions = network, [], [], []

    def __getattr__(self, name):
        return getattr(self.network, name)

    def denoise(self, tokens, layout, targets=None, cache=None):
        self.rows.append(len(layout.lengths))
        self.tokens.append(len(tokens))
        return self.network.denoise(tokens, layout, targets=targets, cache=cache)

    def head(self, hidden):
        self.positions.append(len(hidden))
        return self.network.head(hidden)


def network(family=llada, scale: float = 8.0) -> torch.nn.Module:
    names = {"mask_token_id": MASK, "eos_token_id": EOS, "vocab_size": VOCAB}
    model = family.build(family.Config.from_published(family.TINY | names)).initialize(torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def requests(lengths=(3, 7, 5, 3, 9, 4)) -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(2, VOCAB, length).astype(np.int32) for length in lengths]
    return [Request(uid=31 * index + 5, group_uid=index, prompt_ids=prompt) for index, prompt in enumerate(prompts)]


def sampler(name="low_confidence", **fields) -> SamplerConfig:
    return SamplerConfig(**({"name": name, "length": 12, "steps": 6, "block_length": 4, "temperature": 1.0, "early_stop": "off"} | fields))


# ------------------------------------------------------------------------------------------------------------------- the draw


def test_bounds_become_the_uniforms():
    bounds = np.empty(4001)
    NOISE.stream("token").lower_bounds(bounds, uid=3, step=2, position=1)
    uniforms = NOISE.uniform("token", 4001, uid=3, step=2, position=1)
    np.testing.assert_array_equal(from_lower_bounds(bounds), uniforms)
    assert (bounds <= uniforms).all() and (uniforms - bounds <= 2**-53).all()


def token_noise(keys) -> TokenNoise:
    return TokenNoise(NOISE.stream("token"), *torch.tensor(keys).unbind(1))


@pytest.mark.parametrize("reach", [16.0, 1.0, 1e-3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_the_short_race_has_the_winner_of_the_full_one(reach, scale):
    """Also where no token is within reach, and the whole race is run."""
    count, vocab_size = 60, 500
    scores = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(0)) * scale
    scores[:, 7] = -torch.inf
    scores -= scores.amax(1, keepdim=True)
    keys = [(100 + row, 3, row % 5) for row in range(count + 2)]
    weights = scores.exp()
    with np.errstate(divide="ignore"):
        times = [-np.log1p(-NOISE.uniform("token", vocab_size, uid=uid, step=step, position=at)) for uid, step, at in keys[2:]]
        expected = [np.argmin(time / np.exp(row.double().numpy())) for time, row in zip(times, scores, strict=True)]
    won = token_noise(keys).race_on_host(scores, weights.clone(), weights.sum(1), first=2, reach=reach)
    assert won.tolist() == expected


@pytest.mark.parametrize("slice_rows", [2, 5, 100])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 3, 1.0), (0.8, 0, 0.7), (1.0, 4, 0.8)]
)
def test_statistics_in_slices_equal_their_formulas(monkeypatch, slice_rows, temperature, top_k, top_p):
    monkeypatch.setitem(row_stats.LOGITS_AT_ONCE, "cpu", slice_rows * VOCAB)
    logits = 2 * torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(2))
    law = Law(temperature, top_k, top_p, banned=(MASK,))
    noise = token_noise([(row, 0, 0) for row in range(11)]) if temperature else None
    needs = ("entropy", "margin", "top_logp", "law_logp", "law_entropy", "law_margin")
    stats = streamed_stats(lambda part: logits[part].clone(), 11, VOCAB, law, noise, needs, logits.device)
    for row in range(11):
        allowed = logits[row].double().numpy().copy()
        allowed[MASK] = -np.inf
        model = softmax(logits[row].double().numpy())
        drawing = softmax(allowed)
        if temperature:
            scaled = allowed / temperature
            if top_k:
                scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
            ranked = np.argsort(-scaled)
            before = np.cumsum(softmax(scaled)[ranked]) - softmax(scaled)[ranked]
            scaled[ranked[before >= top_p]] = -np.inf
            drawing = softmax(scaled)
        token = int(stats["token"][row])
        if temperature:
            race = -np.log1p(-NOISE.uniform("token", VOCAB, uid=row))
            with np.errstate(divide="ignore"):
                assert token == np.argmin(race / drawing)
        else:
            assert token == np.argmax(allowed)
        expected = {
            "logp_model": np.log(model[token]),
            "logp_sample": np.log(drawing[token]) if temperature else 0.0,
            "entropy": entropy(model),
            "margin": -np.diff(np.sort(np.delete(model, MASK))[:-3:-1])[0],
            "top_logp": np.log(np.delete(model, MASK).max()),
            "law_logp": np.log(drawing[token]),
            "law_entropy": entropy(drawing),
            "law_margin": np.sort(drawing)[-1] - np.sort(drawing)[-2],
        }
        for name, value in expected.items():
            assert stats[name][row].item() == pytest.approx(value, abs=2e-6), name


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(law: np.ndarray) -> float:
    return float(-(law[law > 0] * np.log(law[law > 0])).sum())


# ------------------------------------------------------------------------------------------------------------- what is computed


def test_no_more_logits_at_once_than_the_budget(monkeypatch):
    monkeypatch.setitem(row_stats.LOGITS_AT_ONCE, "cpu", 5 * VOCAB)
    watched = Watched(network())
    Engine(watched).generate(requests(), sampler(), NOISE)
    assert max(watched.positions) <= 5 and sum(watched.positions) == 6 * 3 * (4 + 2)


def test_no_more_tokens_in_a_call_than_the_limit(monkeypatch):
    monkeypatch.setitem(forward.TOKENS_AT_ONCE, "cpu", 40)
    whole = Engine(network()).generate(requests(), sampler(), NOISE)
    watched = Watched(network())
    parts = Engine(watched).generate(requests(), sampler(), NOISE)
    assert max(watched.tokens) <= 40
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.completion_ids, b.completion_ids)


def test_a_finished_row_makes_room_at_once():
    """With two places and rows that need different numbers of steps, no place is idle while a request waits."""
    model = network(scale=12.0)
    settings = sampler("threshold", options={"threshold": 0.5}, steps=12, early_stop="fill_eos")
    alone = [rollout.num_forwards for rollout in Engine(model).generate(requests(), settings, NOISE)]
    assert len(set(alone)) > 1
    watched, steps = Watched(model), itertools.count()
    rollouts = Engine(watched, max_rows=2).generate(requests(), settings, NOISE, on_step=lambda: next(steps))
    assert [rollout.num_forwards for rollout in rollouts] == alone
    places = [0, 0]
    for needed in alone:
        places[places.index(min(places))] += needed
    assert next(steps) == max(places) < sum(max(pair) for pair in zip(alone[::2], alone[1::2], strict=True)) + 1
    assert sum(watched.rows) == sum(alone)


def test_a_row_that_commits_nothing_costs_no_forward():
    watched = Watched(network())
    rollouts = Engine(watched).generate(requests(), sampler("ancestral", steps=96, block_length=12), NOISE)
    for rollout in rollouts:
        assert rollout.num_forwards == len(np.unique(rollout.unmask_step)) < 13
    assert sum(watched.rows) == sum(rollout.num_forwards for rollout in rollouts)
    assert sum(watched.positions) == 6 * 12


@pytest.mark.parametrize("interval", [[0.0, 1.0], [0.4, 0.8]])
def test_guidance_costs_a_second_forward_within_its_interval(interval):
    rollouts = Engine(network()).generate(requests(), sampler("left_to_right", steps=12, guidance=1.5, guidance_interval=interval), NOISE)
    guided = sum(interval[0] < masked / 12 <= interval[1] for masked in range(12, 0, -1))
    assert {rollout.num_forwards for rollout in rollouts} == {12 + guided}


# ----------------------------------------------------------------------------------------------------------------------- caches


def test_a_block_causal_model_runs_over_what_is_new():
    """A group's prompt once; then the active block, at its first step with the block before it."""
    watched = Watched(network(sdar))
    prompt = requests([8])[0].prompt_ids
    group = [Request(uid, 0, prompt) for uid in range(3)]
    Engine(watched).generate(group, sampler(), NOISE)
    assert watched.tokens == [8, *[3 * size for size in (4, 4, 8, 4, 8, 4)]]
    watched = Watched(network(sdar))
    Engine(watched).generate(requests([10]), sampler(), NOISE)
    shared = (
        "a prompt that nobody shares goes with the first step; its end lies in the first block, and the last block ends with the canvas"
    )
    assert watched.tokens == [12, 8, 4, 8, 4, 6], shared


def test_late_members_of_a_group_find_its_prompt():
    prompt = requests([9])[0].prompt_ids
    group = [Request(uid, 0, prompt) for uid in range(5)]
    watched = Watched(network(sdar))
    in_turn = Engine(watched, max_rows=2).generate(group, sampler("threshold", options={"threshold": 0.4}), NOISE)
    assert watched.tokens.count(8) >= 1 and watched.tokens[0] == 8 and max(watched.tokens[1:]) <= 16, "the prompt is run once"
    alone = Engine(network(sdar), max_rows=1).generate(group, sampler("threshold", options={"threshold": 0.4}), NOISE)
    for a, b in zip(in_turn, alone, strict=True):
        np.testing.assert_array_equal(a.completion_ids, b.completion_ids)


@pytest.mark.parametrize(("family", "shift"), [(llada, 0), (dream, 1)])
@pytest.mark.parametrize(("cache", "window"), [("prefix", [12, 8, 4]), ("dual", [4, 4, 4])])
def test_an_approximate_cache_runs_over_its_window(family, shift, cache, window):
    watched = Watched(network(family))
    Engine(watched).generate(requests([5]), sampler(steps=9, cache=cache), NOISE)
    assert watched.tokens == [size for tokens in window for size in (17, tokens + shift, tokens + shift)]


@pytest.mark.parametrize("family", [llada, dream])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_agreement_with_the_exact_mode(family, guidance):
    """A refresh at every step leaves nothing stale; a refresh for each block does."""
    model = network(family)
    stale = agreement(model, requests(), sampler(steps=12, cache="dual", guidance=guidance), NOISE)
    fresh = agreement(model, requests(), sampler(steps=12, cache="dual", cache_refresh=1, guidance=guidance), NOISE)
    assert fresh.tokens == fresh.rollouts == 1 and fresh.largest_kl < 1e-9
    assert 0 < stale.kl < stale.largest_kl and stale.rollouts < 1


def test_agreement_of_low_precision():
    found = agreement(network().bfloat16(), requests(), sampler(), NOISE, exact_model=network())
    assert 1e-9 < found.kl < 0.05


# ----------------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("name", ["low_confidence", "random"])
@pytest.mark.parametrize("cache", ["exact", "dual"])
def test_predictions_hold_what_was_drawn_and_what_stood(name, cache):
    rollouts = Engine(network()).generate(requests(), sampler(name, cache=cache, records=["predictions", "order"]), NOISE)
    plain = Engine(network()).generate(requests(), sampler(name, cache=cache), NOISE)
    for rollout, other in zip(rollouts, plain, strict=True):
        np.testing.assert_array_equal(rollout.completion_ids, other.completion_ids)
        assert rollout.predictions.shape == (6, 12) and other.predictions is None
        for step, predicted in enumerate(rollout.predictions):
            known = rollout.unmask_step <= step
            np.testing.assert_array_equal(predicted[known], rollout.completion_ids[known])
            later = np.arange(12) >= (step // 2 + 1) * 4
            assert (predicted[later] == NEVER).all() if cache == "dual" else (predicted > MASK).all()
        for step in range(6):
            assert sorted(rollout.order[rollout.unmask_step == step]) == [0, 1]


def test_traces_are_opt_in():
    (rollout,) = Engine(network()).generate(requests()[:1], sampler(), NOISE)
    assert all(getattr(rollout, name) is None for name in ("entropy", "order", "predictions", "edits", "fallback"))


# ----------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "dual"}, "sampler.cache: dual approximates full attention"),
        ({"block_length": 6}, "sampler.block_length: got 6, but the model works in blocks of 4"),
    ],
)
def test_settings_that_do_not_fit_the_attention(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(network(sdar)).generate(requests(), sampler(**settings), NOISE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, "sampler.top_p: must be in (0, 1], got 0"),
        ({"guidance": -1.0}, "sampler.guidance: must be 0 or more, got -1.0"),
        ({"guidance_interval": [0.8, 0.2]}, "sampler.guidance_interval: expected a list of two shares that ascend"),
        ({"cache": "double"}, "sampler.cache: no such choice 'double'; did you mean dual?"),
        ({"cache_refresh": 2}, "sampler.cache_refresh: refreshes an approximate cache, but sampler.cache is exact; use 0"),
        ({"records": ["entropi"]}, "sampler.records: no such choice 'entropi'; did you mean entropy?"),
        ({"steps": 5}, "sampler.steps: 5 is not a multiple of the 3 blocks"),
        ({"steps": 24}, "sampler.steps: 24 steps for a canvas of 12 tokens leave some without a token"),
        ({"name": "first_hitting"}, "sampler.steps: first_hitting has one step for each token of the canvas; use steps 12"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings, message):
    with pytest.raises(UserError) as error:
        check_sampler(sampler(**settings))
    assert message in str(error.value)


def test_more_steps_than_tokens_where_steps_may_be_idle():
    check_sampler(sampler("ancestral", steps=48))


def test_plan_warns_of_an_approximate_cache():
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "sort.yaml"

    def notes(*overrides: str) -> str:
        return "\n".join(make_plan(load_recipe(recipe, overrides)).notes)

    assert "approximate" not in notes()
    assert "sampler.cache dual is approximate" in notes("sampler.cache=dual")


def test_generate_takes_the_settings_of_a_sampler():
    model = Model(network(), Path())
    prompts = [request.prompt_ids for request in requests()]
    given = {"length": 12, "steps": 12, "block_length": 4, "temperature": 1.0}
    plain, guided, narrow = (
        rlhub.generate(model, prompts, **given, **more)
        for more in ({}, {"guidance": 2.0}, {"sampler": "threshold", "threshold": 0.3, "top_k": 1})
    )
    assert any((a.completion_ids != b.completion_ids).any() for a, b in zip(plain, guided, strict=True))
    assert {rollout.num_forwards for rollout in guided} >= {24}
    assert all((rollout.logp_sample[rollout.unmask_step != NEVER] == 0).all() for rollout in narrow), "one token holds the whole law"


def test_more_steps_than_the_trace_can_number_are_refused():
    with pytest.raises(ValueError, match=r"sampler\.steps: 40000 are more than the 32767"):
        Engine(network()).generate(requests(), sampler(steps=40_000, block_length=12), NOISE)
