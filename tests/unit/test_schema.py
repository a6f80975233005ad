"""Every bound and choice of the recipe's schema, taken from the schema itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest

from rlhub.config.recipe import validate
from rlhub.config.schema import FORMER_KEYS, PHASE_ORDERS, Recipe, RunConfig, SamplerConfig
from rlhub.config.values import choices_of, json_schema, range_of, typed_recipe
from rlhub.errors import RecipeError
from rlhub.records.trackers import TRACKERS
from rlhub.samplers import TRACE

DEFAULTS = dataclasses.asdict(Recipe())
BOUNDS = {"minimum": -1, "exclusiveMinimum": 0, "maximum": 1, "exclusiveMaximum": 0}  # and the way to a number outside, 0: itself


def leaves(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted keys and their JSON Schemas."""
    for name, field in schema["properties"].items():
        if "properties" in field:
            yield from leaves(field, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(leaves(json_schema(Recipe)))
PARTS_OF = {key: [field, *field.get("anyOf", []), *field.get("prefixItems", []), field.get("items", {})] for key, field in FIELDS.items()}
BOUNDED = [
    (key, index, part["type"], bound, part[bound])
    for key, parts in PARTS_OF.items()
    for index, part in enumerate(parts)
    for bound in BOUNDS
    if bound in part
]
CHOSEN = [(key, part) for key, parts in PARTS_OF.items() for part in parts if choices_of(part)]


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The default recipe's values with another one at a key."""
    values = copy.deepcopy(DEFAULTS)
    *sections, name = key.split(".")
    functools.reduce(dict.__getitem__, sections, values)[name] = value
    return values


def fitted(key: str, value: Any) -> Any:
    """The value, as an item of the key's list where that is one: its last for 1, so that pairs ascend, else its first."""
    default = functools.reduce(dict.__getitem__, key.split("."), DEFAULTS)
    if isinstance(value, list) or not isinstance(default, list | tuple):
        return value
    return [*default[:-1], value] if value == 1 else [value, *default[1:]]


def refused(key: str, value: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        typed_recipe(with_value(key, value))
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("key", "part", "kind", "bound", "limit"), BOUNDED)
def test_a_bound_is_kept(key, part, kind, bound, limit):
    """The bound itself fits, unless it is an exclusive one; the next number outside does not, and neither do infinity and nan."""
    outwards = -1 if bound.endswith("inimum") else 1
    if kind == "integer":
        inside, outside = (limit, limit + outwards) if BOUNDS[bound] else (limit - outwards, limit)
    else:
        beyond, within = math.nextafter(limit, outwards * math.inf), math.nextafter(limit, -outwards * math.inf)
        inside, outside = (limit, beyond) if BOUNDS[bound] else (within, limit)
    typed_recipe(with_value(key, fitted(key, inside)))
    refused(key, fitted(key, outside))
    for number in (math.inf, -math.inf, math.nan):
        refused(key, fitted(key, number))


@pytest.mark.parametrize(
    "key", [key for key, parts in PARTS_OF.items() if any(part.get("type") in ("integer", "number") for part in parts)]
)
def test_every_number_has_a_bound_and_is_no_switch_or_text(key):
    assert any(range_of(part) or choices_of(part) for part in PARTS_OF[key])
    refused(key, fitted(key, True))
    refused(key, fitted(key, "1"))


@pytest.mark.parametrize(("key", "part"), CHOSEN, ids=[key for key, _ in CHOSEN])
def test_choices_are_kept(key, part):
    for choice in choices_of(part):
        typed_recipe(with_value(key, fitted(key, choice)))
    strange = f"{choices_of(part)[0]}x"
    assert strange in refused(key, fitted(key, strange))


@pytest.mark.parametrize(
    ("key", "fitting", "others"),
    [
        (
            "algorithm.reference",
            ["sync_every:1", "sync_every:64"],
            ["sync_every:", "sync_every:0", "sync_every:-1", "sync_every:1x", "xsync_every:1", ""],
        ),
        ("algorithm.on_invalid", ["value:0", "value:-1.5", "value:.5"], ["value:", "value:x", "value:1.", "value:1e3", "value"]),
        ("run.name", ["a", "a.b", "a b", 5], ["", ".", ".a", "a/b", "a\\b", "/a", True]),
        ("run.phases", PHASE_ORDERS, [[], ["online", "sft"], ["sft", "sft"], ["sft", "online", "pairs"], "sft"]),
        ("sampler.guidance_interval", [[0, 1], [0.2, 0.3]], [[0.5, 0.5], [1, 0], [0], [0, 0.5, 1], [-0.1, 1], [0, 1.1], []]),
        ("sft.mask_range", [[0, 1], [0.2, 0.3]], [[0.5, 0.5], [1, 0], [0], [0, 0.5, 1], [-0.1, 1], [0, 1.1], []]),
        ("learner.optimizer.betas", [[0, 0], [0.9, 0.999]], [[0.9], [0.9, 0.9, 0.9], [0.9, 1], 0.9]),
        ("eval_temperatures", [[0], [0.0, 0.5, 2]], [[], [0.5, -0.1], 1]),
    ],
)
def test_small_languages(key, fitting, others):
    for value in fitting:
        typed_recipe(with_value(key, value))
    for value in others:
        refused(key, value)


def test_the_default_recipe_is_in_range_and_comes_back_with_its_types():
    recipe = typed_recipe(DEFAULTS)
    assert recipe == Recipe()
    assert typed_recipe({}) == Recipe()
    assert recipe.learner.optimizer.betas == (0.9, 0.99)


def test_values_are_not_shared_with_what_they_were_made_from():
    values = copy.deepcopy(DEFAULTS)
    typed_recipe(values).algorithm.objective["name"] = "other"
    assert typed_recipe({}).algorithm.objective == Recipe().algorithm.objective


def test_whole_numbers_become_real_ones_where_those_are_meant():
    assert isinstance(typed_recipe(with_value("learner.optimizer.learning_rate", 1)).learner.optimizer.learning_rate, float)


@pytest.mark.parametrize("key", FORMER_KEYS)
def test_a_former_key_says_what_became_of_it(key):
    *sections, name = key.split(".")
    assert key not in FIELDS
    values: Any = 1
    for part in reversed([*sections, name]):
        values = {part: values}
    with pytest.raises(RecipeError) as caught:
        typed_recipe(values)
    assert str(caught.value) == f"{key}: {FORMER_KEYS[key]}"


def test_sections_made_in_python_are_free_until_they_are_checked():
    recipe = Recipe(run=RunConfig(name="a", steps=0))
    changed = dataclasses.replace(recipe, sampler=dataclasses.replace(SamplerConfig(), cache="exct"))
    with pytest.raises(RecipeError, match=r"^run\.steps: must be at least 1, got 0$"):
        validate(recipe)
    changed.run.steps = 1
    with pytest.raises(RecipeError, match=r"^sampler\.cache: no such choice 'exct'; did you mean exact\?$"):
        validate(changed)


def test_the_schema_names_the_trackers_and_trace_fields_that_there_are():
    assert set(choices_of(FIELDS["run.trackers"]["items"])) == set(TRACKERS)
    assert set(choices_of(FIELDS["sampler.records"]["items"])) == set(TRACE)
    assert {phase for order in PHASE_ORDERS for phase in order} == set(choices_of(FIELDS["run.phases"]["items"]))


@pytest.mark.parametrize("key", FIELDS)
def test_whatever_stands_at_a_key_is_taken_or_refused_by_name(key):
    for value in (None, True, 3, -1.5, math.nan, "", "x", [], [1], ["x", None], {"a": 1}, {"name": 3}, [[{}]]):
        try:
            typed_recipe(with_value(key, value))
        except RecipeError as error:
            assert str(error).startswith(f"{key}: ")
            assert "\n" not in str(error)
