"""Longer contexts from a larger rotary base: NTK scaling, as language models use it and as diffusion needs it (UltraLLaDA, 2510.10481).

A base b turns the first dimensions of a head so slowly that training never showed them a full turn. NTK scaling enlarges the base until
those below the critical dimension, which did turn, cover the longer context as they covered the shorter one. A causal model sees relative
positions in [0, T); a bidirectional one sees (-T, T), which is twice the span, in training and after.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rlhub.config.schema import RopeConfig


Config = TypeVar("Config")
CONTEXT_FIELDS = ("max_sequence_length", "max_position_embeddings")  # the context's name in the families' configs
SPAN = {"ntk": 1, "diffusion_ntk": 2}  # lengths of the span of relative positions, in contexts


def critical_dimension(theta: float, head_dim: int, span: float) -> int:
    """2 ceil(d / 2 log_b(span / 2 pi)): dimensions of a head that turn at least once over `span` positions (LongLLaDA, 2506.14429)."""
    return 2 * math.ceil(head_dim / 2 * math.log(span / (2 * math.pi), theta))


def base_factor(theta: float, head_dim: int, trained_length: int, target_length: int, scaling: str = "diffusion_ntk") -> float:
    """The factor of the rotary base that takes a model from `trained_length` to `target_length` tokens.

    lambda = (s T_target / 2 pi)^(d / d_crit) / b with d_crit of s T_trained, where s = 1 for `ntk` (LongLLaDA) and 2 for `diffusion_ntk`
    (UltraLLaDA, section 3.2).

    Example:
        >>> round(base_factor(5e5, 128, 4096, 131072), 1)                       # LLaDA to 128K
        561.9

    Raises:
        ValueError: the scaling is unknown, or the lengths do not grow or are too short for it.
    """
    if scaling not in SPAN:
        raise ValueError(f"rope scaling {scaling!r} is unknown; choose ntk, diffusion_ntk or none")
    if not trained_length < target_length:
        raise ValueError(f"rope target_length={target_length} must be longer than the trained {trained_length} tokens")
    critical = critical_dimension(theta, head_dim, SPAN[scaling] * trained_length)
    if critical < 2:
        raise ValueError(f"a model trained on {trained_length} tokens has no dimension that turned once; train on longer rows")
    return (SPAN[scaling] * target_length / (2 * math.pi)) ** (head_dim / critical) / theta


def extend(config: Config, rope: RopeConfig) -> Config:
    """A family's config for the longer context, the new base baked in as UltraLLaDA's is; the same config for scaling `none`.

    Raises:
        ValueError: the family has no rotary base, the target is missing, or the lengths do not fit.
    """
    if rope.scaling == "none":
        return config
    names = {field.name for field in fields(config)}
    context = next((name for name in CONTEXT_FIELDS if name in names), None)
    if context is None or "rope_theta" not in names:
        raise ValueError(f"rope scaling needs a family with a rotary base and a context; {type(config).__module__} has none")
    if rope.target_length is None:
        raise ValueError(f"rope scaling {rope.scaling} needs rope.target_length, the context in tokens")
    shape = config.shape()  # type: ignore[attr-defined]  # as every family with a rotary base has
    trained = rope.trained_length or shape.max_length
    factor = base_factor(shape.rope_theta, shape.rotary_dim or shape.head_dim, trained, rope.target_length, rope.scaling)
    return replace(config, rope_theta=shape.rope_theta * factor, **{context: rope.target_length})
