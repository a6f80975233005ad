"""Combine: a weighted sum of other rewards, with gates, partial-credit curves and clipping.

    reward:
      name: combine
      parts:
        - {reward: {name: countdown}, label: answer, weight: 1.0}
        - {reward: {name: format_tags}, weight: 0.1}
        - {reward: {name: price, per_token: 0.001}, gate: {part: answer, at_least: 1.0}}
      clip: [-1.0, 1.1]

value = clip(sum of weight * curve(value) over the parts whose gate is open). The first part is the main one: its `unparsed` is the
status of the whole, and a completion is accurate when the first part's value is 1.0. A part that fails makes the whole fail with its
status, unless it says `optional: true`: then it adds nothing, and its own status is kept among the parts.

Options of a part: `reward` (needed), `label` (the reward's name by default), `weight` (1.0), `optional` (false), `gate` (`{part: LABEL,
at_least: VALUE}`; a gate on a part that failed stays closed), `curve` (`[[value, credit], ...]` with rising values: linear in between,
flat outside, e.g. `[[0.5, 0], [1, 1]]` for no credit below one half).

The limits of the reward pool cover an item with all its parts, unless every part has limits of its own.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rewards import Grader, Item, Prompt, load_grader
from rlhub.types import RewardResult


@dataclass(frozen=True)
class Config:
    """`parts`: see the module. `clip`: lowest and highest value of the sum; none by default."""

    parts: list[dict[str, Any]] = field(default_factory=list)
    clip: list[float] | None = None

    def __post_init__(self) -> None:
        _loaded(self)
        if self.clip is not None and (len(self.clip) != 2 or not self.clip[0] < self.clip[1]):
            raise ValueError(f"clip must be [low, high] with low < high, got {list(self.clip)}")


@dataclass(frozen=True)
class _Part:
    reward: dict[str, Any]
    label: str = ""
    weight: float = 1.0
    optional: bool = False
    gate: dict[str, Any] | None = None
    curve: list[list[float]] | None = None


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """The combined grade; see the module."""
    return _combined(config, [grader.grade_alone((prompt, completion, row)) for _, grader in _loaded(config)])


def grade_batch(items: Sequence[Item], config: Config) -> list[RewardResult]:
    """The combined grades; every part gets the whole batch, and what it raises is raised."""
    grades = [grader.grade_batch(items) for _, grader in _loaded(config)]
    return [_combined(config, row) for row in zip(*grades, strict=True)]


def batched(config: Config) -> bool:
    """Is any part faster in batches?"""
    return any(grader.batched for _, grader in _loaded(config))


def own_limits(config: Config) -> bool:
    """Do all parts bound their own time and memory? Otherwise the pool's deadline covers the whole, so that no part can hang it."""
    return all(grader.own_limits for _, grader in _loaded(config))


def prepare(config: Config) -> None:
    """Prepares every part."""
    for _, grader in _loaded(config):
        grader.prepare()


def version(config: Config) -> str:
    """The versions of the parts."""
    return " ".join(grader.version for _, grader in _loaded(config))


def _combined(config: Config, results: Sequence[RewardResult]) -> RewardResult:
    """One grade from those of the parts, in their order."""
    parts = [part for part, _ in _loaded(config)]
    grades = {part.label: result for part, result in zip(parts, results, strict=True)}
    total = 0.0
    for part in parts:
        graded = grades[part.label]
        if not graded.valid:
            if part.optional:
                continue
            return RewardResult(math.nan, graded.status, f"part {part.label}: {graded.detail}", grades)
        if part.gate is None or _is_open(part.gate, grades):
            total += part.weight * (graded.value if part.curve is None else _credit(part.curve, graded.value))
    if config.clip is not None:
        total = min(max(total, config.clip[0]), config.clip[1])
    main = grades[parts[0].label]
    return RewardResult(total, main.status if main.valid else "ok", main.detail, grades)


def _is_open(gate: dict[str, Any], grades: dict[str, RewardResult]) -> bool:
    graded = grades[gate["part"]]
    return graded.valid and graded.value >= gate["at_least"]


def _credit(curve: list[list[float]], value: float) -> float:
    """Linear interpolation, constant beyond the ends."""
    knots = [knot for knot, _ in curve]
    right = bisect.bisect_right(knots, value)
    if right in (0, len(knots)):
        return curve[min(right, len(knots) - 1)][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (value - x0) / (x1 - x0)


def _loaded(config: Config) -> tuple[tuple[_Part, Grader], ...]:
    """The parts with their graders, loaded once in a process."""
    return _load(json.dumps([dict(part) for part in config.parts], sort_keys=True))


@lru_cache(maxsize=64)
def _load(description: str) -> tuple[tuple[_Part, Grader], ...]:
    parts = [_part(index, options) for index, options in enumerate(json.loads(description))]
    if not parts:
        raise ValueError("parts must name at least one reward, e.g. parts: [{reward: {name: countdown}}]")
    labels = [part.label for part in parts]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"parts: two of them have the label {label!r}; give each its own label")
    for part in parts:
        if part.gate is not None and (part.gate["part"] not in labels or part.gate["part"] == part.label):
            raise ValueError(f"parts: the gate of {part.label!r} waits for {part.gate['part']!r}, which is none of the others: {labels}")
    return tuple((part, load_grader(part.reward)) for part in parts)


def _part(index: int, options: dict[str, Any]) -> _Part:
    """One part of a sum from its options.

    Raises:
        ValueError: an option is unknown or missing, beginning with its place.
    """
    known = [option.name for option in dataclasses.fields(_Part)]
    for key in options:
        if key not in known:
            raise ValueError(f"parts[{index}]: unknown option {key!r}; options: {', '.join(known)}")
    if not isinstance(options.get("reward"), dict):
        raise ValueError(f"parts[{index}] needs a reward, e.g. {{reward: {{name: countdown}}, weight: 1.0}}")
    part = _Part(**{"label": options["reward"].get("name", ""), **options})
    where = f"parts[{index}] ({part.label})"
    if isinstance(part.weight, bool) or not isinstance(part.weight, int | float) or not math.isfinite(part.weight):
        raise ValueError(f"{where}: weight must be a number, got {part.weight!r}")
    if part.gate is not None and not (isinstance(part.gate, dict) and sorted(part.gate) == ["at_least", "part"]):
        raise ValueError(f"{where}: gate must be {{part: LABEL, at_least: VALUE}}, got {part.gate!r}")
    if part.curve is not None:
        points = part.curve if isinstance(part.curve, list) else []
        if not points or any(not isinstance(point, list) or len(point) != 2 for point in points):
            raise ValueError(f"{where}: curve must be [[value, credit], ...], got {part.curve!r}")
        if any(left[0] >= right[0] for left, right in itertools.pairwise(points)):
            raise ValueError(f"{where}: the values of curve must rise, got {part.curve!r}")
    return part
