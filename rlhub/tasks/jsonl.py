"""Prompts from a file (JSON lines, gzipped JSON lines or Parquet) or from any source that `datasets.load_dataset` knows.

Columns of an example are all fields of its row. The train split is walked in epochs, each in its own shuffled order; the test split keeps
the order of the file.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhub.errors import DataError
from rlhub.tasks import Split, Task, finite_task
from rlhub.types import Example

JSON_LINES = (".jsonl", ".json", ".gz")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class Config:
    path: str = ""  # file ending in .jsonl, .jsonl.gz or .parquet; else a source for datasets.load_dataset
    prompt: str = "prompt"  # field with the prompt: text, or chat messages
    completion: str | None = None  # field with a completion to imitate (SFT)
    template: str | None = None  # text with {field} places that makes the prompt, instead of the field `prompt`; {{ and }} for braces
    chat: bool = False  # pass the prompt on as one user message, for the model's chat template
    limit: int | None = None  # use the first rows only
    subset: str | None = None  # of a source: the configuration, e.g. main of openai/gsm8k
    source_split: str = "train"  # of a source: its split

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is missing: give a .jsonl or .parquet file or the name of a dataset")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")


def build(config: Config, split: Split, seed: int) -> Task:
    """A finite split, checked whole.

    Raises:
        DataError: the file is missing or malformed; a row lacks a field or has an empty prompt.
    """
    rows = load_rows(config)
    if not rows:
        raise DataError(f"{config.path}: no rows")
    examples = [_example(config, index, number, row) for index, (number, row) in enumerate(rows[: config.limit])]
    description = f"{Path(config.path).name if _is_file(config.path) else config.path}, {len(examples)} rows"
    return finite_task("jsonl", split, description, examples, seed)


def read_jsonl(path: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a JSON-lines file with their 1-based line numbers; empty lines are passed over.

    Raises:
        DataError: the file is missing, or a line is not a JSON object.
    """
    open_file = gzip.open if path.endswith(".gz") else open
    rows = []
    with open_file(existing(path), "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, row {number}: not JSON ({error.msg} at column {error.colno}); write one object per line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
            rows.append((number, row))
    return rows


def existing(path: str) -> Path:
    """The path of a file that exists; DataError otherwise."""
    if not Path(path).is_file():
        raise DataError(f"data file not found: {path}; correct the task's path or create the file")
    return Path(path)


def _is_file(path: str) -> bool:
    return path.endswith(JSON_LINES + PARQUET)


def load_rows(config: Any) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows of a file or source: any object with the fields `path`, `subset` and `source_split` says which.

    Raises:
        DataError: it cannot be read.
    """
    if config.path.endswith(JSON_LINES):
        return read_jsonl(config.path)
    from datasets import Dataset, load_dataset

    parquet = str(existing(config.path)) if config.path.endswith(PARQUET) else None
    try:
        if parquet:
            rows = Dataset.from_parquet(parquet, keep_in_memory=True)
        else:
            rows = load_dataset(config.path, config.subset, split=config.source_split)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"cannot read {config.path}: {reason}; correct the task's path, subset or source_split") from error
    return list(enumerate(rows, start=1))


def _example(config: Config, index: int, number: int, row: dict[str, Any]) -> Example:
    where = f"{config.path}, row {number}"
    prompt = _field(row, config.prompt, where) if config.template is None else _fill(config.template, row, where)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DataError(f"{where}: empty prompt; give it text or remove the row")
    if not isinstance(prompt, str | list):
        raise DataError(f"{where}: the prompt must be text or chat messages, got {type(prompt).__name__}")
    if config.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return Example(index, prompt, row, None if config.completion is None else _field(row, config.completion, where))


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; the row has: {', '.join(row) or 'none'}")
    return row[name]


def _fill(template: str, row: dict[str, Any], where: str) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        raise DataError(f"{where}: the template needs a field {error}; the row has: {', '.join(row) or 'none'}") from error
    except ValueError as error:
        raise DataError(f"the template {template!r} is malformed ({error}); write {{{{ and }}}} for plain braces") from error
