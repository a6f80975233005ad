"""Keyed noise and rollouts on a GPU against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhub import oracle
from rlhub.config.schema import SamplerConfig
from rlhub.engines import device_noise
from rlhub.engines.row_stats import TokenNoise
from rlhub.engines.torch_engine import Engine
from rlhub.models import dream, llada, sdar
from rlhub.noise import Noise
from rlhub.types import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NOISE = Noise(run_seed=2**64 - 5)
WORD, HALF = 1 << 64, 1 << 32
NEAR_TIE = 1e-4  # nats; below it the rounding of another device may decide otherwise


def cuda_keys(count: int) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
    """(uid, step, position) uint64 [count, 3] with both extremes, and as tensors."""
    keys = np.random.default_rng(0).integers((WORD, HALF, HALF), size=(count, 3), dtype=np.uint64)
    keys[0], keys[1] = 0, (WORD - 1, HALF - 1, HALF - 1)
    return keys, torch.from_numpy(keys.view(np.int64)).cuda().unbind(1)


@pytest.mark.parametrize("draw", [device_noise.philox_uniforms, device_noise.uniforms])
@pytest.mark.parametrize(("count", "size"), [(1, 1000), (2, 4), (33, 1001), (5, 126_464)])
def test_uniforms_are_bit_equal(draw, count, size):
    """As one kernel where torch compiles, and for a single row as many."""
    keys, tensors = cuda_keys(max(count, 2))
    stream = NOISE.stream("token")
    found = draw(stream, size, *(values[:count] for values in tensors))
    assert found.device.type == "cuda"
    expected = [stream.uniform(size, uid=uid, step=step, position=at) for uid, step, at in keys[:count].tolist()]
    np.testing.assert_array_equal(found.cpu(), expected)


def test_the_race_has_the_winners_of_the_cpu_and_does_not_wait():
    count, vocab_size = 700, 32_000
    scores = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 20, count)[:, None]
    scores -= scores.amax(1, keepdim=True)
    weights = scores.exp()
    _, tensors = cuda_keys(count)
    there, here = (TokenNoise(NOISE.stream("token"), *(values.to(device) for values in tensors)) for device in ("cuda", "cpu"))
    arguments = scores.cuda(), weights.cuda(), weights.sum(1).cuda()
    there.race(*arguments, first=0)  # makes the kernel and the stream's key
    torch.cuda.set_sync_debug_mode("error")
    try:
        won = there.race(*arguments, first=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(won.cpu(), here.race(scores, weights, weights.sum(1), first=0))


@pytest.mark.parametrize("name", ["low_confidence", "random", "threshold", "ancestral"])
@pytest.mark.parametrize("family", [llada, dream, sdar])
def test_rollouts_equal_those_of_the_cpu(family, name):
    """In fp32, token by token, except from the oracle's near ties on."""
    vocab_size, length = 50, 16
    names = {"mask_token_id": 0, "eos_token_id": 1, "vocab_size": vocab_size}
    network = family.build(family.Config.from_published(family.TINY | names)).initialize(torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    random = np.random.default_rng(0)
    requests = [Request(WORD - 1 - 7 * row, row, random.integers(2, vocab_size, 3 + row % 5).astype(np.int32)) for row in range(24)]
    settings = SamplerConfig(name, length=length, steps=8, block_length=4, temperature=1.0)
    margins = [oracle.generate(network, request, settings, NOISE)[1] for request in requests]
    on_cpu = Engine(network).generate(requests, settings, NOISE)
    on_gpu = Engine(network.cuda(), "cuda").generate(requests, settings, NOISE)
    compared = [pair for *pair, margin in zip(on_cpu, on_gpu, margins, strict=True) if margin >= NEAR_TIE]
    assert len(compared) > len(requests) / 2
    for here, there in compared:
        np.testing.assert_array_equal(there.completion_ids, here.completion_ids)
        np.testing.assert_array_equal(there.unmask_step, here.unmask_step)
        np.testing.assert_allclose(there.logp_sample, here.logp_sample, atol=1e-4)
