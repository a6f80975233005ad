"""Numbers of the algorithm files that a run depends on, as the papers and their released code have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ALGORITHMS = Path(__file__).parents[2] / "recipes" / "algorithms"
PUBLISHED: dict[str, dict[str, Any]] = {
    "justgrpo": {  # LeapLabTHU/JustGRPO, train.py and grpo.py
        "learner.optimizer.learning_rate": 5e-6,
        "learner.optimizer.betas": [0.9, 0.999],
        "learner.optimizer.weight_decay": 0.0,
        "learner.optimizer.max_grad_norm": 1.0,
        "algorithm.completions_per_prompt": 16,
        "algorithm.objective.clip_low": 0.2,
        "algorithm.objective.clip_high": 0.2,
        "algorithm.kl.coefficient": 0.0,
        "algorithm.updates": 1,
    },
    "spg": {  # facebookresearch/SPG, spg_mix scripts
        "sampler.temperature": 0.9,
        "learner.optimizer.learning_rate": 3e-6,
        "learner.optimizer.max_grad_norm": 0.2,
        "algorithm.likelihood.beta": 1.5,
        "algorithm.likelihood.omega": 0.5,
        "algorithm.views.draws": 2,
        "algorithm.views.prompt_mask": 0.15,
        "algorithm.updates": 4,
        "algorithm.completions_per_prompt": 6,
    },
    "stabledrl": {  # JianyuanZhong/StableDRL, configs/countdown_spg_snis.yaml
        "sampler.temperature": 0.9,
        "learner.optimizer.learning_rate": 1e-6,
        "algorithm.objective.clip_high": 5.0,
        "algorithm.updates": 2,
        "algorithm.completions_per_prompt": 16,
    },
    "mdpo": {  # autonomousvision/mdpo; arXiv 2508.13148
        "sampler.temperature": 0.1,
        "algorithm.kl.coefficient": 0.02,
        "algorithm.views.top": 16,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    recipe = OmegaConf.load(ALGORITHMS / f"{name}.yaml")
    found = {key: OmegaConf.select(recipe, key) for key in PUBLISHED[name]}
    assert {key: list(value) if OmegaConf.is_list(value) else value for key, value in found.items()} == PUBLISHED[name]


@pytest.mark.parametrize("file", sorted(ALGORITHMS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_algorithm_states_its_learning_rate(file: Path) -> None:
    """The schema's own rate is one for small models from scratch."""
    recipe = OmegaConf.load(file)
    assert OmegaConf.select(recipe, "learner.optimizer.learning_rate") is not None or "extends" in recipe
