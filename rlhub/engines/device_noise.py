"""Keyed noise for keys in tensors, on their device: on a CPU drawn by `rlhub.noise`, elsewhere by a twin that agrees bit for bit.

The twin is Philox 4x64-10 (Salmon et al. 2011) in torch's integer operations. It spares a GPU the copies and the waiting; on a CPU numpy's
generator is some forty times faster. torch computes with signed words only, so a word is the int64 with the same bits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rlhub.noise import Stream

_ROUNDS = 10
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 0xFFFFFFFF

_log = logging.getLogger(__name__)


def on_host(device: torch.device) -> bool:
    """Whether noise for tensors of this device is drawn by numpy."""
    return device.type == "cpu"


def signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word.

    Example:
        >>> signed(2**64 - 1)
        -1
    """
    return word - (1 << 64) if word >> 63 else word


def host_keys(uid: Tensor, step: Tensor, position: Tensor) -> list[tuple[int, int, int]]:
    """The keys [m] of `uniforms` as numbers that `Stream` takes."""
    return list(zip([word % (1 << 64) for word in uid.tolist()], step.tolist(), position.tolist(), strict=True))


def uniforms(stream: Stream, size: int, uid: Tensor, step: Tensor, position: Tensor) -> Tensor:
    """float64 [m, size], row r is `Stream.uniform` of the r-th key.

    Args:
        uid: int64 [m], `signed` uids.
        step: int64 [m], in [0, 2^32).
        position: int64 [m], in [0, 2^32).

    Raises:
        ValueError: a key is out of range; on a GPU that is not checked, because it would have to be waited for.
    """
    if not on_host(uid.device):
        return philox_uniforms(stream, size, uid, step, position)
    keys = host_keys(uid, step, position)
    return torch.from_numpy(np.stack([stream.uniform(size, uid=uid, step=step, position=position) for uid, step, position in keys]))


def philox_uniforms(stream: Stream, size: int, uid: Tensor, step: Tensor, position: Tensor) -> Tensor:
    """The twin: `uniforms` without the host, which waits for the device at most at a stream's first use."""
    key = tuple(signed(int(word)) for word in stream.key)
    block = torch.arange(1, -(-size // 4) + 1, device=uid.device)[None]  # numpy counts up before it draws
    place = (position << 32 | step)[:, None]
    draw = _pipeline(uid.device) if len(uid) > 1 else _four_uniforms  # torch would compile anew for a single row
    return torch.stack(draw(block, place, uid[:, None], _round_keys(key, uid.device)), -1).flatten(1)[:, :size]


def _four_uniforms(block: Tensor, place: Tensor, uid: Tensor, round_keys: Tensor) -> tuple[Tensor, ...]:
    """Uniforms from the four words of each block, float64 in the shape that the counters have together; their third word is 0.

    Args:
        block, place, uid: int64, words of the counters.
        round_keys: int64 [10, 2].
    """
    left, right = map(signed, _MULTIPLIERS)
    words = block, place, torch.zeros_like(place), uid
    for first, second in round_keys.unbind():
        (high_left, low_left), (high_right, low_right) = _product(words[0], left), _product(words[2], right)
        words = high_right ^ words[1] ^ first, low_right, high_left ^ words[3] ^ second, low_left
    return tuple((((word >> 12) & (1 << 52) - 1).double() + 0.5) * 2.0**-52 for word in words)


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of the unsigned 128-bit products with a `signed` factor that is negative, as both multipliers are.

    Halves are multiplied as signed numbers, whose products and sums fit into 64 bits: a compiler may take it that nothing overflows. The
    high word of the unsigned product is that of the signed one, plus each operand that goes with a negative one.
    """
    low, high = words & _LOW, words >> 32
    factor_low, factor_high = -(-factor & _LOW), -(-factor >> 32)
    upper = high * factor_low + (low * factor_low >> 32)
    middle = low * factor_high + (upper & _LOW)
    signed_high = high * factor_high + (upper >> 32) + (middle >> 32)
    return signed_high + words + (words >> 63 & factor), words * factor


@functools.lru_cache(maxsize=64)
def _round_keys(key: tuple[int, int], device: torch.device) -> Tensor:
    """int64 [10, 2], from a `signed` key."""
    rows = [[signed((word + number * step) % (1 << 64)) for word, step in zip(key, _KEY_STEPS, strict=True)] for number in range(_ROUNDS)]
    return torch.tensor(rows, device=device)


@functools.cache
def _pipeline(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """`_four_uniforms`; on a GPU as one kernel instead of some three hundred.

    TORCH_COMPILE_DISABLE=1 in the environment keeps torch from compiling.
    """
    return _four_uniforms if device.type == "cpu" else compiled(device)


def compiled(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """`_four_uniforms` compiled for a device; itself where that fails or gives other bits."""
    fused = torch.compile(_four_uniforms, dynamic=True)
    place, uid = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 50, 1), generator=torch.Generator().manual_seed(0)).to(device)
    sample = torch.arange(1, 34, device=device)[None], place, uid, _round_keys((-1, 1 << 31), device)
    try:
        agree = all(map(torch.equal, fused(*sample), _four_uniforms(*sample)))
    except Exception as error:  # a missing compiler, Triton or driver each have errors of their own
        _log.warning("token noise is not compiled for %s: %s", device, str(error).partition("\n")[0])
        return _four_uniforms
    if not agree:
        _log.warning("token noise is not compiled for %s: its bits would differ", device)
    return fused if agree else _four_uniforms
