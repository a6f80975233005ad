"""Preference data: two responses of which one was preferred, or single responses that were labelled good or bad.

From JSON lines (gzipped or not), Parquet or any source that `datasets.load_dataset` knows. The form is recognised row by row:

    prompt, chosen, rejected     text; or chat messages, where a response is one assistant message (TRL's standard and conversational)
    chosen, rejected             both hold the whole conversation, whose common beginning is the prompt (TRL's implicit prompt):
                                 messages, text, or text with the "Human:" and "Assistant:" turns of HH-RLHF (arXiv 2204.05862)
    prompt, completion, label    unpaired (KTO); the label is true or false, or a number that is above 0 when the response is good

A row that cannot be used is a `BadRow` with its number and the reason; nothing is dropped silently. As a task (`task.name: preferences`)
the data gives prompts with the chosen response as demonstration, and with `vocabulary` a byte-level BPE tokenizer trained on it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhub.errors import DataError
from rlhub.tasks import Split, Task, finite_task, held_out
from rlhub.tasks.jsonl import JSON_LINES, existing, load_rows
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of HH-RLHF
ROLES = {"Human": "user", "Assistant": "assistant"}
KIND = "preferences"


@dataclass(frozen=True)
class Config:
    path: str = ""  # file ending in .jsonl, .jsonl.gz or .parquet; else a source for datasets.load_dataset
    subset: str | None = None  # of a source: the configuration
    source_split: str = "train"  # of a source: its split
    test_path: str | None = None  # file or source with the held-out rows
    test_split: str | None = None  # of a source: its split with the held-out rows
    held_out_one_in: int = 10  # without either: one prompt in this many is held out, by its hash; 0: none
    limit: int | None = None  # use the first rows only
    chat: bool = False  # pass prompts on as chat messages, for the model's chat template
    vocabulary: int = 0  # train a byte-level BPE tokenizer of this size on the data (256: bytes); 0: the model's tokenizer

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is missing: give a .jsonl or .parquet file or the name of a dataset")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.held_out_one_in < 0 or self.held_out_one_in == 1:
            raise ValueError(f"held_out_one_in must be 0 or at least 2, got {self.held_out_one_in}")
        if self.vocabulary and self.vocabulary < 256:
            raise ValueError(f"vocabulary must be 0 or at least 256, one for each byte, got {self.vocabulary}")


@dataclass(frozen=True)
class Preference:
    """One row: two responses, the chosen one first, or one labelled response.

    Attributes:
        row: 0-based position in the data.
        number: 1-based line of the file or row of the source, for messages.
        rewards: 1 for a chosen or good response, 0 for a rejected or bad one.
    """

    row: int
    number: int
    prompt: str | list[dict[str, str]]
    responses: tuple[str, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    number: int
    reason: str


class _Unusable(ValueError):
    """The reason why a row cannot be used."""


def load_preferences(config: Config, split: Split) -> tuple[list[Preference], list[BadRow]]:
    """The usable rows of a split in the order of the data, and the others.

    Example:
        >>> pairs, bad = load_preferences(Config("pairs.jsonl"), "train")  # doctest: +SKIP

    Raises:
        DataError: the file or source cannot be read, or it has no usable rows or both pairs and unpaired rows.
    """
    source = test_source(config) if split == "test" else None
    decided_by_hash = test_source(config) is None and config.held_out_one_in > 0
    used = source or config
    good: list[Preference] = []
    bad: list[BadRow] = []
    for row, (number, content) in enumerate(_rows(used)):
        if config.limit is not None and row >= config.limit:
            break
        try:
            preference = parse(content, row, number, config.chat)
        except _Unusable as reason:
            if not (decided_by_hash and split == "test"):  # it has no prompt to hash, and is reported once
                bad.append(BadRow(number, str(reason)))
            continue
        if not decided_by_hash or held_out(_identity(preference), config.held_out_one_in) == (split == "test"):
            good.append(preference)
    if split == "test" and source is None and not decided_by_hash:
        return [], []
    if not good:
        why = f"; the first of {len(bad)} bad ones is row {bad[0].number}: {bad[0].reason}" if bad else ""
        raise DataError(f"{used.path}: no usable {'held-out ' if split == 'test' else ''}preferences{why}")
    sizes = {len(preference.responses): preference.number for preference in good}
    if len(sizes) > 1:
        raise DataError(f"{used.path}: row {sizes[2]} is a pair and row {sizes[1]} is unpaired; split the file in two")
    return good, bad


def test_source(config: Config) -> Config | None:
    """Where the held-out rows are, when they have a file or split of their own."""
    if config.test_path is None and config.test_split is None:
        return None
    return replace(config, path=config.test_path or config.path, source_split=config.test_split or config.source_split)


def parse(content: Any, row: int, number: int, chat: bool = False) -> Preference:
    """One row of the data.

    Raises:
        ValueError: the row cannot be used; the message is the reason.
    """
    if isinstance(content, _Unusable):
        raise content
    if not isinstance(content, dict):
        raise _Unusable(f"expected an object, got {type(content).__name__}")
    if "completion" in content and "chosen" not in content:
        prompt, responses, rewards = _unpaired(content)
    elif content.get("prompt") is not None:
        prompt = content["prompt"]
        responses = tuple(_response(_field(content, name), name) for name in ("chosen", "rejected"))
        rewards = (1.0, 0.0)
    else:
        prompt, *responses = split_conversations(_field(content, "chosen"), _field(content, "rejected"))
        rewards = (1.0, 0.0)
    if len(responses) == 2 and responses[0] == responses[1]:
        raise _Unusable("chosen equals rejected")
    for name, response in zip(("chosen", "rejected") if len(responses) == 2 else ("completion",), responses, strict=True):
        if not response.strip():
            raise _Unusable(f"{name} is empty")
    prompt = _messages(prompt) if chat and isinstance(prompt, str) else _checked_prompt(prompt)
    text = "".join((prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False), *responses))
    if not _is_utf8(text):
        raise _Unusable("broken encoding: lone surrogates, which no UTF-8 text has")
    return Preference(row, number, prompt, tuple(responses), tuple(rewards))


def split_conversations(chosen: Any, rejected: Any) -> tuple[Any, str, str]:
    """Prompt and responses of two whole conversations with a common beginning.

    Messages are split at the last one, which must be the only difference; text with HH-RLHF's turns at the last "\\n\\nAssistant:"; other
    text at the last white space before the first difference, so that no word is cut in two.

    Raises:
        ValueError: the conversations do not part at the last turn.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not chosen or not rejected:
            raise _Unusable("an empty list of messages")
        if chosen[:-1] != rejected[:-1]:
            raise _Unusable("the conversations part before their last message")
        return chosen[:-1], _response(chosen[-1:], "chosen"), _response(rejected[-1:], "rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise _Unusable(f"chosen is {type(chosen).__name__} and rejected {type(rejected).__name__}: both must be text or messages")
    if chosen == rejected:
        raise _Unusable("chosen equals rejected")
    if ASSISTANT in chosen and ASSISTANT in rejected:
        heads = [text.rpartition(ASSISTANT) for text in (chosen, rejected)]
        if heads[0][0] != heads[1][0]:
            raise _Unusable("the dialogues part before their last assistant turn")
        if any(HUMAN in tail for *_, tail in heads):
            raise _Unusable("a dialogue does not end with the assistant's turn")
        return heads[0][0] + ASSISTANT, heads[0][2], heads[1][2]
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    cut = max((i for i in range(shared) if chosen[i].isspace()), default=0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def build(config: Config, split: Split, seed: int) -> Task:
    """Prompts with the chosen (or good) response as demonstration; columns are `chosen` and `rejected`, or `completion` and `label`."""
    good, _ = load_preferences(config, split)
    names = ("chosen", "rejected") if len(good[0].responses) == 2 else ("completion",)
    examples = [
        Example(index, one.prompt, dict(zip(names, one.responses, strict=True)), one.responses[0]) for index, one in enumerate(good)
    ]
    description = f"{Path((test_source(config) or config).path).name}, {len(good)} {split} rows"
    return finite_task("preferences", split, description, examples, seed)


def tokenizer(config: Config) -> PreTrainedTokenizerFast | None:
    """A byte-level BPE tokenizer trained on the training rows; None when the model brings its own."""
    if not config.vocabulary:
        return None
    from rlhub.tasks._vocabulary import byte_level

    good, _ = load_preferences(config, "train")
    texts = (text for one in good for text in (_identity(one), *one.responses))
    return byte_level(texts, config.vocabulary)


def _rows(config: Config) -> Iterator[tuple[int, Any]]:
    """Numbered rows; a line that is no JSON is `_Unusable` in place of its content."""
    if not config.path.endswith(JSON_LINES):
        yield from load_rows(config)
        return
    open_file = gzip.open if config.path.endswith(".gz") else open
    try:
        with open_file(existing(config.path), "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_line(line)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{config.path} is not a whole gzip file ({error}); download it again") from error


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Unusable(f"broken encoding: not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return _Unusable(f"not JSON ({error.msg} at column {error.colno})")


def _field(content: dict[str, Any], name: str) -> Any:
    if content.get(name) is None:
        raise _Unusable(f"no field {name!r}; the row has: {', '.join(content) or 'none'}")
    return content[name]


def _unpaired(content: dict[str, Any]) -> tuple[Any, tuple[str], tuple[float]]:
    label = _field(content, "label")
    if not isinstance(label, bool | int | float):
        raise _Unusable(f"label must be true, false or a number, got {label!r}")
    return _field(content, "prompt"), (_response(content["completion"], "completion"),), (float(label > 0),)


def _response(value: Any, name: str) -> str:
    """The text of a response, which may be a list with one assistant message."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 1 or not _is_message(value[0]) or value[0]["role"] != "assistant":
        raise _Unusable(f"{name} must be text or a list with one assistant message")
    return value[0]["content"]


def _checked_prompt(prompt: Any) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if not prompt or isinstance(prompt, str):
        raise _Unusable("prompt is empty")
    if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
        raise _Unusable("prompt must be text or messages with role and content")
    if not any(message["content"].strip() for message in prompt):
        raise _Unusable("prompt is empty")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _messages(prompt: str) -> list[dict[str, str]]:
    """Text as chat messages: HH-RLHF's turns, or all of it as the user's."""
    if not prompt.startswith(HUMAN):
        return _checked_prompt([{"role": "user", "content": prompt}])
    _, *turns = re.split(r"\n\n(Human|Assistant):", prompt.removesuffix(ASSISTANT))
    messages = [{"role": ROLES[speaker], "content": text.strip()} for speaker, text in zip(turns[::2], turns[1::2], strict=True)]
    return _checked_prompt(messages)


def _identity(preference: Preference) -> str:
    """The prompt as one text, by whose hash it is held out."""
    return preference.prompt if isinstance(preference.prompt, str) else json.dumps(preference.prompt, sort_keys=True, ensure_ascii=False)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
