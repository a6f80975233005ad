"""Options of the parts: what is taken where a recipe names none, and which values are refused."""

from __future__ import annotations

import importlib
from dataclasses import asdict

import pytest

DEFAULTS = {
    "advantages.best_worst": {"margin": 0.0},
    "advantages.labels": {"threshold": 0.5},
    "advantages.softmax": {"psi": 1.0},
    "advantages.step_difference": {"epsilon": 1e-4},
    "advantages.z_score": {"epsilon": 1e-4},
    "likelihoods.by_sign": {"beta": 1.5, "omega": 0.5, "omega_positive": 0.0, "rescale": True},
    "likelihoods.eubo": {"beta": 1.5, "rescale": False},
    "likelihoods.trajectory": {"merged": False, "granularity": "token"},
    "objectives.dpo": {"beta": 0.2, "label_smoothing": 0.0},
    "objectives.ipo": {"tau": 0.1, "normalize": "none"},
    "objectives.kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "objectives.self_normalized": {"clip_low": 0.0, "clip_high": 5.0},
    "objectives.sequence_clip": {"clip_low": 0.2, "clip_high": 0.2},
    "objectives.simpo": {"beta": 2.0, "gamma": 1.0},
    "objectives.token_clip": {"clip_low": 0.2, "clip_high": 0.2},
    "views.adaptive": {"draws": 8, "edges": []},
    "views.all_masks": {"max_tokens": 12},
    "views.block_random": {"draws": 2, "block_length": 0, "prompt_mask": 0.15},
    "views.chain": {"draws": 1, "order": "forward"},
    "views.complement_plus_full": {"draws": 1, "low": 0.2, "high": 0.8},
    "views.coupled": {"draws": 2, "levels": "independent"},
    "views.elbo": {"draws": 2, "masks_per_level": 1, "levels": "independent"},
    "views.full_mask": {"draws": 1, "prompt_mask": 0.15},
    "views.mask_ratio": {"draws": 1, "t_min": 0.0, "drop_prompt": 0.0, "weight": "plain"},
    "views.quadrature": {"draws": 1, "points": 3},
    "views.supervised": {"draws": 1, "low": 0.0, "high": 1.0, "epsilon": 1e-3, "geometric": 0.3},
    "views.time_form": {"draws": 2, "masks_per_level": 1, "epsilon": 1e-3, "levels": "independent"},
    "views.trajectory": {"shrink": 1, "segments": 0, "top": 0},
}

ACCEPTED = [
    ("views.elbo", {"draws": 1}),
    ("views.elbo", {"draws": 6, "masks_per_level": 3}),
    ("views.adaptive", {"draws": 2, "edges": [0.0, 0.3, 1.0]}),
    ("views.mask_ratio", {"t_min": 0.0, "drop_prompt": 1.0, "weight": "elbo"}),
    ("views.supervised", {"low": 0.3, "high": 1.0}),
    ("views.chain", {"draws": 3, "order": "random"}),
    ("objectives.ipo", {"tau": 0.001, "normalize": "length"}),
    ("likelihoods.cross_entropy", {"count": "masked"}),
]

REFUSED = [
    ("views.elbo", {"draws": 0}, "draws and masks_per_level must be at least 1, got draws=0 and masks_per_level=1"),
    ("views.elbo", {"draws": 2, "masks_per_level": 0}, "got draws=2 and masks_per_level=0"),
    ("views.elbo", {"draws": 3, "masks_per_level": 2}, "draws must be a multiple of masks_per_level=2, got 3"),
    ("views.adaptive", {"draws": 2, "edges": [0.0, 1.0]}, r"edges must be 3 numbers \(draws \+ 1\) that ascend from 0 to 1"),
    ("views.adaptive", {"draws": 2, "edges": [0.1, 0.3, 1.0]}, "ascend from 0 to 1"),
    ("views.adaptive", {"draws": 2, "edges": [0.0, 0.3, 0.9]}, "ascend from 0 to 1"),
    ("views.supervised", {"geometric": 1.0}, "geometric and epsilon must lie between 0 and 1"),
    ("views.supervised", {"epsilon": 1.0}, "geometric and epsilon must lie between 0 and 1"),
    ("views.adaptive", {"draws": 3, "edges": [0.0, 0.3, 0.3, 1.0]}, "ascend from 0 to 1"),
    ("views.adaptive", {"draws": 3, "edges": [0.0, 0.5, 0.3, 1.0]}, "ascend from 0 to 1"),
    ("views.mask_ratio", {"t_min": 1.0}, r"t_min must be in \[0, 1\)"),
    ("views.mask_ratio", {"t_min": -0.1}, r"t_min must be in \[0, 1\)"),
    ("views.mask_ratio", {"drop_prompt": 1.1}, r"drop_prompt in \[0, 1\]"),
    ("views.mask_ratio", {"drop_prompt": -0.1}, r"drop_prompt in \[0, 1\]"),
    ("views.mask_ratio", {"weight": "none"}, "weight must be plain or elbo, got 'none'"),
    ("views.supervised", {"masks": "level"}, "masks must be count or time, got 'level'"),
    ("views.supervised", {"loss_weight": "one"}, "loss_weight must be inverse_t, plain or cart, got 'one'"),
    ("views.supervised", {"low": 0.5, "high": 0.5}, "0 <= low < high <= 1, got 0.5 and 0.5"),
    ("views.supervised", {"low": -0.1}, "0 <= low < high <= 1"),
    ("views.supervised", {"high": 1.1}, "0 <= low < high <= 1"),
    ("views.supervised", {"geometric": 0.0}, "geometric and epsilon must lie between 0 and 1"),
    ("views.supervised", {"geometric": 1.0}, "geometric and epsilon must lie between 0 and 1"),
    ("views.supervised", {"epsilon": 0.0}, "geometric and epsilon must lie between 0 and 1"),
    ("views.supervised", {"epsilon": 1.0}, "geometric and epsilon must lie between 0 and 1"),
    ("views.chain", {"order": "upward"}, "order must be one of forward, backward, random, got 'upward'"),
    ("views.chain", {"draws": 2}, "draws=2 of order forward would all be the same"),
    ("objectives.ipo", {"tau": 0.0}, r"tau must be positive, got 0\.0"),
    ("objectives.ipo", {"normalize": "token"}, "normalize must be none or length, got 'token'"),
    ("likelihoods.cross_entropy", {"count": "all"}, "count must be scored or masked, got 'all'"),
]


def config(part: str, **options: object) -> object:
    return importlib.import_module(f"rlhub.{part}").Config(**options)


@pytest.mark.parametrize("part", DEFAULTS)
def test_defaults_are_the_published_ones(part: str) -> None:
    fields = asdict(config(part))
    assert {name: fields[name] for name in DEFAULTS[part]} == DEFAULTS[part]


@pytest.mark.parametrize(("part", "options"), ACCEPTED)
def test_values_at_the_edge_are_accepted(part: str, options: dict) -> None:
    assert asdict(config(part, **options)).items() >= options.items()


@pytest.mark.parametrize(("part", "options", "message"), REFUSED)
def test_values_that_make_no_sense_are_refused(part: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(part, **options)
