"""Counter-based noise: every random number is a pure function of what it is for.

A key is a run's seed, a purpose, and fields that are named for what they hold; those that a purpose has no use for stay 0:

    uid        a completion, or a row of data                                               64 bits
    epoch      a pass over finite data                                                      32
    update     an inner update on a batch                                                   24
    draw       a draw of a sample's estimate, or an attempt                                 24
    step       a denoising step, or a training step where a purpose draws once in each      32
    block      a block of a block-causal model; it has the bits of `step`                   32
    position   a position of the canvas                                                     32
    quantity   which of several things a draw is of, see `Quantity`; the bits of `position` 32

The stream of a key is numpy's Philox 4x64-10 with

    key     = (run_seed, purpose number)
    counter = (epoch >> 16 << 48 | place, position << 32 | step, (epoch & 0xFFFF) << 48 | update << 24 | draw, uid)

where `place` counts up along the stream (four 64-bit words each). Nothing here keeps state between calls, so results cannot depend on
batch composition, order, worker count or on what else drew numbers. Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3".
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_TO_UNIT = 2.0**-52


class Quantity(IntEnum):
    """What a draw of views is of."""

    MASK = 0  # which tokens are hidden
    LEVEL = 1  # the noise level, or the number of hidden tokens
    ORDER = 2  # the order of blocks
    CONTEXT = 3  # which tokens before the block are hidden as well


@dataclass(frozen=True)
class Noise:
    """The noise of one run.

    Example:
        >>> noise = Noise(run_seed=0)
        >>> noise.uniform("views", uid=7, draw=1, size=2).shape
        (2,)
    """

    run_seed: int

    def uniform(self, purpose: str, size: int, **key: int) -> np.ndarray:
        """float64 [size] in the open interval (0, 1), 52 bits each.

        Raises:
            TypeError: the key has a field of another name.
            ValueError: a field is outside its width, or two fields share their bits.
        """
        return self.stream(purpose).uniform(size, **key)

    def stream(self, purpose: str) -> Stream:
        """A reusable generator for one purpose, for loops that draw from many keys."""
        return Stream(self.run_seed, purpose)

    def generator(self, purpose: str, **key: int) -> np.random.Generator:
        """A numpy generator on the key's stream, for code that needs more than uniforms (shuffles, integers)."""
        counter = np.array(_counter(**key), dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=_key(self.run_seed, purpose), counter=counter))


class Stream:
    """Draws for one purpose. Holds a bit generator only to avoid rebuilding it; each call sets the whole counter.

    Attributes:
        key: uint64 [2], the generator's key.
    """

    def __init__(self, run_seed: int, purpose: str) -> None:
        self.key = _key(run_seed, purpose)
        self._bits = np.random.Philox(key=self.key)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def uniform(self, size: int, **key: int) -> np.ndarray:
        """float64 [size] in (0, 1) for one key; see `Noise.uniform`."""
        self._seek(**key)
        return ((self._bits.random_raw(size) >> np.uint64(12)) + 0.5) * _TO_UNIT

    def lower_bounds(self, out: np.ndarray, **key: int) -> None:
        """Fill a contiguous float64 array with bounds of `uniform`: at most 2^-53 below it, and made into it by `from_lower_bounds`.

        Costs what the generator costs, without another pass over the numbers: for loops that need only a few of them exactly.
        """
        self._seek(**key)
        self._generator.random(out=out)

    def _seek(self, **key: int) -> None:
        """Set the whole counter."""
        counter = self._state["state"]["counter"]
        counter[0], counter[1], counter[2], counter[3] = _counter(**key)
        self._state["buffer_pos"] = 4
        self._bits.state = self._state

    def integer(self, bound: int, **key: int) -> int:
        """An integer in `[0, bound)` for one key."""
        return min(int(self.uniform(1, **key)[0] * bound), bound - 1)

    def subset(self, population: int, size: int, **key: int) -> np.ndarray:
        """bool [population] with `size` True entries, uniform over all subsets of that size."""
        subset = np.zeros(population, dtype=bool)
        subset[np.argsort(self.uniform(population, **key), kind="stable")[:size]] = True
        return subset


def from_lower_bounds(bounds: np.ndarray) -> np.ndarray:
    """The uniforms that `Stream.lower_bounds` bounds: numpy keeps 53 bits of a word, of which `uniform` has 52 and sets the last."""
    return ((bounds * 2.0**53).astype(np.int64) | 1) * 2.0**-53


def sample_uid(phase: int, step: int, row: int, member: int) -> int:
    """The 64-bit uid of one completion: phase (4 bits, `Phase.number`), step (24), prompt row within the step (24), group member (12).

    Raises:
        ValueError: a field does not fit.
    """
    if not (0 <= phase < 1 << 4 and 0 <= step < 1 << 24 and 0 <= row < 1 << 24 and 0 <= member < 1 << 12):
        raise ValueError(f"uid field out of range: {phase=} {step=} {row=} {member=}")
    return phase << 60 | step << 36 | row << 12 | member


def _key(run_seed: int, purpose: str) -> np.ndarray:
    if not 0 <= run_seed < 1 << 64:
        raise ValueError(f"run seed must be in [0, 2^64), got {run_seed}")
    return np.array([run_seed, zlib.crc32(purpose.encode())], dtype=np.uint64)


def _counter(
    uid: int = 0, epoch: int = 0, update: int = 0, draw: int = 0, step: int = 0, block: int = 0, position: int = 0, quantity: int = 0
) -> tuple[int, int, int, int]:
    """The four words of a key's counter at the beginning of its stream."""
    if not (
        0 <= uid < 1 << 64
        and 0 <= epoch < 1 << 32
        and 0 <= update < 1 << 24
        and 0 <= draw < 1 << 24
        and 0 <= step < 1 << 32
        and 0 <= block < 1 << 32
        and 0 <= position < 1 << 32
        and 0 <= quantity < 1 << 32
    ):
        fields = f"{uid=} {epoch=} {update=} {draw=} {step=} {block=} {position=} quantity={int(quantity)}"
        raise ValueError(f"noise key out of range: {fields}")
    if (step and block) or (position and quantity):
        raise ValueError(f"a noise key has a step or a block, and a position or a quantity: {step=} {block=} {position=} {quantity=}")
    third = (epoch & 0xFFFF) << 48 | update << 24 | draw
    return epoch >> 16 << 48, (position | quantity) << 32 | step | block, third, uid
