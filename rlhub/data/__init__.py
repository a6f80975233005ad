"""Tasks: one module each, looked up by name.

A module of this folder, or of your own code (a dotted path), has

    Config                              frozen dataclass with every option and its default
    build(config, split, seed) -> Task  the train or test split
    tokenizer(config)                   optional: the tokenizer of a task with its own small vocabulary, or None to use the model's

Everything random is drawn with `rlhub.noise` from (seed, purpose, index), so an example is a pure function of (seed, split, index) and a
run that resumes at an index continues the same data. Training and test problems of the built-in tasks never meet: which side a problem is
on is decided by a hash of the problem, whatever the seed, or by the file of test problems that the config names.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from omegaconf import OmegaConf

from rlhub.errors import DataError
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "test"]
Problem = TypeVar("Problem")

MAX_ATTEMPTS = 10_000  # redraws of one problem before its conditions count as impossible
FINGERPRINT_ROWS = 1024  # examples of an infinite split that its fingerprint covers


@dataclass(frozen=True)
class Task:
    """One split of a task.

    Attributes:
        name: the task module.
        split: train or test.
        description: one line that says which data this is.
        example: the example of an index `>= 0`. Train splits go on for ever (a finite one in shuffled epochs); a test split raises
            IndexError from `size` on.
        size: number of distinct examples, None when the split is infinite.
    """

    name: str
    split: Split
    description: str
    example: Callable[[int], Example]
    size: int | None = None

    def fingerprint(self) -> str:
        """sha256 in hex over the prompts and columns of the split (the first 1024 examples of an infinite one)."""
        digest = hashlib.sha256()
        for index in range(FINGERPRINT_ROWS if self.size is None else self.size):
            example = self.example(index)
            digest.update(json.dumps([example.prompt, example.columns], sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def load_task(name: str, config: dict[str, Any], split: Split, seed: int) -> Task:
    """The split of the task that `name` and its options describe.

    Example:
        >>> load_task("sort", {"digits": 3}, "test", seed=0).size
        20

    Raises:
        DataError: no such task or option, a value of the wrong type, or data that cannot be read or drawn.
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be train or test, got {split!r}")
    module = _module(name)
    return module.build(_config(module, name, config), split, seed)


def task_tokenizer(name: str, config: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a task with its own vocabulary; None when the task is text for the model's tokenizer."""
    module = _module(name)
    build = vars(module).get("tokenizer")
    return build(_config(module, name, config)) if build else None


def held_out(problem: str, one_in: int) -> bool:
    """Whether a generated problem belongs to the test split; a hash decides, for one problem in `one_in`."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % one_in == 0


def first_accepted(attempt: Callable[[int], Problem | None], what: str) -> Problem:
    """The first result of `attempt(0), attempt(1), ...` that is not None (rejection sampling with the attempt as the draw's key).

    Raises:
        DataError: 10,000 attempts failed; `what` names the problem that cannot be drawn.
    """
    for number in range(MAX_ATTEMPTS):
        result = attempt(number)
        if result is not None:
            return result
    raise DataError(f"found no {what} in {MAX_ATTEMPTS} draws: relax the task's options")


def first_distinct(candidate: Callable[[int], Problem], count: int, what: str) -> list[Problem]:
    """The first `count` different results of `candidate(0), candidate(1), ...`.

    Raises:
        DataError: nearly all candidates repeat, so there are fewer problems than asked for.
    """
    found: dict[Problem, None] = {}
    for number in range(20 * count + 1000):
        if len(found) == count:
            break
        found.setdefault(candidate(number))
    if len(found) < count:
        raise DataError(f"only {len(found)} different {what} found for test_size={count}: lower test_size")
    return list(found)


def _module(name: str) -> ModuleType:
    if "." in name:
        path = name
    else:
        known = [module.name for module in pkgutil.iter_modules(__path__)]
        if name not in known:
            raise DataError(f"unknown task {name!r}{_nearest(name, known)}; tasks: {', '.join(known)}")
        path = f"{__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A module that exists but lacks one of its own imports must say so itself.
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise
        raise DataError(f"task {name!r}: no module {path!r} on the Python path") from error
    for attribute in ("Config", "build"):
        if attribute not in vars(module):
            raise DataError(f"task module {name!r} has no {attribute}, see the contract in rlhub/data/__init__.py")
    return module


def _config(module: ModuleType, name: str, options: dict[str, Any]) -> Any:
    known = [field.name for field in fields(module.Config)]
    for key in options:
        if key not in known:
            raise DataError(f"task {name}: unknown option {key!r}{_nearest(key, known)}; options: {', '.join(known)}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(module.Config), options))
    except ValueError as error:
        reason = ", ".join(line.strip() for line in str(error).splitlines() if "object_type" not in line)
        raise DataError(f"task {name}: {reason}") from error


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
