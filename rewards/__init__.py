"""Rewards: one module each, looked up by name.

A module of this folder, or of your own code, has

    Config                                          frozen dataclass with every option and its default
    grade(prompt, completion, row, config)          -> RewardResult

`prompt` is plain text or chat messages, `completion` is decoded text, `row` holds the columns of the task's example. The status is
`unparsed` where there was nothing to grade (the value then follows the published rule) and `ok` otherwise; a grader that cannot do its
work raises, and whoever called it records that. An answer is accurate when its value is 1.0.

A function is accepted too, from a module (`my_package.graders:brevity`) or a file (`grader.py:brevity`): either
`f(prompt, completion, row, **options)` or TRL's `f(prompts, completions, **columns) -> list[float]`, as it is.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from rlhub.types import RewardResult

Prompt = str | list[dict[str, str]]
Grader = Callable[[Prompt, str, dict[str, Any]], RewardResult]

ANSWERS = ("tags", "whole")


def load_grader(part: dict[str, Any]) -> Grader:
    """The grader that `{"name": ..., **options}` describes, as `grade(prompt, completion, row)`.

    Example:
        >>> load_grader({"name": "exact_match"})("2 1", "1 2", {"answer": "1 2"}).value
        1.0

    Raises:
        ValueError: no such reward, function, file or option.
    """
    options = dict(part)
    name = options.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"reward {part!r} has no name, write e.g. {{name: exact_match}}")
    if ":" in name:
        return _function_grader(name, options)
    module = _module(name)
    return partial(_grade_with, module.grade, _config(module, name, options))


def extract_answer(completion: str, answer: str) -> str | None:
    """The text to grade: the last `<answer>...</answer>` (`tags`) or everything (`whole`), stripped; None where there is no tag pair."""
    if answer == "whole":
        return completion.strip()
    found = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return found[-1].strip() if found else None


def check_answer(answer: str) -> None:
    """Raises ValueError unless `answer` is a way that `extract_answer` knows."""
    if answer not in ANSWERS:
        raise ValueError(f"answer must be one of {', '.join(ANSWERS)}, got {answer!r}")


def column(row: dict[str, Any], name: str) -> Any:
    """One column of a row; ValueError with the columns that exist when it is missing."""
    if name not in row:
        raise ValueError(f"the reward needs the column {name!r}, the task's rows have: {', '.join(map(str, row)) or 'none'}")
    return row[name]


def _grade_with(grade: Callable[..., RewardResult], config: Any, prompt: Prompt, completion: str, row: dict[str, Any]) -> RewardResult:
    return grade(prompt, completion, row, config)


def _module(name: str) -> ModuleType:
    if "." in name:
        path = name
    else:
        known = [module.name for module in pkgutil.iter_modules(__path__)]
        if name not in known:
            raise ValueError(f"unknown reward {name!r}{_nearest(name, known)}; rewards: {', '.join(known)}")
        path = f"{__name__}.{name}"
    module = _import(path, name)
    for attribute in ("Config", "grade"):
        if attribute not in vars(module):
            raise ValueError(f"reward module {name!r} has no {attribute}, see the contract in rewards/__init__.py")
    return module


def _config(module: ModuleType, name: str, options: dict[str, Any]) -> Any:
    known = [field.name for field in fields(module.Config)]
    for key in options:
        if key not in known:
            raise ValueError(f"reward {name}: unknown option {key!r}{_nearest(key, known)}; options: {', '.join(known) or 'none'}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(module.Config), options))
    except ValueError as error:
        raise ValueError(f"reward {name}: {_one_line(error)}") from error


def _function_grader(name: str, options: dict[str, Any]) -> Grader:
    source, function_name = name.rsplit(":", 1)
    module = _import_file(source) if source.endswith(".py") else _import(source, name)
    function = vars(module).get(function_name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{source} has no function {function_name!r}{_nearest(function_name, known)}")
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in options:
        if not open_ended and key not in parameters:
            raise ValueError(f"reward {name}: unknown option {key!r}{_nearest(key, list(parameters))}")
    if "completions" in parameters:
        accepted = None if open_ended else frozenset(parameters)
        return partial(_grade_with_trl, partial(function, **options), accepted)
    return partial(_grade_with_function, partial(function, **options))


def _grade_with_function(function: Callable[..., Any], prompt: Prompt, completion: str, row: dict[str, Any]) -> RewardResult:
    return _result(function(prompt, completion, row))


def _grade_with_trl(
    function: Callable[..., Any], accepted: frozenset[str] | None, prompt: Prompt, completion: str, row: dict[str, Any]
) -> RewardResult:
    # TRL hands conversational data to the function as messages, plain data as text.
    answer = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
    arguments = {**{name: [value] for name, value in row.items()}, "prompts": [prompt], "completions": [answer]}
    values = function(**{name: value for name, value in arguments.items() if accepted is None or name in accepted})
    if len(values) != 1:
        raise ValueError(f"a TRL-style reward must return one value per completion, got {len(values)} for 1")
    return _result(values[0])


def _result(value: Any) -> RewardResult:
    if isinstance(value, RewardResult):
        return value
    if value is None:
        return RewardResult(math.nan, "rejected", "the grader returned None")
    number = float(value)
    if not math.isfinite(number):
        return RewardResult(number, "rejected", f"the grader returned {number}")
    return RewardResult(number)


def _import(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A module that exists but lacks one of its own imports must say so itself.
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise
        raise ValueError(f"reward {name!r}: no module {path!r} on the Python path") from error


def _import_file(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError(f"reward file not found: {path}; give the path from the folder in which rlhub was started")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _one_line(error: Exception) -> str:
    return ", ".join(line.strip() for line in str(error).splitlines() if "object_type" not in line)
