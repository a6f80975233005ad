"""From plain values to a typed recipe: each value is checked against `rlhub.config.schema`, and what does not fit is said in words.

The words come from the schema's JSON Schema, as do those of the recipe reference, so that an error and the page name the same range.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from rlhub.config.schema import FORMER_KEYS, Recipe
from rlhub.parts import KeyedError, did_you_mean, show

_ADAPTER = TypeAdapter(with_config(ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True))(Recipe))
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "a mapping (key: value)",
}


def typed_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of nested sections; what is missing has its default.

    Raises:
        KeyedError: a key is unknown, or a value has another type or is outside its choices or range.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise _keyed(error.errors(include_url=False)[0], values) from error


def json_schema(fields: type) -> dict[str, Any]:
    """The JSON Schema of a dataclass with every section in its place, without references and made-up titles."""
    schema = TypeAdapter(fields).json_schema(schema_generator=_Untitled)
    sections = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = {**sections[node["$ref"].rpartition("/")[2]], **node}
        is_class = "properties" in node  # whose title is its name
        return {key: inlined(value) for key, value in node.items() if key != "$ref" and not (is_class and key == "title")}

    return dict(inlined(schema))


def words(schema: Mapping[str, Any]) -> str:
    """What fits a JSON Schema, in words: `a whole number (at least 1) or null`."""
    options = [option for part in schema.get("anyOf", [schema]) for option in _options(part)]
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def choices_of(schema: Mapping[str, Any]) -> list[Any]:
    """The values that a JSON Schema lists; none where it lists none."""
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def range_of(schema: Mapping[str, Any]) -> str:
    """The bounds of a number in words; empty where it has none."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if high is not None or below is not None:
        lower = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else "(-inf"
        upper = f"{high:g}]" if high is not None else "2^64)" if below == 1 << 64 else f"{below:g})"
        return f"in {lower}, {upper}"
    if above is not None:
        return f"above {above:g}"
    return "" if low is None else "0 or more" if low == 0 else f"at least {low:g}"


class _Untitled(GenerateJsonSchema):
    """Without titles that repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def _recipe_schema() -> dict[str, Any]:
    return json_schema(Recipe)


def _keyed(problem: ErrorDetails, values: Any) -> KeyedError:
    """The error about the recipe's key where the problem lies."""
    schema, keys = _recipe_schema(), []
    if problem["type"] == "unexpected_keyword_argument":
        *sections, name = map(str, problem["loc"])
        key = ".".join([*sections, name])
        for section in sections:
            schema = schema["properties"][section]
        known = did_you_mean(name, schema["properties"])
        return KeyedError(FORMER_KEYS.get(key, f"unknown key of {sections[-1] if sections else 'recipe'}{known}"), key)
    for step in problem["loc"]:
        if step not in schema.get("properties", {}):
            break  # an item of a list, or one of several types
        schema, values = schema["properties"][step], values[step]
        keys.append(str(step))
    return KeyedError(_refusal(schema, values), ".".join(keys))


def _refusal(schema: Mapping[str, Any], value: Any) -> str:
    """Why a value does not fit, in words."""
    alternatives = [schema, *schema.get("anyOf", [])]
    choices = [str(choice) for option in alternatives for choice in choices_of(option) if not isinstance(choice, list)]
    item_choices = choices_of(schema.get("items", {}))
    strange = [item for item in value if item not in item_choices] if item_choices and isinstance(value, list) else []
    if strange:
        return f"no such choice {show(strange[0])}{did_you_mean(strange[0], item_choices)}"
    if (choices_of(schema) and choices) or get_close_matches(str(value), choices, n=1):
        return f"no such choice {show(value)}{did_you_mean(value, choices)}"
    if _is_number(value, schema) and range_of(schema):
        return f"must be {range_of(schema)}, got {show(value)}"
    example = next((f", for example {option['examples'][0]}" for option in alternatives if "examples" in option), "")
    return f"expected {words(schema)}{example}; got {show(value)}"


def _options(schema: Mapping[str, Any]) -> list[str]:
    """The choices of a JSON Schema, or its type in words."""
    if "title" in schema:
        return [schema["title"]]
    choices = choices_of(schema)
    if choices:
        return [f"[{', '.join(choice)}]" if isinstance(choice, list) else str(choice) for choice in choices]
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        size = f" of {len(items)} items" if "prefixItems" in schema else ""
        return [f"a {'non-empty ' if 'minItems' in schema and not size else ''}list{size}, each {words(items[0])}"]
    kind, bounds = _TYPES.get(schema.get("type", ""), "any value"), range_of(schema)
    return [f"{kind} {bounds}" if bounds.startswith("in ") else f"{kind} ({bounds})" if bounds else kind]


def _is_number(value: Any, schema: Mapping[str, Any]) -> bool:
    return type(value) is int or (type(value) is float and schema.get("type") == "number")
