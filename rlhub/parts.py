"""Parts by name: the module that a recipe names, and its options as that module's `Config`.

A part is one file in a folder (`rlhub/views/coupled.py`) or a module of the user's named by a dotted path (`my_package.my_views`).
It declares a frozen dataclass `Config` with its options and the functions that its folder's `__init__.py` asks for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import re
import types
import typing
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhub.errors import RecipeError

_PACKAGES = {"rewards": "rewards", "transports": "workers.transports", "labs": "rlhub.studies.labs"}  # every other folder lies in rlhub


class KeyedError(RecipeError):
    """A recipe error about one dotted key, so that whoever knows the file and line can add them."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message, key)
        self.message, self.key = message, key

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def part_names(folder: str) -> list[str]:
    """The parts that ship in a folder: `views`, `rewards`, `transports`, ..."""
    package = importlib.import_module(_PACKAGES.get(folder, f"rlhub.{folder}"))
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg and not module.name.startswith("_"))


def load_part(folder: str, name: str) -> ModuleType:
    """The module `name` of a folder (`views`, `rewards`, `transports`, ...), or the user's module when `name` is dotted.

    Raises:
        RecipeError: there is no such module, or importing it fails.
    """
    if not isinstance(name, str) or not name:
        raise RecipeError(f"a name from {folder} is needed, got {show(name)}; choose from {', '.join(part_names(folder))}")
    if "." not in name and name not in part_names(folder):
        known = part_names(folder)
        raise RecipeError(f"{folder} has no {name!r}{did_you_mean(name, known)}, or give the dotted path of your own module")
    path = name if "." in name else f"{_PACKAGES.get(folder, f'rlhub.{folder}')}.{name}"
    try:
        return importlib.import_module(path)
    except Exception as error:  # a user's file may fail in any way while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise RecipeError(
                f"no module {name!r} ({error.name!r} cannot be found from the current folder or PYTHONPATH); "
                f"or choose from {', '.join(part_names(folder))}"
            ) from error
        raise RecipeError(f"importing {name!r} failed: {type(error).__name__}: {one_line(error)}") from error


def part_config(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """The module's `Config` from the options of a part; the key `name` is skipped, so a whole part may be given.

    Raises:
        KeyedError: an option is unknown or has the wrong type or value; `key` is the option.
    """
    schema = vars(module).get("Config")
    if schema is None:
        raise KeyedError(f"module {module.__name__} is not a part: it has no dataclass Config with its options", "")
    config = OmegaConf.structured(schema)
    OmegaConf.set_readonly(config, False)  # the dataclass is frozen, the node that collects its values must not be
    for key, value in flatten({key: value for key, value in options.items() if key != "name"}):
        assign(config, schema, key, value, owner=module.__name__.rpartition(".")[2])
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise KeyedError(one_line(error), error.full_key or "") from error
    except ValueError as error:  # a Config may check its values in __post_init__, and names the option in its message
        message = one_line(error)
        raise KeyedError(message, next((key for key in options if re.search(rf"\b{re.escape(key)}\b", message)), "")) from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of nested mappings, in order; an empty mapping is a value."""
    leaves = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves += flatten(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def assign(config: DictConfig, schema: type, key: str, value: Any, owner: str = "recipe") -> None:
    """Sets one dotted key of a structured config, checked against its dataclass.

    Raises:
        KeyedError: the key is unknown or the value has another type.
    """
    expected = _type_of(schema, key, owner)
    if isinstance(value, Mapping) and not value and (dataclasses.is_dataclass(expected) or typing.get_origin(expected) is dict):
        return
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        is_list = isinstance(OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else None, ListConfig)
        hint = "; give the whole list" if is_list else ""
        raise KeyedError(f"expected {_describe(expected)}, got {show(value)}{hint}", key) from error


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of an error message: the nearest known names, or all of them."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; choose from {', '.join(sorted(known))}" if known else "; it has none"


def show(value: Any) -> str:
    """A value as it would be written in YAML, cut to a readable length."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _type_of(schema: type, key: str, owner: str) -> Any:
    """The annotation behind a dotted key; `Any` inside plain mappings."""
    expected: Any = schema
    parts = key.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[: depth + 1])
        if dataclasses.is_dataclass(expected):
            hints = typing.get_type_hints(expected)
            if part not in hints:
                raise KeyedError(f"unknown key of {owner if depth == 0 else parts[depth - 1]}{did_you_mean(part, hints)}", here)
            expected = hints[part]
        elif typing.get_origin(expected) is dict or expected is Any:
            expected = Any
        elif typing.get_origin(expected) in (list, tuple):
            return expected
        else:
            raise KeyedError(f"{parts[depth - 1]} is {_describe(expected)} and has no keys", here)
    return expected


def _describe(annotation: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null", Any: "any value"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in words:
        return words[annotation]
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is list or (origin is tuple and Ellipsis in arguments):
        return f"a list, each item {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} items, each {_describe(arguments[0])}"
    return "a mapping (key: value)"
