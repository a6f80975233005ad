"""Rewards: one module each, looked up by name.

A module of this folder, or of your own code, has

    Config                                          frozen dataclass with every option and its default
    grade(prompt, completion, row, config)          -> RewardResult, or a coroutine of one (`async def`)

and may have, for graders that are faster in batches or slow to start,

    grade_batch(items, config)                      -> list of RewardResult, one per (prompt, completion, row); may be `async def`
    prepare(config)                                 loads models or data once in each process, outside of the deadlines
    version(config)                                 -> str, what the grades depend on beside source and options (weights, data files)
    batched(config)                                 -> bool, is `grade_batch` the better way with these options? Without it, yes
    COLUMNS                                         names of columns that it needs, "a|b" for one of several; told before anything starts
    own_limits(config)                              -> bool, does it bound its time and memory itself (a model, a server with timeouts)?
                                                       Then only the death of its process is dealt with from outside

`prompt` is plain text or chat messages, `completion` is decoded text, `row` holds the columns of the task's example, and the column
`rollout` what a price is put on: `{"num_tokens", "num_forwards", "length"}` (tokens through the first EOS, denoising forwards, canvas
tokens). The status is `unparsed` where there was nothing to grade (the value then follows the published rule) and `ok` otherwise; a
grader that cannot do its work raises, and whoever called it records that. An answer is accurate when its value is 1.0.

A module of your own is named by its dotted path or its file (`./grader.py`). A function is accepted too, from a module
(`my_package.graders:brevity`) or a file (`grader.py:brevity`): either `f(prompt, completion, row, **options)` or TRL's
`f(prompts, completions, **columns) -> list[float]`, as it is; both may be `async def`. Functions written for verl
(`f(data_source, solution_str, ground_truth, extra_info)`) and OpenRLHF (`f(queries, prompts, labels)`) are called by their parameters'
names, with `ground_truth` and `labels` from the column of that name, or of verl's `reward_model`, or `answer`.

What graders share lies in `answers`, `sandbox` and `pool`; every module directly in this folder without a leading underscore is a reward.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards._grader import Grader, Item, WrongCount, same_count
from rewards.answers.text import plain
from rlhub.errors import RecipeError
from rlhub.parts import did_you_mean, load_file, load_module, load_part, one_line, part_config
from rlhub.types import Prompt

__all__ = ["Grader", "Item", "Prompt", "WrongCount", "check_answer", "check_columns", "column", "extract_answer", "load_grader"]

CONTRACT = ("Config", "grade(prompt, completion, row, config)")
ANSWERS = ("tags", "whole")


def load_grader(part: dict[str, Any]) -> Grader:
    """The grader that `{"name": ..., **options}` describes: `grader(prompt, completion, row)` and `grader.grade_batch(items)`.

    Example:
        >>> load_grader({"name": "exact_match"})("2 1", "1 2", {"answer": "1 2"}).value
        1.0
        >>> [result.value for result in load_grader({"name": "exact_match"}).grade_batch([("", "1 2", {"answer": "1 2"})] * 2)]
        [1.0, 1.0]

    Raises:
        RecipeError: no such reward, function, file or option.
    """
    options = dict(part)
    name = options.pop("name", None)
    if not isinstance(name, str) or not name:
        raise RecipeError(f"reward {part!r} has no name, write e.g. {{name: exact_match}}")
    try:
        return _function_grader(name, options) if ":" in name else _module_grader(name, options)
    except ValueError as error:
        raise RecipeError(f"reward {name}: {one_line(error)}") from error


def _module_grader(name: str, options: dict[str, Any]) -> Grader:
    module = load_part("rewards", name)
    config, optional = _config(module, options), vars(module)
    wants_batches = "grade_batch" in optional and ("batched" not in optional or module.batched(config))
    return Grader(
        name,
        one=partial(_grade_with, module.grade, config),
        many=partial(_grade_batch_with, module.grade_batch, config) if wants_batches else None,
        version=_version(module, options, module.version(config) if "version" in optional else ""),
        prepare=partial(module.prepare, config) if "prepare" in optional else lambda: None,
        own_limits="own_limits" in optional and module.own_limits(config),
    )


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


def check_columns(part: dict[str, Any], columns: Collection[str]) -> None:
    """Raises ValueError where a reward states that it needs a column which is not among `columns`."""
    name = part.get("name")
    needed = getattr(load_part("rewards", name), "COLUMNS", ()) if isinstance(name, str) and ":" not in name else ()
    for alternatives in needed:
        if not set(alternatives.split("|")) & set(columns):
            shown = " or ".join(map(repr, alternatives.split("|")))
            raise ValueError(f"the reward needs the column {shown}, the task's rows have: {', '.join(map(str, columns)) or 'none'}")


def _grade_with(grade: Callable[..., Any], config: Any, prompt: Prompt, completion: str, row: dict[str, Any]) -> Any:
    return grade(prompt, completion, row, config)


def _grade_batch_with(grade_batch: Callable[..., Any], config: Any, items: Sequence[Item]) -> Any:
    return grade_batch(items, config)


def _version(module: ModuleType, options: dict[str, Any], more: str) -> str:
    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    described = json.dumps([_own_version(), module.__name__, options, more], sort_keys=True, default=repr)
    return hashlib.sha256(described.encode() + source).hexdigest()[:16]


@cache
def _own_version() -> str:
    """Of this folder, whose tools graders may use, and of rlhub."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    try:
        return f"{package_version('rlhub')} {digest.hexdigest()}"
    except PackageNotFoundError:  # a checkout that is not installed, e.g. a working directory sent to a cluster
        return digest.hexdigest()


def _config(module: ModuleType, options: dict[str, Any]) -> Any:
    """The module's options; without any, OmegaConf is spared, which takes a tenth of a second to import."""
    return part_config(module, options) if options else module.Config()


def _function_grader(name: str, options: dict[str, Any]) -> Grader:
    """A grader around a function, `module:function` or `file.py:function`, in either of the two signatures."""
    source, function_name = name.rsplit(":", 1)
    module = load_file(source) if source.endswith(".py") else load_module(source, source)
    function = vars(module).get(function_name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RecipeError(f"{source} has no function {function_name!r}{did_you_mean(function_name, known)}")
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in options:
        if not open_ended and key not in parameters:
            raise RecipeError(f"unknown option {key!r}{did_you_mean(key, list(parameters))}")
    bound, version = partial(function, **options), _version(module, {"function": function_name, **options}, "")
    if "solution_str" in parameters:
        return Grader(name, one=partial(_grade_with_verl, bound, frozenset(parameters)), version=version)
    if "solution_strs" in parameters:
        many = partial(_grade_with_verl_batch, bound, frozenset(parameters), name)
        return Grader(name, one=partial(_first_of, many), many=many, version=version)
    if "queries" in parameters:
        many = partial(_grade_with_openrlhf, bound, frozenset(parameters), name)
        return Grader(name, one=partial(_first_of, many), many=many, version=version)
    if "completions" not in parameters:
        _check_three(name, parameters, options)
        return Grader(name, one=bound, version=version)
    many = partial(_grade_with_trl, bound, None if open_ended else frozenset(parameters), name)
    return Grader(name, one=partial(_first_of, many), many=many, version=version)


_TEXTS = "completions?|responses?|outputs?|generations?|solution_strs?"
_GOLD = "answers?|labels?|ground_truths?|gold|targets?|references?"
# What the first, second and third argument of a function cannot be, by their names.
_OTHER_WORDS = (f"row|{_TEXTS}|{_GOLD}|data_sources?", f"row|prompts?|questions?|quer(?:y|ies)|{_GOLD}", f"prompts?|{_TEXTS}|{_GOLD}")


def _check_three(name: str, parameters: Mapping[str, inspect.Parameter], options: dict[str, Any]) -> None:
    """Refuse a function that prompt, completion and row do not fit, by their number or by what the names of its arguments say."""
    places = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    needed = [one.name for one in places if one.default is one.empty and one.name not in options]
    needed += [
        one.name for one in parameters.values() if one.kind is one.KEYWORD_ONLY and one.default is one.empty and one.name not in options
    ]
    any_number = any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
    misplaced = any(re.fullmatch(words, one.name) for one, words in zip(places, _OTHER_WORDS, strict=False))
    if len(needed) > 3 or (len(places) < 3 and not any_number) or misplaced:
        raise RecipeError(
            f"{name} takes ({', '.join(parameters)}); write f(prompt, completion, row, **options), or one of TRL's f(prompts, completions, "
            "**columns), verl's f(data_source, solution_str, ground_truth, extra_info), OpenRLHF's f(queries, prompts, labels)"
        )


def _truth(row: dict[str, Any], *names: str) -> Any:
    """The gold answer of a row: a column of one of the names, verl's `reward_model.ground_truth`, or `answer`.

    Raises:
        ValueError: it has none of them.
    """
    nested = row.get("reward_model")
    if isinstance(nested, dict) and "ground_truth" in nested:
        return nested["ground_truth"]
    found = next((name for name in (*names, "answer") if name in row), None)
    return row[found] if found else column(row, names[0])


async def _grade_with_verl(
    function: Callable[..., Any], accepted: frozenset[str], prompt: Prompt, completion: str, row: dict[str, Any]
) -> Any:
    """Calls `f(data_source, solution_str, ground_truth, extra_info)`, which returns a number or `{"score": number, ...}`."""
    arguments = {**row, "solution_str": completion}
    arguments |= {name: row.get(name) for name in ("data_source", "extra_info")}
    if "ground_truth" in accepted:
        arguments["ground_truth"] = _truth(row, "ground_truth")
    value = function(**{key: value for key, value in arguments.items() if key in accepted})
    return _score(await value if inspect.isawaitable(value) else value)


async def _grade_with_verl_batch(function: Callable[..., Any], accepted: frozenset[str], name: str, items: Sequence[Item]) -> list[Any]:
    """Calls `f(data_sources, solution_strs, ground_truths, extra_infos)`, which returns for each what the function for one returns."""
    rows = [row for *_, row in items]
    arguments: dict[str, Any] = {f"{key}s": [row.get(key) for row in rows] for key in ("data_source", "extra_info")}
    arguments["solution_strs"] = [completion for _, completion, _ in items]
    if "ground_truths" in accepted:
        arguments["ground_truths"] = [_truth(row, "ground_truth") for row in rows]
    values = function(**{key: value for key, value in arguments.items() if key in accepted})
    return list(map(_score, same_count(await values if inspect.isawaitable(values) else values, len(items), name)))


def _score(value: Any) -> Any:
    return column(value, "score") if isinstance(value, dict) else value


async def _grade_with_openrlhf(function: Callable[..., Any], accepted: frozenset[str], name: str, items: Sequence[Item]) -> list[Any]:
    """Calls `f(queries, prompts, labels)`, which returns one number a query, or `{"rewards": numbers, ...}`; a query is prompt and
    completion."""
    prompts = [plain(prompt) for prompt, _, _ in items]
    arguments: dict[str, Any] = {
        "prompts": prompts,
        "queries": [prompt + completion for prompt, (_, completion, _) in zip(prompts, items, strict=True)],
    }
    if "labels" in accepted:
        arguments["labels"] = [_truth(row, "labels", "ground_truth") for _, _, row in items]
    values = function(**{key: value for key, value in arguments.items() if key in accepted})
    values = await values if inspect.isawaitable(values) else values
    return same_count(column(values, "rewards") if isinstance(values, dict) else values, len(items), name)


async def _first_of(many: Callable[[Sequence[Item]], Any], prompt: Prompt, completion: str, row: dict[str, Any]) -> Any:
    return (await many([(prompt, completion, row)]))[0]


async def _grade_with_trl(function: Callable[..., Any], accepted: frozenset[str] | None, name: str, items: Sequence[Item]) -> list[Any]:
    """Calls `f(prompts, completions, **columns)`; a column that only some rows have is None in the others."""
    # TRL hands conversational data to the function as messages, plain data as text.
    answers = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for prompt, text, _ in items]
    columns = dict.fromkeys(key for _, _, row in items for key in row)
    arguments = {key: [row.get(key) for _, _, row in items] for key in columns}
    arguments |= {"prompts": [prompt for prompt, _, _ in items], "completions": answers}
    values = function(**{key: value for key, value in arguments.items() if accepted is None or key in accepted})
    return same_count(await values if inspect.isawaitable(values) else values, len(items), name)
