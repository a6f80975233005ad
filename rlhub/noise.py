"""Counter-based noise: every random number is a pure function of what it is for.

A key is `(run_seed, purpose, uid, epoch, update, draw, step, position)`. Its stream is numpy's Philox 4x64-10 with

    key     = (run_seed, purpose number)
    counter = (block, position << 32 | step, epoch << 48 | update << 24 | draw, uid)

where `block` counts up along the stream (four 64-bit words each). Nothing here keeps state between calls, so results cannot depend on
batch composition, order, worker count or on what else drew numbers. Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3".
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

_TO_UNIT = 2.0**-52


@dataclass(frozen=True)
class Noise:
    """The noise of one run.

    Example:
        >>> noise = Noise(run_seed=0)
        >>> noise.uniform("views", uid=7, draw=1, size=2).shape
        (2,)
    """

    run_seed: int

    def uniform(
        self, purpose: str, size: int, *, uid: int = 0, epoch: int = 0, update: int = 0, draw: int = 0, step: int = 0, position: int = 0
    ) -> np.ndarray:
        """float64 [size] in the open interval (0, 1), 52 bits each.

        Raises:
            ValueError: a field is outside its width (`uid` 64 bit, `step` and `position` 32, `update` and `draw` 24, `epoch` 16).
        """
        return self.stream(purpose).uniform(size, uid=uid, epoch=epoch, update=update, draw=draw, step=step, position=position)

    def stream(self, purpose: str) -> Stream:
        """A reusable generator for one purpose, for loops that draw from many keys."""
        return Stream(self.run_seed, purpose)

    def generator(self, purpose: str, *, uid: int = 0, epoch: int = 0) -> np.random.Generator:
        """A numpy generator on the key's stream, for code that needs more than uniforms (shuffles, integers)."""
        counter = np.array([0, 0, epoch << 48, uid], dtype=np.uint64)
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

    def uniform(
        self, size: int, *, uid: int = 0, epoch: int = 0, update: int = 0, draw: int = 0, step: int = 0, position: int = 0
    ) -> np.ndarray:
        """float64 [size] in (0, 1) for one key; see `Noise.uniform`."""
        self._seek(uid, epoch, update, draw, step, position)
        return ((self._bits.random_raw(size) >> np.uint64(12)) + 0.5) * _TO_UNIT

    def lower_bounds(
        self, out: np.ndarray, *, uid: int = 0, epoch: int = 0, update: int = 0, draw: int = 0, step: int = 0, position: int = 0
    ) -> None:
        """Fill a contiguous float64 array with bounds of `uniform`: at most 2^-53 below it, and made into it by `from_lower_bounds`.

        Costs what the generator costs, without another pass over the numbers: for loops that need only a few of them exactly.
        """
        self._seek(uid, epoch, update, draw, step, position)
        self._generator.random(out=out)

    def _seek(self, uid: int, epoch: int, update: int, draw: int, step: int, position: int) -> None:
        """Set the whole counter."""
        if not (
            0 <= uid < 1 << 64
            and 0 <= step < 1 << 32
            and 0 <= position < 1 << 32
            and 0 <= update < 1 << 24
            and 0 <= draw < 1 << 24
            and 0 <= epoch < 1 << 16
        ):
            raise ValueError(f"noise key out of range: {uid=} {epoch=} {update=} {draw=} {step=} {position=}")
        counter = self._state["state"]["counter"]
        counter[0] = 0
        counter[1] = position << 32 | step
        counter[2] = epoch << 48 | update << 24 | draw
        counter[3] = uid
        self._state["buffer_pos"] = 4
        self._bits.state = self._state

    def integer(self, bound: int, **key: int) -> int:
        """An integer in `[0, bound)` for one key."""
        return min(int(self.uniform(1, **key)[0] * bound), bound - 1)

    def subset(self, population: int, size: int, **key: int) -> np.ndarray:
        """bool [population] with `size` True entries, uniform over all subsets of that size."""
        chosen = np.zeros(population, dtype=bool)
        chosen[np.argsort(self.uniform(population, **key), kind="stable")[:size]] = True
        return chosen


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
