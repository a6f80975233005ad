"""Tasks: one module each, looked up by name.

A module of this folder, or of your own code (a dotted path), has

    Config                              frozen dataclass with every option and its default
    build(config, split, seed) -> Task  the train or test split
    tokenizer(config)                   optional: the tokenizer of a task with its own small vocabulary, or None to use the model's
    KIND: str                           optional: what its examples are. Default: `prompts`, to complete
        documents       texts without prompts for supervised training (`sft.packing`); the Config has the option `path`
        preferences     compared or labelled responses; the module has load_preferences(config, split) -> (list of
                        rlhub.tasks.preferences.Preference, list of BadRow), and its Config the option `path`

Everything random is drawn with `rlhub.noise` from (seed, purpose, index), so an example is a pure function of (seed, split, index) and a
run that resumes at an index continues the same data. Training and test problems of the built-in tasks never meet: which side a problem is
on is decided by a hash of the problem, whatever the seed, or by the file of test problems that the config names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhub.errors import DataError, RecipeError
from rlhub.noise import Noise
from rlhub.parts import load_part, part_config
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTRACT = ("Config", "build(config, split, seed)")
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
        >>> load_task("sort", {"test_size": 64}, "test", seed=0).size
        64

    Raises:
        DataError: no such task or option, a value of the wrong type, or data that cannot be read or drawn.
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be train or test, got {split!r}")
    module, checked = _load(name, config)
    return module.build(checked, split, seed)


def task_tokenizer(name: str, config: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a task with its own vocabulary; None when the task is text for the model's tokenizer."""
    module, checked = _load(name, config)
    return module.tokenizer(checked) if "tokenizer" in vars(module) else None


def finite_task(name: str, split: Split, description: str, examples: Sequence[Example], seed: int) -> Task:
    """The split that holds these examples: in their order for testing, in epochs that are each shuffled anew for training.

    Example:
        >>> task = finite_task("letters", "train", "two letters", [Example(0, "a", {}), Example(1, "b", {})], seed=0)
        >>> sorted(task.example(index).prompt for index in (2, 3))
        ['a', 'b']
    """
    if split == "test":
        return Task(name, split, description, examples.__getitem__, len(examples))
    order = lru_cache(maxsize=2)(lambda epoch: Noise(seed).generator(f"data/{name}/order", epoch=epoch).permutation(len(examples)))

    def example(index: int) -> Example:
        epoch, place = divmod(index, len(examples))
        return examples[order(epoch)[place]]

    return Task(name, split, description, example, len(examples))


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


def first_distinct(
    candidate: Callable[[int], Problem], count: int, what: str, key: Callable[[Problem], Hashable] = lambda problem: problem
) -> list[Problem]:
    """The first `count` results of `candidate(0), candidate(1), ...` that differ in their `key`.

    Raises:
        DataError: nearly all candidates repeat, so there are fewer problems than asked for.
    """
    found: dict[Hashable, Problem] = {}
    for number in range(20 * count + 1000):
        if len(found) == count:
            break
        problem = candidate(number)
        found.setdefault(key(problem), problem)
    if len(found) < count:
        raise DataError(f"only {len(found)} different {what} found for test_size={count}: lower test_size")
    return list(found.values())


def _load(name: str, options: dict[str, Any]) -> tuple[ModuleType, Any]:
    """The module of a task and its Config."""
    try:
        module = load_part("tasks", name)
        config = part_config(module, options)
    except RecipeError as error:
        raise DataError(f"task {name}: {error}") from error
    if "build" not in vars(module):
        raise DataError(f"task {name}: {module.__name__} has no build, see the contract in rlhub/tasks/__init__.py")
    return module, config
