"""Every sampler of the folder: the engine against the oracle, recorded log-probs against enumeration, and laws that the papers state."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhub import oracle, samplers
from rlhub.config.schema import SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.models import dream, llada, sdar
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.parts import load_part, part_config, part_names
from rlhub.types import NEVER, Request, Rollout

NAMES = part_names("samplers")
ONE_BY_ONE = ("first_hitting", "fork")  # as many steps as tokens
MASK, EOS, VOCAB, LENGTH = 0, 1, 14, 8
NEAR_TIE = 1e-5  # nats; below it two exact fp32 implementations may decide differently
NOISE = Noise(run_seed=11)
FAMILIES = {"llada": llada, "dream": dream, "sdar": sdar}


def tiny(module, **fields) -> torch.nn.Module:
    names = {"mask_token_id": MASK, "eos_token_id": EOS, "vocab_size": VOCAB, "rope_theta": 10.0}
    return module.build(module.Config.from_published(module.TINY | names | fields)).eval()


@cache
def network(family: str) -> torch.nn.Module:
    """Random weights, peaked enough that thresholds are passed and few choices are close."""
    model = tiny(FAMILIES[family]).initialize(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(15)
            if name.endswith(("ff_out.weight", "lm_head.weight")) and parameter.shape[0] == VOCAB:
                parameter.mul_(2)
    return model


@cache
def requests() -> tuple[Request, ...]:
    """Six prompts of 1 to 9 tokens, two of them equal, with unrelated uids."""
    random = np.random.default_rng(3)
    prompts = [random.integers(2, VOCAB, size).astype(np.int32) for size in (1, 4, 9, 2, 6)]
    prompts.append(prompts[2])
    return tuple(Request(uid=1000 * index + 7, group_uid=index // 2, prompt_ids=prompt) for index, prompt in enumerate(prompts))


# ------------------------------------------------------------------------------------------------------- engine against oracle

OPTIONS = {
    "ancestral": [{}, {"curve": "cosine"}, {"curve": "log_exponential"}],
    "block": [{"threshold": 0.5}, {"mode": "static"}],
    "edit": [{"threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 3}, {"editing_threshold": 0.2, "max_post_steps": 1}],
    "emigm": [{}, {"curve": "linear"}],
    "entropy": [{}, {"alg_temp": 0.3}],
    "factor": [{"factor": 0.6}, {"factor": 1.5}],
    "fork": [{"threshold": 0.6}],
    "maskgit": [{}, {"curve": "exponential", "choice_temperature": 1.0}],
    "maskgit_plus": [{}, {"alg_temp": 0.3}],
    "origin": [{}, {"eps": 0.2}],
    "threshold": [{"threshold": 0.5}, {"threshold": 0.3}],
    "topk_margin": [{}, {"alg_temp": 0.3}],
}
MARGINS: dict[tuple, list[float]] = {}  # of every decision of every rollout that the oracle made


@cache
def specified(family: str, case: tuple, row: int) -> tuple[Rollout, float]:
    MARGINS[family, case, row] = []
    return oracle.generate(network(family), requests()[row], sampler_config(case), NOISE, MARGINS[family, case, row])


def sampler_config(case: tuple) -> SamplerConfig:
    fields = dict(case)
    options = dict(fields.pop("options"))
    return SamplerConfig(length=LENGTH, options=options, records=["entropy", "order", "edits", "fallback"], **fields)


def cases(name: str, temperature: float):
    """Settings of a sampler, as sorted items."""
    shapes = [(8, 8), (8, 4)] if name in ONE_BY_ONE else [(8, 8), (4, 8), (4, 4), (8, 4)]
    laws = [{}] if temperature == 0 else [{}, {}, {"top_p": 0.8}, {"top_k": 4}]

    def case(shape, law, options, eos, early_stop, guidance):
        fields = {
            "name": name,
            "steps": shape[0],
            "block_length": shape[1],
            "temperature": temperature,
            "eos": eos,
            "early_stop": early_stop,
        }
        return tuple((fields | law | guidance | {"options": tuple(options.items())}).items())

    return st.builds(
        case,
        st.sampled_from(shapes),
        st.sampled_from(laws),
        st.sampled_from(OPTIONS.get(name, [{}])),
        st.sampled_from(["allow", "allow", "last", "never"]),
        st.sampled_from(["fill_eos", "off"]),
        st.sampled_from([{}, {}, {"guidance": 0.7, "guidance_interval": (0.2, 0.8)}]),
    )


def assert_same(produced: Rollout, expected: Rollout) -> None:
    assert produced.uid == expected.uid
    np.testing.assert_array_equal(produced.completion_ids, expected.completion_ids)
    np.testing.assert_array_equal(produced.unmask_step, expected.unmask_step)
    assert (produced.length, produced.num_forwards, produced.edits) == (expected.length, expected.num_forwards, expected.edits)
    np.testing.assert_array_equal(produced.fallback, expected.fallback)
    for name in ("logp_model", "logp_sample", "entropy"):
        np.testing.assert_allclose(getattr(produced, name), getattr(expected, name), atol=5e-5, err_msg=name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_oracle(name, temperature):
    """Token by token, whatever else is in the batch, in whatever order, however many rows at once and whenever rows leave."""

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(
        case=cases(name, temperature),
        order=st.permutations(range(len(requests()))).flatmap(lambda rows: st.integers(1, len(rows)).map(lambda count: rows[:count])),
        max_rows=st.integers(1, 6),
        family=st.sampled_from(list(FAMILIES)),
    )
    def check(case, order, max_rows, family):
        if family == "sdar":  # its blocks are its own
            case = tuple((key, 4 if key == "block_length" else value) for key, value in case)
        produced = Engine(network(family), max_rows=max_rows).generate([requests()[row] for row in order], sampler_config(case), NOISE)
        for row, rollout in zip(order, produced, strict=True):
            expected, margin = specified(family, case, row)
            if margin >= NEAR_TIE:
                assert_same(rollout, expected)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_order_within_a_step(name):
    """Ranked by confidence, from left to right where the model has no say."""
    config = SamplerConfig(name, LENGTH, LENGTH if name in ONE_BY_ONE else 2, LENGTH, records=["order", "fallback"])
    for request, produced in zip(requests(), Engine(network("llada")).generate(requests(), config, NOISE), strict=True):
        expected, margin = oracle.generate(network("llada"), request, config, NOISE)
        if margin >= NEAR_TIE:
            np.testing.assert_array_equal(produced.order, expected.order)


def test_near_ties_are_rare():
    """Of the decisions of the tests above, whose rollouts are left out where a margin may be rounding.

    Gaps are about evenly dense near 0, so a share of 1e-5 below 1e-5 nats is a density of one per nat; that of these small networks is
    two to three.
    """
    made = np.concatenate([*map(np.array, MARGINS.values()), np.zeros(0)])
    if not len(made):
        pytest.skip("counts the decisions of test_engine_equals_oracle, which did not run")
    near = {
        (family, dict(case)["name"], row): min(values)
        for (family, case, row), values in MARGINS.items()
        if min(values, default=1) < NEAR_TIE
    }
    print(f"{len(near)} of {len(MARGINS)} rollouts, {len(made)} decisions, hold a margin below {NEAR_TIE}: {near}")
    assert len(near) <= 0.01 * len(MARGINS)
    assert (made < 100 * NEAR_TIE).mean() < 100 * 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_what_a_sampler_declares(name):
    module = load_part("samplers", name)
    config = part_config(module, {})
    assert set(module.RECORDS) <= set(samplers.TRACE) and set(getattr(module, "NEEDS", ())) <= set(samplers.OPTIONAL_STATS)
    assert samplers.log_probs(module, config) == module.LOG_PROBS in ("exact", "given_order", "none")
    assert samplers.log_probs(module, config, eos="last") == "none"
    assert hasattr(module, "choose") != hasattr(module, "select")
    assert sum(module.schedule(LENGTH, LENGTH, 4, config).transfer) >= 4, "a block is full when its steps are over"


def test_the_rules_bite():
    """What the settings above are there for happens: thresholds, edits, fallbacks, steps without a forward."""

    def made(name, **fields):
        config = SamplerConfig(
            name, LENGTH, fields.pop("steps", LENGTH), LENGTH, fields.pop("temperature", 1.0), early_stop="off", **fields
        )
        return [oracle.generate(network("llada"), request, config, NOISE)[0] for request in requests()]

    for name in ("threshold", "factor", "block", "fork"):
        rollouts = made(name, options=OPTIONS[name][0])
        assert min(rollout.num_forwards for rollout in rollouts) < LENGTH, name
        assert 0 < np.mean([rollout.fallback for rollout in rollouts]) < 1, name
    edited = made("edit", options=OPTIONS["edit"][0], steps=2)
    assert sum(len(rollout.edits) for rollout in edited) > 2
    for rollout in edited:
        for step, position, old, new in rollout.edits:
            assert old != new and step > rollout.unmask_step[position] != NEVER
        last = {position: new for _, position, _, new in rollout.edits}
        assert all(rollout.completion_ids[position] == new for position, new in last.items())
    assert all(rollout.num_forwards < 20 for rollout in made("ancestral", steps=20))
    first = [rollout.unmask_step.argmin() for rollout in made("entropy_guided")]
    assert first != [rollout.unmask_step.argmin() for rollout in made("top_probability")]


# ------------------------------------------------------------------------------------- what the recorded log-probs multiply to


class TableModel:
    """A law for each state of a canvas of two or three tokens over two words, drawn at random once."""

    mask_id, eos_id, vocab_size, max_length = 0, 3, 4, 64
    profile = Profile(mask_id=0, eos_id=3, stop_ids=(3,), pad_id=3, lora_targets="")

    def __init__(self, length: int) -> None:
        random = np.random.default_rng(5)
        self.logits = {
            canvas: torch.from_numpy(
                np.concatenate([np.full((length, 1), -50), random.normal(0, 0.7, (length, 2)), np.full((length, 1), -50)], 1)
            )
            for canvas in itertools.product(range(3), repeat=length)
        }
        self.length = length

    def denoise(self, tokens, layout, targets=None, cache=None):
        rows = tokens.reshape(-1, self.length + 1)[:, 1:].tolist()
        logits = torch.stack([torch.cat([torch.zeros(1, 4), self.logits[tuple(row)].float()]) for row in rows]).reshape(-1, 4)
        return logits if targets is None else logits[targets]

    def head(self, hidden, target_rows=None):
        return (hidden if target_rows is None else hidden[target_rows]).clone()


CHI_SQUARE = {7: 37.0, 3: 27.0}  # exceeded with a probability below 5e-6, by degrees of freedom
PROMPT = np.array([2], dtype=np.int32)


def draw_rollouts(name: str, count: int, length: int, temperature: float, **fields) -> list[Rollout]:
    config = SamplerConfig(name, length, fields.pop("steps", length), length, temperature, early_stop="off", eos="never", **fields)
    wanted = [Request(uid, uid, PROMPT) for uid in range(count)]
    return Engine(TableModel(length)).generate(wanted, config, NOISE)


EXACT = [
    ("left_to_right", 3, {}),
    ("top_probability", 3, {}),
    ("top_probability", 2, {}),  # two tokens in the first step
    ("entropy_guided", 3, {}),
    ("topk_margin", 3, {}),
    ("entropy", 2, {}),
    ("fork", 3, {"threshold": 0.75}),
]


@pytest.mark.parametrize(("name", "steps", "options"), EXACT)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_exact_log_probs_are_those_of_the_rollout(name, steps, options, temperature):
    """All eight completions of three tokens: their recorded probabilities add up to one, and are the frequencies of 2,000 rollouts."""
    assert load_part("samplers", name).LOG_PROBS == "exact"
    rollouts = draw_rollouts(name, 2000, 3, temperature, steps=steps, options=options)
    counts = Counter(tuple(rollout.completion_ids.tolist()) for rollout in rollouts)
    recorded = {tuple(rollout.completion_ids.tolist()): math.exp(rollout.logp_sample.sum(dtype=np.float64)) for rollout in rollouts}
    for rollout in rollouts:
        again = math.exp(rollout.logp_sample.sum(dtype=np.float64))
        assert again == pytest.approx(recorded[tuple(rollout.completion_ids.tolist())], rel=1e-5), "the order follows from the tokens"
    assert len(recorded) == 8 and sum(recorded.values()) == pytest.approx(1, abs=1e-5)
    statistic = sum((counts[key] - 2000 * p) ** 2 / (2000 * p) for key, p in recorded.items())
    assert statistic < CHI_SQUARE[7]


def test_log_probs_without_the_claim_are_not_those_of_the_rollout():
    """The same test fails for low_confidence and maskgit_plus: they keep the likelier draws, so it can fail."""
    for name in ("low_confidence", "maskgit_plus"):
        rollouts = draw_rollouts(name, 2000, 3, 1.0)
        paths = Counter((*rollout.completion_ids.tolist(), *rollout.unmask_step.tolist()) for rollout in rollouts)
        mass = {
            (*rollout.completion_ids.tolist(), *rollout.unmask_step.tolist()): math.exp(rollout.logp_sample.sum(dtype=np.float64))
            for rollout in rollouts
        }
        assert abs(sum(mass.values()) - 1) > 0.2 and len(paths) > 8


@pytest.mark.parametrize("name", ["random", "first_hitting", "ancestral", "origin", "emigm"])
def test_log_probs_given_the_order(name):
    """Given the steps at which positions were written, completions of two tokens have their recorded probabilities."""
    assert load_part("samplers", name).LOG_PROBS == "given_order"
    by_order: dict[tuple, Counter] = {}
    recorded: dict[tuple, dict] = {}
    for rollout in draw_rollouts(name, 2000, 2, 1.0):
        order, tokens = tuple(rollout.unmask_step.tolist()), tuple(rollout.completion_ids.tolist())
        by_order.setdefault(order, Counter())[tokens] += 1
        recorded.setdefault(order, {})[tokens] = math.exp(rollout.logp_sample.sum(dtype=np.float64))
    assert len(by_order) >= 2
    for order, counts in by_order.items():
        total = sum(counts.values())
        assert sum(recorded[order].values()) == pytest.approx(1, abs=1e-5)
        assert sum((counts[key] - total * p) ** 2 / (total * p) for key, p in recorded[order].items()) < CHI_SQUARE[3]


def test_first_hitting_is_ancestral_sampling_with_many_steps():
    """Completions of three tokens by first_hitting and by 60 ancestral steps, compared as two samples of one law."""
    samples = [
        Counter(tuple(rollout.completion_ids.tolist()) for rollout in draw_rollouts(name, 2000, 3, 1.0, steps=steps))
        for name, steps in [("first_hitting", 3), ("ancestral", 60)]
    ]
    statistic = sum((samples[0][key] - samples[1][key]) ** 2 / (samples[0][key] + samples[1][key]) for key in samples[0] | samples[1])
    assert statistic < CHI_SQUARE[7]


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_forwards_of_ancestral_sampling(steps):
    """n (1 - (1 - 1/n)^L) on average, RADD's Eq. 3.6 (arXiv 2406.03736), within three standard errors."""
    forwards = [rollout.num_forwards for rollout in draw_rollouts("ancestral", 2000, 3, 1.0, steps=steps)]
    expected = steps * (1 - (1 - 1 / steps) ** 3)
    assert abs(np.mean(forwards) - expected) < 3 * np.std(forwards) / len(forwards) ** 0.5


def test_a_row_that_unmasks_nothing_keeps_its_output():
    """RADD's cache changes no token: the oracle runs the model for a step only to draw tokens, here it is run at every step."""
    config = SamplerConfig("ancestral", LENGTH, 24, LENGTH, early_stop="off", eos="last")  # scores everything at every step
    never = SamplerConfig("ancestral", LENGTH, 24, LENGTH, early_stop="off")
    model = network("llada")
    every, cached = (Engine(model).generate(requests(), settings, NOISE) for settings in (config, never))
    assert all(a.num_forwards > b.num_forwards for a, b in zip(every, cached, strict=True))
    unaffected = [(a, b) for a, b in zip(every, cached, strict=True) if EOS not in b.completion_ids and EOS not in a.completion_ids]
    assert unaffected
    for a, b in unaffected:
        np.testing.assert_array_equal(a.completion_ids, b.completion_ids)
