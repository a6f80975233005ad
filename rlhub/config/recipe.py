"""Reading recipes: YAML files, `extends` and overrides, merged into the typed schema of `rlhub.config.schema`.

A recipe is YAML. `extends` names files that are merged first (later files win), `key=value` on the command line wins over all of
them, and a key or type that the schema does not know is an error that names the file, the line and the nearest key.
Parts of an algorithm (`{name: ..., options}`) are checked against the `Config` dataclass of the module they name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhub.config.checks import PARTS, check_recipe
from rlhub.config.schema import Recipe
from rlhub.config.values import typed_recipe
from rlhub.errors import RecipeError
from rlhub.parts import KeyedError, absolute_file, did_you_mean, flatten, one_line, part_config, show

NAMES = {*(name_key for _, name_key, _ in PARTS), "weights.transport"}  # keys that name a part
PATHS = ("task.train.path", "task.eval.path", "pairs.data.path", "model.path")  # keys that name data or a model
NESTED = ("task.reward.", "algorithm.auxiliary")  # where lists of parts stand


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file after its `extends` files and `key=value` overrides, checked.

    Files are merged in the order of `extends`, then the file itself, then the overrides; a file that is reached twice counts once, at
    its first place, so that a shared base does not undo what came between.

    Raises:
        RecipeError: one line with the file and line (or the override), the value and what would be right.

    Example:
        >>> load_recipe("recipes/sort.yaml", ["run.steps=10"]).run.steps
        10
    """
    layers = [*_file_layers(Path(path), [], set()), _override_layer(overrides)]
    values = asdict(Recipe())
    origins: dict[str, str] = {"": str(path)}
    for layer in layers:
        origins |= layer.origins
        _drop_replaced_options(values, dict(layer.values))
        for key, value in layer.values:
            _assign(values, key, value)
    try:
        recipe = typed_recipe(_interpolated(values))
        check_recipe(recipe)
    except KeyedError as error:
        raise _located(error, origins) from error
    return recipe


def load_options(module: ModuleType, path: Path | None, overrides: Sequence[str] = ()) -> Any:
    """The `Config` of a module from the keys of a YAML file, if there is one, and `key=value` overrides.

    Raises:
        RecipeError: as `load_recipe`.
    """
    layers = [*([_read_layer(path, "")] if path else []), _override_layer(overrides)]
    origins = {key: origin for layer in layers for key, origin in layer.origins.items()}
    try:
        return part_config(module, {key: value for layer in layers for key, value in layer.values})
    except KeyedError as error:
        raise _located(error, origins) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back equal."""
    return yaml.dump(asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=140)


def validate(recipe: Recipe) -> None:
    """The checks of `load_recipe` for a recipe that was made or changed in Python.

    Raises:
        RecipeError: the first problem, in one line.
    """
    typed_recipe(asdict(recipe))
    check_recipe(recipe)


class Loader(yaml.SafeLoader):
    """YAML with 1.2 scalars: `off`, `no` and dates are text, `3e-6` is a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read back as text."""


_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]
for _style in (Loader, _Dumper):
    _style.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _style.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 1.1 reads 010 as eight


@dataclass
class _Layer:
    values: list[tuple[str, Any]] = field(default_factory=list)  # dotted keys, in order
    origins: dict[str, str] = field(default_factory=dict)  # where each key and each section begins


def _file_layers(path: Path, parents: list[Path], seen: set[Path], origin: str = "") -> Iterator[_Layer]:
    """The layers of a file, those that it extends first."""
    prefix = f"{origin}: " if origin else ""
    if path.resolve() in [parent.resolve() for parent in parents]:
        raise RecipeError(f"{prefix}extends: goes in a circle, {' -> '.join(map(str, [*parents, path]))}; remove one of them")
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    layer = _read_layer(path, prefix)
    values = dict(layer.values)
    extends = values.pop("extends", [])
    extends = [extends] if isinstance(extends, str) else extends
    here = layer.origins.get("extends", "")
    if not isinstance(extends, list) or not all(isinstance(name, str) for name in extends):
        raise RecipeError(f"{here}: extends: expected a file name or a list of them, got {show(extends)}")
    before = set(seen)
    for name in extends:
        file = Path(os.path.normpath(path.parent / name))
        if file.resolve() in seen - before:
            raise RecipeError(
                f"{here}: extends: {name!r} was merged by a file before it and would change nothing; put it first or remove it"
            )
        yield from _file_layers(file, [*parents, path], seen, here)
    yield _Layer(list(values.items()), layer.origins)


def _read_layer(path: Path, prefix: str) -> _Layer:
    """The keys of one YAML file with their lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{prefix}no recipe file {str(path)!r}{_similar_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{prefix}cannot read {str(path)!r}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        layer = _Layer()
        if root is None:
            return layer
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{path}:{root.start_mark.line + 1}: a recipe is a mapping (key: value), got {show(root.value)}")
        _walk(loader, root, "", path, layer)
        return layer
    except RecursionError:
        raise RecipeError(f"{path}: an alias (*name) lies within its own anchor (&name); write the value out") from None
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1 if error.problem_mark else 1}"
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}; check indentation, quotes and brackets") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {one_line(error)}; save it as plain UTF-8 text") from error


def _walk(loader: Loader, node: yaml.MappingNode, prefix: str, path: Path, layer: _Layer) -> None:
    """Adds the leaves below a mapping to a layer."""
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{where}: a key must be plain text, got a list or mapping")
        key = f"{prefix}{key_node.value}"
        if key in layer.origins:
            raise RecipeError(f"{where}: {key}: given twice, first at {layer.origins[key]}; keep one")
        layer.origins[key] = where
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _walk(loader, value_node, f"{key}.", path, layer)
        else:
            layer.values.append((key, _with_absolute_files(key, loader.construct_object(value_node, deep=True), path.parent)))


def _override_layer(overrides: Sequence[str]) -> _Layer:
    """The `key=value` arguments; values are YAML."""
    layer = _Layer()
    for text in overrides:
        origin = f"override {text!r}"
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{origin}: expected key=value, for example run.steps=100")
        try:
            parsed = yaml.load(value, Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{origin}: {value!r} is not a YAML value; quote it or close its brackets") from error
        leaves = [(leaf, _with_absolute_files(leaf, value, Path.cwd())) for leaf, value in flatten({key.strip(): parsed})]
        layer.values += leaves
        sections = accumulate(key.strip().split("."), "{}.{}".format)
        layer.origins |= {leaf: origin for leaf, _ in leaves} | dict.fromkeys(sections, origin)
    return layer


def _with_absolute_files(key: str, value: Any, folder: Path) -> Any:
    """A value in which parts that are single files are named by their absolute paths, so that the saved recipe loads from anywhere."""
    if key in NAMES:
        return absolute_file(value, folder)
    if key in PATHS and isinstance(value, str):
        return _absolute_path(value, folder)
    if isinstance(value, list) and key.startswith(NESTED):
        return [_with_absolute_files(key, item, folder) for item in value]
    if isinstance(value, Mapping) and key.startswith(NESTED):
        return {
            name: absolute_file(item, folder) if name == "name" else _with_absolute_files(key, item, folder) for name, item in value.items()
        }
    return value


def _absolute_path(path: str, folder: Path) -> str:
    """What exists from the recipe's folder, else from the current one, as an absolute path; anything else as it is, as a hub's name."""
    places = [Path(os.path.abspath(base / Path(path).expanduser())) for base in (folder, Path.cwd())]
    found = next((str(place) for place in places if path and place.exists()), None)
    return path if found is None else found + "/" * path.endswith("/")  # which says that a folder is meant


def _drop_replaced_options(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Removes the options of parts for which a layer names another part, and the model's shape when it names another checkpoint."""
    for name_key, option_keys in [*((name_key, option_keys) for _, name_key, option_keys in PARTS), ("model.path", ["model.config"])]:
        if name_key not in layer:
            continue
        section, name = _section(values, name_key)
        if layer[name_key] != section.get(name):
            for key in option_keys:
                section, name = _section(values, key)
                section[name] = {}


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; an empty mapping takes nothing away."""
    section, name = _section(values, key)
    if value != {} or not isinstance(section.get(name), dict):
        section[name] = value


def _section(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds a dotted key, made where it is missing, and the key's last name."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    return values, name


def _interpolated(values: dict[str, Any]) -> dict[str, Any]:
    """The values with `${other.key}` filled in."""
    try:
        return dict(OmegaConf.to_container(OmegaConf.create(values), resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise KeyedError(f"{one_line(error)}; write a plain value", error.full_key or "") from error


def _located(error: KeyedError, origins: Mapping[str, str]) -> RecipeError:
    """The error with the place where its key, or the nearest section above it, was set."""
    key = error.key
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return RecipeError(f"{origins[key]}: {error}" if key in origins else str(error))


def _similar_files(path: Path) -> str:
    """Names of recipes that a missing file may have meant."""
    if not path.parent.is_dir():
        return f"; the folder {str(path.parent)!r} does not exist"
    known = sorted(file.name for file in path.parent.glob("*.y*ml"))
    near = difflib.get_close_matches(path.name, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else did_you_mean(path.name, known)
