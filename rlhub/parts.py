"""Parts by name: the module that a recipe names, and its options as that module's `Config`.

A part is one file in a folder (`rlhub/views/coupled.py`), a module of the user's named by its path (`my_package.my_views`, or `my_views`
where no part that ships has that name), or a single file (`./my_views.py`). It declares a frozen dataclass `Config` with its options
and what its folder's `__init__.py` asks for, by name in `CONTRACT` there. What else a part can do, it states in attributes of its module:
no list of names anywhere does, so a copy of a part behaves like the original.

Grading processes load their graders here, so that this module must start without PyTorch and OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from rlhub.errors import RecipeError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Value = TypeVar("Value")

_PACKAGES = {"rewards": "rewards", "transports": "workers.transports", "labs": "rlhub.studies.labs"}  # every other folder lies in rlhub
_FILE = re.compile(r"(.+\.py)(:.*)?")  # a file, and for rewards a function in it
_FILE_MODULE = "_rlhub_file_"  # begins the names of modules that are single files; the path follows in hexadecimal digits


class KeyedError(RecipeError):
    """A recipe error about one dotted key, so that whoever knows the file and line can add them."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message, key)
        self.message, self.key = message, key

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def part_names(folder: str) -> list[str]:
    """The parts that ship in a folder: `views`, `rewards`, `transports`, ..."""
    package = _package(folder)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg and not module.name.startswith("_"))


def load_part(folder: str, name: str) -> ModuleType:
    """The module `name` of a folder (`views`, `rewards`, `transports`, ...), the user's module of that path, or the file `name`.

    A name without dots is a part that ships, where there is one, else the user's module beside the recipe or on PYTHONPATH. A relative
    file is looked for in the current folder; those in a recipe are absolute by then (see `absolute_file`).

    Raises:
        RecipeError: there is no such module, importing it fails, or it has not what the folder asks for.
    """
    shipped = part_names(folder)
    if not isinstance(name, str) or not name:
        raise RecipeError(f"a name from {folder} is needed, got {show(name)}; choose from {', '.join(shipped)}")
    if _FILE.fullmatch(name):
        module = load_file(name)
    elif name in shipped:
        module = load_module(f"{_package(folder).__name__}.{name}", name)
    elif "." in name or _is_own_module(name):
        module = load_module(name, name, f"; or choose from {', '.join(shipped)}")
    else:
        own = "or give your own module: its dotted path, or a file such as ./my_part.py"
        raise RecipeError(f"{folder} has no {name!r}{did_you_mean(name, shipped)}, {own}")
    _check_contract(_package(folder), module, name)
    return module


def load_module(path: str, name: str, hint: str = "") -> ModuleType:
    """The module of a dotted path, which a recipe calls `name`.

    Raises:
        RecipeError: there is none, or importing it fails; `hint` ends the first message.
    """
    try:
        return importlib.import_module(path)
    except Exception as error:  # a user's file may fail in any way while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            where = f"{error.name!r} cannot be found from the current folder or PYTHONPATH"
            raise RecipeError(f"no module {name!r} ({where}){hint}") from error
        raise RecipeError(f"importing {name!r} failed: {type(error).__name__}: {one_line(error)}") from error


def load_file(file: str) -> ModuleType:
    """The module that a single file is, under a name of its own; loaded anew after the file has changed.

    Raises:
        RecipeError: there is no such file, or importing it fails.
    """
    path = Path(file).resolve()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        hint = did_you_mean(path.name, near) if near else ""
        raise RecipeError(f"file not found: {file}{hint}; give its path from the folder of the recipe, or an absolute one")
    name = _FILE_MODULE + str(path).encode().hex()
    if name in sys.modules and vars(sys.modules[name])["__changed__"] != _changed(path):
        del sys.modules[name]
    return load_module(name, file)


def absolute_file(name: Any, folder: Path) -> Any:
    """The name of a part with its file, if it names one, as an absolute path: from `folder`, else from the current folder.

    Example:
        >>> absolute_file("./my_views.py", Path("/recipes")), absolute_file("coupled", Path("/recipes"))
        ('/recipes/my_views.py', 'coupled')
    """
    match = _FILE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return name
    places = [os.path.abspath(os.path.join(base, os.path.expanduser(match[1]))) for base in (folder, Path.cwd())]
    return next(filter(os.path.isfile, places), places[0]) + (match[2] or "")


def own_part_hashes(recipe: Mapping[str, Any]) -> dict[str, str]:
    """sha256 in hex of every file that a flat recipe names as a part of the user's own, by file or by dotted path.

    What such a file imports is not among them.
    """
    files: set[Path] = set()
    for value in _part_names(recipe):
        match = _FILE.fullmatch(value)
        if match:
            files.add(Path(match[1]))
        elif re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?::\w+)?", value):
            try:
                spec = importlib.util.find_spec(value.partition(":")[0])
            except (ImportError, ValueError):
                continue
            ships = value.split(".")[0] in ("rlhub", "rewards", "workers")
            if spec and spec.origin and spec.origin.endswith(".py") and not ships:
                files.add(Path(spec.origin))
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if file.is_file()}


def _part_names(values: Mapping[str, Any]) -> list[str]:
    """Names of parts in a recipe: the texts under `name`, `transport` and `family`, also in lists of parts."""
    found = []
    for key, value in values.items():
        if isinstance(value, str) and key != "run.name" and key.rpartition(".")[2] in ("name", "transport", "family"):
            found.append(value)
        for nested in value if isinstance(value, list | tuple) else [value]:
            if isinstance(nested, Mapping):
                found += _part_names(nested)
    return found


def short_name(name: str) -> str:
    """The last word of a part's name.

    Example:
        >>> [short_name(name) for name in ("coupled", "my_package.my_views", "/recipes/my_views.py")]
        ['coupled', 'my_views', 'my_views']
    """
    return re.split(r"[./]", name.removesuffix(".py"))[-1]


def title(module: ModuleType) -> str:
    """A part in messages: its path as a recipe would name it."""
    return str(module.__file__) if module.__name__.startswith(_FILE_MODULE) else module.__name__


def returned(value: Any, wanted: type[Value], module: ModuleType, function: str) -> Value:
    """What a part's function returned, if it is what the contract says.

    Raises:
        RecipeError: it is of another type.
    """
    if not isinstance(value, wanted):
        raise RecipeError(f"{title(module)}: {function} must return {wanted.__name__}, got {type_name(value)}")
    return value


def type_name(value: Any) -> str:
    """The type of a value, those of a tuple's items."""
    if isinstance(value, tuple):
        return f"({', '.join(map(type_name, value))})"
    return "None" if value is None else type(value).__name__


def _package(folder: str) -> ModuleType:
    return importlib.import_module(_PACKAGES.get(folder, f"rlhub.{folder}"))


def _is_own_module(name: str) -> bool:
    """Whether a name without dots is a module that Python finds, and none of its own library."""
    try:
        return name.isidentifier() and name not in sys.stdlib_module_names and importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was made by hand
        return False


def _check_contract(package: ModuleType, module: ModuleType, name: str) -> None:
    """Raises RecipeError where a part lacks something of `package.CONTRACT`; of a tuple there, one entry is enough."""
    for entry in package.CONTRACT:
        choices = (entry,) if isinstance(entry, str) else entry
        if not any(_has(module, choice) for choice in choices):
            wanted = "dataclass Config with its options" if entry == "Config" else " or ".join(choices)
            where = f"see {package.__name__.replace('.', '/')}/__init__.py"
            raise RecipeError(f"{package.__name__} part {name} has no {wanted}; {where}")
        misfit = next((misfit for choice in choices if (misfit := _misfit(module, choice))), None)
        if misfit:
            raise RecipeError(f"{package.__name__} part {name}: {misfit}; see {package.__name__.replace('.', '/')}/__init__.py")


def _has(module: ModuleType, wanted: str) -> bool:
    """Whether a module has a dataclass `Config`, a function or method (written with its arguments) or a constant."""
    name, call, _ = wanted.partition("(")
    value = _attribute(module, name)
    if name == "Config":
        return isinstance(value, type) and dataclasses.is_dataclass(value)
    return callable(value) if call else name in vars(module)


def _attribute(module: ModuleType, name: str) -> Any:
    """What a module has under a name, or a class of it under `Class.method`; None where it has none."""
    name, _, method = name.partition(".")
    value = vars(module).get(name)
    return getattr(value, method, None) if method else value


def _misfit(module: ModuleType, wanted: str) -> str | None:
    """How a function or class of a module differs from the arguments with which it is called; None where it takes them, or is not there."""
    name, call, arguments = wanted.partition("(")
    value = _attribute(module, name)
    if not call or not callable(value):
        return None
    names = arguments.rstrip(")").split(", ")
    try:
        signature = inspect.signature(value)
        signature.bind(*names)
    except TypeError:
        return f"{name} is called with ({', '.join(names)}), and takes ({', '.join(signature.parameters)})"
    except ValueError:  # of something built in, which has no signature
        return None
    return None


class _FileLoader(SourceFileLoader):
    """Compiles a file whenever it is loaded: bytecode is told apart by seconds only, and would lie beside the recipe."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__changed__"] = _changed(Path(self.path))
        super().exec_module(module)

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


class _FileFinder:
    """Finds modules that are single files by their names, so that pickled objects of their classes load in every process."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_FILE_MODULE):
            return None
        file = bytes.fromhex(name.removeprefix(_FILE_MODULE)).decode()
        return importlib.util.spec_from_file_location(name, file, loader=_FileLoader(name, file))


sys.meta_path.append(_FileFinder)  # type: ignore[arg-type]


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def part_config(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """The module's `Config` from the options of a part; the key `name` is skipped, so a whole part may be given.

    Raises:
        KeyedError: an option is unknown or has the wrong type or value; `key` is the option.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = module.Config
    try:
        config = OmegaConf.structured(schema)
    except OmegaConfBaseException as error:
        raise KeyedError(f"the Config of {title(module)} cannot be read: {one_line(error)}", error.full_key or "") from error
    OmegaConf.set_readonly(config, False)  # the dataclass is frozen, the node that collects its values must not be
    owner = short_name(title(module))
    for key, value in flatten({key: value for key, value in options.items() if key != "name"}):
        assign(config, schema, key, value, owner)
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
    from omegaconf import ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
