"""The device's twin of the keyed noise, run on the CPU: the same uniforms to the last bit, the same winners, the same rollouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from rlhub.config.schema import SamplerConfig
from rlhub.engines import device_noise, row_stats
from rlhub.engines.row_stats import Law, TokenNoise, streamed_stats
from rlhub.engines.torch_engine import Engine
from rlhub.models import llada
from rlhub.noise import Noise, Stream
from rlhub.types import Request

NOISE = Noise(run_seed=6)
BANNED = -1e30
WORD, HALF = 1 << 64, 1 << 32
EXTREMES = itertools.product((0, 1, WORD // 2 - 1, WORD // 2, WORD - 1), (0, HALF - 1), (0, HALF // 2, HALF - 1))
RANDOM = np.random.default_rng(5).integers((WORD, HALF, HALF), size=(50, 3), dtype=np.uint64)
KEYS = [*EXTREMES, *map(tuple, RANDOM.tolist())]  # (uid, step, position)


def tensors(keys: list[tuple[int, int, int]]) -> tuple[torch.Tensor, ...]:
    uid, step, position = zip(*keys, strict=True)
    return torch.tensor([device_noise.signed(word) for word in uid]), torch.tensor(step), torch.tensor(position)


def random_race(law: str, count: int, vocab_size: int) -> tuple[torch.Tensor, TokenNoise]:
    """Scores [count, vocab_size] with a maximum of 0 in each row, and the noise of two positions more."""
    scale = {"flat": 0.0, "random": 2.0, "peaked": 30.0}[law]
    scores = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(1)) * scale
    scores[:, ::7] = BANNED
    scores -= scores.amax(1, keepdim=True)
    return scores, TokenNoise(NOISE.stream("token"), *tensors([(WORD - 1 - row, row % 9, 3 * row) for row in range(count + 2)]))


@pytest.mark.parametrize("seed", [0, 1, WORD // 2, WORD - 1])
@pytest.mark.parametrize("size", [1, 3, 4, 1001])
def test_uniforms_are_those_of_the_stream(seed, size):
    stream = Noise(seed).stream("token")
    expected = np.stack([stream.uniform(size, uid=uid, step=step, position=at) for uid, step, at in KEYS])
    np.testing.assert_array_equal(device_noise.philox_uniforms(stream, size, *tensors(KEYS)), expected)
    np.testing.assert_array_equal(device_noise.uniforms(stream, size, *tensors(KEYS)), expected)


def test_uniforms_of_one_key_and_of_another_purpose():
    for purpose in ("token", "position"):
        (row,) = device_noise.philox_uniforms(NOISE.stream(purpose), 10, *tensors(KEYS[:1]))
        np.testing.assert_array_equal(row, NOISE.uniform(purpose, 10))


def broken(function, **_):
    def fails(*_):
        raise RuntimeError("no compiler\nhere")

    return fails


def wrong(function, **_):
    return lambda *words: tuple(values + 2.0**-52 for values in function(*words))


@pytest.mark.parametrize(("compiler", "message"), [(broken, "no compiler"), (wrong, "its bits would differ")])
def test_a_compiler_that_fails_is_not_used(monkeypatch, caplog, compiler, message):
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(device_noise, "_pipeline", device_noise.compiled)
    drawn = device_noise.philox_uniforms(NOISE.stream("token"), 9, *tensors(KEYS))
    np.testing.assert_array_equal(drawn, device_noise.uniforms(NOISE.stream("token"), 9, *tensors(KEYS)))
    assert caplog.messages == [f"token noise is not compiled for cpu: {message}"]


@pytest.mark.parametrize("law", ["flat", "random", "peaked"])
@pytest.mark.parametrize(("count", "vocab_size"), [(4000, 97), (6, 32_000)])
def test_the_device_has_the_winners_of_the_host(monkeypatch, law, count, vocab_size):
    monkeypatch.setattr(row_stats, "_NUMBERS_ON_DEVICE", 3 * vocab_size)
    scores, noise = random_race(law, count, vocab_size)
    weights = scores.exp()
    expected = noise.race_on_host(scores, weights.clone(), weights.sum(1), first=2)
    won = noise.race_on_device(scores, first=2)
    assert won.dtype == expected.dtype == torch.int64
    np.testing.assert_array_equal(won, expected)
    assert (won % 7 != 0).all(), "banned"


def test_the_lowest_id_of_equals_wins(monkeypatch):
    monkeypatch.setattr(device_noise, "philox_uniforms", lambda _, size, uid, *key: torch.full((len(uid), size), 0.3, dtype=torch.float64))
    _, noise = random_race("flat", 2, 5)
    assert noise.race_on_device(torch.tensor([[-1.0, 0, -2, 0, 0], [-1, -1, -1, -1, -1]]), first=0).tolist() == [1, 0]


def test_winners_follow_the_law():
    """A chi-square test at p = 1e-6, of a law with a token of 0.1 % and a banned one."""
    law = torch.tensor([0.4, 0.25, 0.0, 0.2, 0.1, 0.049, 0.001], dtype=torch.float64)
    count = 50_000
    scores = law.log().clamp_min(BANNED).float().expand(count, -1)
    row = torch.arange(count)
    won = TokenNoise(NOISE.stream("token"), row // 500, row % 5, row // 5 % 100).race_on_device(scores, first=0)
    seen = won.bincount(minlength=len(law)).double()
    expected = count * law
    assert seen[2] == 0
    assert ((seen - expected)[law > 0] ** 2 / expected[law > 0]).sum() < chi2.isf(1e-6, (law > 0).sum() - 1)


@pytest.mark.parametrize("law", [Law(1.0), Law(0.7, top_k=3, top_p=0.9, banned=(0, 2)), Law(0.0, banned=(0,))])
def test_nothing_is_read_back_from_the_device(monkeypatch, law):
    """Meta tensors stand for a device: they have no values, so whatever the host would wait for raises."""
    monkeypatch.setattr(device_noise, "compiled", lambda _: device_noise._four_uniforms)
    meta = torch.device("meta")
    noise = TokenNoise(NOISE.stream("token"), *(values.to(meta) for values in tensors(KEYS)))
    needs = ("entropy", "margin", "top_logp", "law_logp", "law_entropy", "law_margin")
    found = streamed_stats(lambda part: torch.empty(len(KEYS[part]), 11, device=meta), len(KEYS), 11, law, noise, needs, meta)
    assert {name: (value.device, value.shape) for name, value in found.items()} == dict.fromkeys(
        ("token", "logp_model", "logp_sample", *needs), (meta, (len(KEYS),))
    )


@pytest.mark.parametrize("name", ["low_confidence", "random", "ancestral"])
def test_rollouts_without_the_host_are_the_same(monkeypatch, name):
    """Noise of tokens and of positions; the host's generator is not touched."""
    vocab, names = 16, {"mask_token_id": 0, "eos_token_id": 1, "vocab_size": 16}
    model = llada.build(llada.Config.from_published(llada.TINY | names)).initialize(torch.Generator().manual_seed(1)).eval()
    prompts = np.random.default_rng(0)
    requests = [Request(WORD - 1 - row, row, prompts.integers(2, vocab, 3 + row).astype(np.int32)) for row in range(4)]
    settings = SamplerConfig(name, length=12, steps=6, block_length=12, temperature=1.0)
    expected = Engine(model).generate(requests, settings, NOISE)
    monkeypatch.setattr(device_noise, "on_host", lambda _: False)
    monkeypatch.setattr(Stream, "_seek", lambda *_: pytest.fail("numpy drew"))
    for rollout, other in zip(Engine(model).generate(requests, settings, NOISE), expected, strict=True):
        np.testing.assert_array_equal(rollout.completion_ids, other.completion_ids)
        np.testing.assert_array_equal(rollout.unmask_step, other.unmask_step)
        np.testing.assert_array_equal(rollout.logp_sample, other.logp_sample)
