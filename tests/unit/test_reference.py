"""The recipe reference and the JSON Schema: they are current, and the schema takes what ships and refuses mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlhub.config.recipe import Loader, dump_recipe
from rlhub.config.reference import recipe_schema, reference_page, schema_text
from rlhub.config.schema import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in ("experiments", "labs", "data"))
HOW = "write both files anew, as the head of rlhub/config/reference.py says"


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """The committed file, as an editor reads it."""
    text = (ROOT / "recipes/recipe.schema.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator.check_schema(json.loads(text))
    return jsonschema.Draft202012Validator(json.loads(text))


def problems(schema: jsonschema.Draft202012Validator, text: str) -> list[str]:
    """Where a recipe does not fit, as dotted keys."""
    recipe: Any = yaml.load(text, Loader)
    return [".".join(map(str, error.absolute_path)) for error in schema.iter_errors({} if recipe is None else recipe)]


def test_the_page_is_current():
    assert (ROOT / "docs/recipe_reference.md").read_text(encoding="utf-8") == reference_page(), HOW


def test_the_schema_is_current():
    assert (ROOT / "recipes/recipe.schema.json").read_text(encoding="utf-8") == schema_text(), HOW
    assert json.loads(schema_text()) == json.loads(json.dumps(recipe_schema()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_fits(schema, path):
    assert problems(schema, path.read_text(encoding="utf-8")) == []


def test_a_resolved_recipe_fits(schema):
    assert problems(schema, dump_recipe(Recipe())) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "extends: base.yaml\n",
        "algorithm: {views: {draws: 4}}",  # of the part that a base names
        "algorithm: {views: {name: ./mine.py, anything: 1}}",
        "algorithm: {objective: {name: my_package.mine, anything: 1}}",
        "algorithm: {reference: sync_every:8, auxiliary: [{name: sft, weight: 0.05, on: chosen}]}",
        "task: {reward: {name: 'grader.py:grade'}}",
        "task: {reward: {name: none}}",
        "task: {name: sort, train: {digits: 4}}",
        "model: {family: llada, config: {d_model: 64}}",
    ],
)
def test_what_fits(schema, text):
    assert problems(schema, text) == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("extends: 3", "extends"),
        ("extends: [3]", "extends.0"),
        ("run: {stps: 3}", "run"),
        ("run: {deterministic: true}", "run"),
        ("run: {steps: 0}", "run.steps"),
        ("run: {phases: [online, sft]}", "run.phases"),
        ("run: {name: a/b}", "run.name"),
        ("sampler: {cache: exct}", "sampler.cache"),
        ("sampler: {name: threshold, options: {treshold: 0.5}}", "sampler.options"),
        ("algorithm: {views: coupled}", "algorithm.views"),
        ("algorithm: {views: {name: 3}}", "algorithm.views.name"),
        ("algorithm: {views: {name: coupled, drws: 2}}", "algorithm.views"),
        ("algorithm: {views: {name: coupled, draws: many}}", "algorithm.views.draws"),
        ("algorithm: {reference: sync_every}", "algorithm.reference"),
        ("algorithm: {auxiliary: [{name: sft}]}", "algorithm.auxiliary.0"),
        ("task: {reward: {name: regex, pattern: 3}}", "task.reward.pattern"),
        ("task: {name: sort, eval: {digts: 4}}", "task.eval"),
        ("model: {family: llada, config: {d_modl: 64}}", "model.config"),
        ("pairs: {data: {pth: x}}", "pairs.data"),
        ("learner: {optimizer: {betas: [0.9]}}", "learner.optimizer.betas"),
    ],
)
def test_what_does_not_fit(schema, text, key):
    assert problems(schema, text) == [key]


def test_each_key_says_what_it_means():
    def missing(section: dict[str, Any], prefix: str) -> list[str]:
        keys = []
        for name, field in section["properties"].items():
            if prefix or name != "extends":
                keys += [f"{prefix}{name}"] if not field.get("description") else []
                keys += missing(field, f"{prefix}{name}.") if "additionalProperties" in field and field.get("properties") else []
        return keys

    assert missing(recipe_schema(), "") == []


@pytest.mark.parametrize(
    "line",
    [
        "| `run.steps` | a whole number (at least 1) | `100` | RL or preference steps. |",
        "| `run.runtime` | ray or local | `ray` |",
        "| `algorithm.reference` | none, frozen, adapter_off or sync_every:N | `none` |",
        "| `sft.optimizer.learning_rate` | a number (above 0) | `0.002` |",  # the section's own default, not the class's
        "| `learner.optimizer.learning_rate` | a number (above 0) | `0.0001` |",
        "| `reward_pool.retries` | a whole number (0 or more) | `1` |",
        "`draws`: a whole number, `2`; `levels`: text, `independent` |",
    ],
)
def test_the_page_has_type_range_default_and_meaning(line):
    assert line in reference_page()
