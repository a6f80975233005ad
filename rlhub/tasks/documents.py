"""Plain documents for pretraining-style and long-context training (`run.phases: [sft]`, `task.reward.name: none`).

From a text file (one document), a folder of .txt and .md files (one each), JSON lines (gzipped or not), Parquet, or any source that
`datasets.load_dataset` knows. Examples have an empty prompt and the document as demonstration; `sft.packing` says how documents share rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhub.errors import DataError
from rlhub.tasks import Split, Task, finite_task, held_out
from rlhub.tasks.jsonl import existing, load_rows
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = (".txt", ".md")
KIND = "documents"


@dataclass(frozen=True)
class Config:
    path: str = ""  # .txt, .md, .jsonl, .jsonl.gz or .parquet; a folder, with / at its end; else a source for datasets.load_dataset
    text: str = "text"  # field with the document, where rows have fields
    subset: str | None = None  # of a source: the configuration
    source_split: str = "train"  # of a source: its split
    test_path: str | None = None  # the same for held-out documents; None: one in `held_out_one_in`, by its hash
    held_out_one_in: int = 10  # 0: none
    limit: int | None = None  # use the first documents only
    vocabulary: int = 0  # train a byte-level BPE tokenizer of this size on the documents (256: bytes); 0: the model's tokenizer

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is missing: give a .txt or .jsonl file, a folder, or the name of a dataset")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.held_out_one_in < 0 or self.held_out_one_in == 1:
            raise ValueError(f"held_out_one_in must be 0 or at least 2, got {self.held_out_one_in}")
        if self.vocabulary and self.vocabulary < 256:
            raise ValueError(f"vocabulary must be 0 or at least 256, one for each byte, got {self.vocabulary}")


def build(config: Config, split: Split, seed: int) -> Task:
    """The documents of a split, the training ones in shuffled epochs; the test split may be empty.

    Raises:
        DataError: the data cannot be read, a row lacks the field, or there is nothing to train on.
    """
    texts = documents(config, split)
    if split == "train" and not texts:
        raise DataError(f"{config.path}: no documents to train on")
    examples = [Example(index, "", {}, text) for index, text in enumerate(texts)]
    description = f"{Path(config.path).name}, {len(examples)} documents"
    return finite_task("documents", split, description, examples, seed)


def tokenizer(config: Config) -> PreTrainedTokenizerFast | None:
    """A byte-level BPE tokenizer trained on the training documents; None when the model brings its own."""
    if not config.vocabulary:
        return None
    from rlhub.tasks._vocabulary import byte_level

    return byte_level(documents(config, "train"), config.vocabulary)


def documents(config: Config, split: Split) -> list[str]:
    """The texts of a split in the order of the data; empty ones are passed over.

    Raises:
        DataError: they cannot be read.
    """
    own = config.test_path is not None
    path = config.test_path if own and split == "test" else config.path
    texts = [text for text in _texts(config, path)[: config.limit] if text.strip()]
    if own or config.held_out_one_in == 0:
        return [] if split == "test" and not own else texts
    return [text for text in texts if held_out(text, config.held_out_one_in) == (split == "test")]


def _texts(config: Config, path: str) -> list[str]:
    if path.endswith("/"):
        files = sorted(file for file in Path(path).glob("*") if file.suffix in TEXT)
        if not files:
            raise DataError(f"{path}: no folder with .txt or .md files; correct task.train.path")
        return [_read(file) for file in files]
    if path.endswith(TEXT):
        return [_read(existing(path))]
    rows = load_rows(_Source(path, config.subset, config.source_split))
    for number, row in rows:
        if not isinstance(row.get(config.text), str):
            raise DataError(f"{path}, row {number}: no text in field {config.text!r}; the row has: {', '.join(row) or 'none'}")
    return [row[config.text] for _, row in rows]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; convert it") from error


@dataclass(frozen=True)
class _Source:
    path: str
    subset: str | None
    source_split: str
