"""The recipe's schema written out, for readers and for editors; a test keeps both files current.

python -m rlhub.config.reference page > docs/recipe_reference.md
python -m rlhub.config.reference schema > recipes/recipe.schema.json
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any, get_type_hints

from rlhub.config.checks import PARTS
from rlhub.config.schema import Recipe
from rlhub.config.values import json_schema, words
from rlhub.parts import load_part, part_names

_HEAD = """# Recipe reference

Every key of a recipe with what it takes, its default and its meaning. This page and `recipes/recipe.schema.json` are generated from
`rlhub/config/schema.py` and the parts; after a change to either:

    python -m rlhub.config.reference page > docs/recipe_reference.md
    python -m rlhub.config.reference schema > recipes/recipe.schema.json

A recipe is a YAML file that gives some of these keys. `extends: [base.yaml, algorithms/espo.yaml]` merges other recipes first, the
later ones winning, and `key=value` on the command line wins over all files: `rlhub train recipes/sort.yaml run.steps=20`. A value may
name another key: `${run.seed}`.

Editors that know yaml-language-server complete and check a recipe that begins with the line

    # yaml-language-server: $schema=recipe.schema.json

where the path is relative to the recipe (`../recipe.schema.json` in recipes/algorithms). For all recipes at once, in VS Code's settings:

    "yaml.schemas": {"recipes/recipe.schema.json": ["recipes/*.yaml", "recipes/algorithms/*.yaml", "recipes/models/*.yaml"]}
"""
_OWN_PART = {"type": "string", "description": "A module or file of your own."}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file: any of the keys, and the options of the part that a `name` beside them names."""
    schema = _documented_schema()
    extends = {"description": "Recipes that are merged before this one, relative to its folder.", "type": ["string", "array"]}
    schema["properties"] = {"extends": extends | {"items": {"type": "string"}}, **schema["properties"]}
    parts = {}
    for folder, name_key, option_keys in PARTS:
        parent_key, _, name = name_key.rpartition(".")
        parent = _at(schema, parent_key)
        parent.setdefault("properties", {})[name] = _name_schema(folder)
        parent["allOf"] = []
        for part in part_names(folder):
            options = _options(folder, part)
            options["additionalProperties"] = False
            parts[f"{folder}.{part}"] = options
            held: dict[str, Any] = {}
            for key in option_keys:
                if key == parent_key:  # the options stand beside the name
                    options["properties"] = {name: {}, **options["properties"]}
                    held = {"$ref": f"#/$defs/{folder}.{part}"}
                else:
                    held.setdefault("properties", {})[key.rpartition(".")[2]] = {"$ref": f"#/$defs/{folder}.{part}"}
            parent["allOf"].append({"if": {"type": "object", "properties": {name: {"const": part}}, "required": [name]}, "then": held})
    _at(schema, "pairs.data")["$ref"] = "#/$defs/tasks.preferences"
    _at(schema, "weights.transport").update(_name_schema("transports"))
    _at(schema, "algorithm.auxiliary")["items"] = {
        "type": "object",
        "properties": {
            "name": _name_schema("objectives"),
            "weight": {"type": "number", "minimum": 0},
            "on": {"enum": ["chosen", "rejected", "all"], "default": "all"},
        },
        "required": ["name", "weight"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "rlhub recipe", **schema, "$defs": parts}


def reference_page() -> str:
    """The recipe reference in Markdown."""
    schema = _documented_schema()
    sections = {key: field for key, field in schema["properties"].items() if "properties" in field}
    lines = [_HEAD, *_table(schema, "")]
    for key, section in sections.items():
        lines += [f"## {key}\n", f"{section['description']}\n", *_table(section, f"{key}.")]
    lines += ["## Parts\n", "The modules that a `name` can name, and their options with what they take and their defaults.\n"]
    for folder, name_key, option_keys in PARTS:
        where = " and ".join(f"`{key}`" for key in option_keys)
        lines += [f"### {folder}\n", f"`{name_key}`; options in {where}.\n", "| name | what it is | options |", "|---|---|---|"]
        for part in part_names(folder):
            options = "; ".join(
                f"`{name}`: {words(field)}, {_shown(field['default'])}" for name, field in _options(folder, part)["properties"].items()
            )
            summary = (inspect.getdoc(load_part(folder, part)) or "").partition("\n")[0]
            lines.append(_row(f"`{part}`", summary, options))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def schema_text() -> str:
    """`recipe_schema` as JSON, one line for what holds nothing nested."""
    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda leaf: re.sub(r"\s*\n\s*", " ", leaf[0]), text) + "\n"


def field_docs(fields: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(fields)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for line, below in pairwise(definition.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            docs[line.target.id] = " ".join(ast.literal_eval(below.value).split())
    return docs


def _documented_schema() -> dict[str, Any]:
    schema = json_schema(Recipe)
    _document(schema, Recipe, dataclasses.asdict(Recipe()))
    return schema


def _document(schema: dict[str, Any], section: type, defaults: Mapping[str, Any]) -> None:
    """Adds what each key means and its default."""
    docs, types = field_docs(section), get_type_hints(section)
    schema["description"] = inspect.getdoc(section)
    for name, field in schema["properties"].items():
        if "properties" in field:
            _document(field, types[name], defaults[name])
        else:
            schema["properties"][name] = {"description": docs[name], **field, "default": defaults[name]}


def _at(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """The schema at a dotted key."""
    found: dict[str, Any] = reduce(lambda part, name: part["properties"][name], key.split("."), schema)
    return found


def _name_schema(folder: str) -> dict[str, Any]:
    names = part_names(folder) + (["none"] if folder == "rewards" else [])
    return {"description": f"A module of {folder}.", "anyOf": [{"enum": names}, _OWN_PART]}


def _options(folder: str, name: str) -> dict[str, Any]:
    """The JSON Schema of a part's options, with all defaults."""
    module = load_part(folder, name)
    schema = json_schema(module.Config)
    for field in dataclasses.fields(module.Config):
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        schema["properties"][field.name]["default"] = made
    return {"description": (inspect.getdoc(module) or "").partition("\n")[0], "type": "object", "properties": schema["properties"]}


def _table(section: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The keys of a section and of those within it."""
    yield from ("| key | takes | default | meaning |", "|---|---|---|---|")
    yield from _rows(section, prefix)
    yield ""


def _rows(section: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, field in section["properties"].items():
        if "properties" not in field:
            yield _row(f"`{prefix}{name}`", words(field), _shown(field["default"]), field["description"])
        elif prefix:
            yield from _rows(field, f"{prefix}{name}.")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and value and "\n" not in value else f"`{json.dumps(value)}`"


def main() -> None:
    """Prints what the argument names."""
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what == "page":
        print(reference_page(), end="")
    elif what == "schema":
        print(schema_text(), end="")
    else:
        sys.exit("usage: python -m rlhub.config.reference page | schema")


if __name__ == "__main__":
    main()
