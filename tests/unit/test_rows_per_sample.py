"""What `rlhub plan` counts is what is made: forwards of a sample under every views."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhub.algorithm.batching import sequence_batch
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.parts import load_part, part_names
from rlhub.types import Credit

LENGTH = 4  # tokens, and denoising steps
PROFILE = Profile(mask_id=0, eos_id=1, stop_ids=(1,), pad_id=1, lora_targets="")
OPTIONS = {  # beside the defaults
    "coupled": [{"draws": 3}],
    "elbo": [{"draws": 4, "masks_per_level": 2}],
    "quadrature": [{"draws": 2, "points": 5}],
    "chain": [{"draws": 2, "order": "random"}],
    "complement_plus_full": [{"draws": 2}],
    "trajectory": [{"shrink": 2}, {"shrink": 3}, {"segments": 3}, {"segments": 9}],
    "all_masks": [{"max_tokens": 4}],
}
CASES = [(name, options) for name in part_names("views") for options in [{}, *OPTIONS.get(name, [])]]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_the_rows_of_a_sample_are_as_many_as_the_plan_says(name: str, options: dict) -> None:
    module, draws = load_part("views", name), np.random.default_rng(0)
    config, count = module.Config(**options), 200
    batch = sequence_batch(
        [draws.integers(2, 9, 3) for _ in range(count)],
        [draws.integers(2, 9, LENGTH) for _ in range(count)],
        range(count),
        unmask_step=[draws.permutation(LENGTH).astype(np.int16) for _ in range(count)],
        logp_model=[-draws.random(LENGTH).astype(np.float32) for _ in range(count)],
        block_length=LENGTH,
    )
    credit = Credit(torch.ones(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool))
    views = module.make(batch, credit, config, Noise(0).stream("views"), 0, PROFILE)
    # A draw that hides nothing has no row, so among many samples the one with the most rows has them all.
    assert torch.bincount(views.sample, minlength=count).max() == module.rows_per_sample(config, LENGTH)
