"""Keyed noise: the layout of the keys, independence and range."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter

import numpy as np
import pytest

from rlhub.noise import Noise, sample_uid

WORD = 1 << 64
FULL_KEY = {"uid": 0xFEDCBA9876543210, "epoch": 3, "update": 5, "draw": 7, "step": 11, "position": 13}


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox 4x64-10 of one 256-bit counter, from the paper (Salmon et al. 2011, section 3.3 and Table 2)."""
    words = [counter >> shift & WORD - 1 for shift in (0, 64, 128, 192)]
    first, second = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [right // WORD ^ words[1] ^ first, right % WORD, left // WORD ^ words[3] ^ second, left % WORD]
        first, second = (first + 0x9E3779B97F4A7C15) % WORD, (second + 0xBB67AE8584CAA73B) % WORD
    return words


def check_layout(seed: int) -> None:
    fields = [0, 13 << 32 | 11, 3 << 48 | 5 << 24 | 7, FULL_KEY["uid"]]
    start = sum(field << shift for field, shift in zip(fields, (0, 64, 128, 192), strict=True))
    key = (seed, zlib.crc32(b"views"))
    raw = [word for block in range(1, 4) for word in philox(start + block, key)]  # numpy counts up before it draws
    np.testing.assert_allclose(Noise(seed).uniform("views", 12, **FULL_KEY), [word / WORD for word in raw], rtol=0, atol=2.0**-52)
    direct = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(fields, dtype=np.uint64)).random_raw(12)
    assert direct.tolist() == raw


def test_layout_of_the_key():
    """The documented counter and key, through a second implementation of the generator."""
    check_layout(seed=2**63 - 1)


def test_layout_of_the_largest_seeds():
    check_layout(seed=2**64 - 3)


def test_generators_of_the_largest_uids():
    first, second = (Noise(0).generator("shuffle", uid=sample_uid(8, 0, 0, member)) for member in (0, 1))
    assert first.random() != second.random()


def test_generator_is_on_the_stream_of_its_key():
    raw = Noise(4).generator("shuffle", uid=9, epoch=2).bit_generator.random_raw(8)
    np.testing.assert_allclose(Noise(4).uniform("shuffle", 8, uid=9, epoch=2), raw / WORD, rtol=0, atol=2.0**-52)


def test_draws_are_functions_of_the_key_alone():
    """Neither the order of calls nor what was drawn before matters; a longer draw begins like a shorter one."""
    stream = Noise(1).stream("token")
    keys = [{"uid": uid, "step": step, "position": position} for uid, step, position in itertools.product((0, 7), (0, 3), (0, 1))]
    forwards = [stream.uniform(5, **key) for key in keys]
    stream.uniform(3, uid=99)
    backwards = [stream.uniform(9, **key)[:5] for key in reversed(keys)][::-1]
    alone = [Noise(1).uniform("token", 5, **key) for key in keys]
    np.testing.assert_array_equal(forwards, backwards)
    np.testing.assert_array_equal(forwards, alone)


@pytest.mark.parametrize("field", FULL_KEY)
def test_every_field_matters(field):
    base = Noise(0).uniform("views", 4, **FULL_KEY)
    other = Noise(0).uniform("views", 4, **(FULL_KEY | {field: FULL_KEY[field] + 1}))
    assert not np.isin(base, other).any()


def test_seed_and_purpose_matter():
    base = Noise(0).uniform("views", 4)
    for other in (Noise(1).uniform("views", 4), Noise(0).uniform("token", 4)):
        assert not np.isin(base, other).any()


def test_neighbouring_keys_are_uncorrelated():
    """The draws of one field's neighbours: means, variances and correlations of 4000 keys within five standard deviations."""
    stream = Noise(2).stream("token")
    for field in ("uid", "draw", "step", "position"):
        sample = np.stack([stream.uniform(2, **{field: value}) for value in range(4000)])
        assert abs(sample.mean() - 0.5) < 5 * (1 / 12 / sample.size) ** 0.5
        assert abs(sample.var() - 1 / 12) < 5 * (1 / 180 / sample.size) ** 0.5
        for left, right in ((sample[:-1, 0], sample[1:, 0]), (sample[:, 0], sample[:, 1])):
            assert abs(np.corrcoef(left, right)[0, 1]) < 5 / 4000**0.5


def test_a_stream_does_not_repeat_over_many_steps():
    """100 000 training steps of one sample and 64 canvas positions each: no first word comes twice."""
    views, token = Noise(0).stream("views"), Noise(0).stream("token")
    firsts = [views.uniform(1, uid=sample_uid(1, step, 0, 0))[0] for step in range(100_000)]
    firsts += [token.uniform(1, uid=sample_uid(1, step, 0, 0), position=position)[0] for step in range(500) for position in range(64)]
    assert len(set(firsts)) == len(firsts)


def test_uniforms_lie_strictly_inside_the_unit_interval():
    values = Noise(0).uniform("token", 1_000_000)
    assert 0 < values.min() < 1e-5 and 1 - 1e-5 < values.max() < 1


class FixedBits:
    """A bit generator that gives one word for ever."""

    def __init__(self, word: int) -> None:
        self.word, self.state = word, None

    def random_raw(self, size: int) -> np.ndarray:
        return np.full(size, self.word, dtype=np.uint64)


@pytest.mark.parametrize("word", [0, WORD - 1])
def test_the_ends_of_the_word_stay_inside_too(word):
    stream = Noise(0).stream("token")
    stream._bits = FixedBits(word)
    assert 0 < stream.uniform(1)[0] < 1


def test_subsets_are_uniform():
    stream = Noise(3).stream("views")
    seen = Counter(tuple(np.flatnonzero(stream.subset(5, 2, uid=uid)).tolist()) for uid in range(10_000))
    assert len(seen) == 10
    assert sum((count - 1000) ** 2 / 1000 for count in seen.values()) < 45  # chi-square, nine degrees of freedom, p = 1e-6
    assert stream.subset(4, 0).sum() == 0 and stream.subset(4, 4).all()


def test_integers_are_uniform_and_in_range():
    stream = Noise(3).stream("views")
    counts = np.bincount([stream.integer(7, uid=uid) for uid in range(7000)], minlength=7)
    assert len(counts) == 7 and ((counts - 1000) ** 2 / 1000).sum() < 38  # six degrees of freedom, p = 1e-6
    assert stream.integer(1) == 0


@pytest.mark.parametrize(
    ("field", "width"),
    [("uid", 64), ("step", 32), ("position", 32), ("update", 24), ("draw", 24), ("epoch", 32), ("block", 32), ("quantity", 32)],
)
def test_fields_out_of_range_are_refused(field, width):
    largest = (1 << width) - 1
    assert Noise(0).uniform("views", 1, **{field: largest}) != Noise(0).uniform("views", 1)
    for value in (largest + 1, -1):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            Noise(0).uniform("views", 1, **{field: value})


@pytest.mark.parametrize(("field", "other"), [("step", "block"), ("position", "quantity")])
def test_two_fields_that_share_their_bits_are_not_in_one_key(field, other):
    """Alone they give the same numbers, in purposes that know only one of them."""
    noise = Noise(0)
    assert noise.uniform("views", 1, uid=3, **{field: 7}) == noise.uniform("views", 1, uid=3, **{other: 7})
    with pytest.raises(ValueError, match="a step or a block, and a position or a quantity"):
        noise.uniform("views", 1, **{field: 1, other: 2})


def test_a_field_of_another_name_is_refused():
    with pytest.raises(TypeError, match="epok"):
        Noise(0).generator("shuffle", epok=1)


def test_epochs_beyond_16_bits_have_streams_of_their_own():
    seen = {Noise(0).uniform("order", 1, epoch=epoch)[0] for epoch in (0, 1, 1 << 16, (1 << 16) + 1, 1 << 31)}
    assert len(seen) == 5


def test_seed_out_of_range_is_refused():
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="run seed"):
            Noise(seed).uniform("views", 1)


def test_sample_uids_are_distinct_and_checked():
    fields = [(0, 1), (0, 1, (1 << 24) - 1), (0, 1, (1 << 24) - 1), (0, 1, (1 << 12) - 1)]
    uids = {sample_uid(*values) for values in itertools.product(*fields)}
    assert len(uids) == 2 * 3 * 3 * 3
    assert sample_uid(15, (1 << 24) - 1, (1 << 24) - 1, (1 << 12) - 1) == (1 << 64) - 1
    for values in ((16, 0, 0, 0), (0, 1 << 24, 0, 0), (0, 0, 1 << 24, 0), (0, 0, 0, 1 << 12), (0, -1, 0, 0)):
        with pytest.raises(ValueError, match="uid field"):
            sample_uid(*values)
