"""Documents packed into rows of equal length, as long-context post-training needs them (UltraLLaDA, arXiv 2510.10481, sec. 3.3).

    adaptive   documents of a row do not see each other, and positions start again: equal to training them one by one
    eod        an EOS after each document, full attention over the row
    direct     nothing between documents, full attention over the row

An epoch is all training documents in its own order, one after the other, cut into rows; a document that is cut goes on in the next row and
the last row is shorter, so that no token is lost. Row r of epoch e depends on the data, the seed and (e, r) only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlhub.algorithm.batching import sequence_batch
from rlhub.algorithm.compose import Algorithm
from rlhub.config.schema import Recipe
from rlhub.errors import DataError
from rlhub.noise import Noise, sample_uid
from rlhub.phases import Phase
from rlhub.records.step_record import Metric
from rlhub.tasks import Task
from rlhub.training.pairs import eval_algorithm
from rlhub.types import Batch
from workers.crew import Crew

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECE = 64  # documents that are scored at once


@dataclass(frozen=True)
class PackedDocuments:
    """Rows of `length` tokens made of documents.

    Attributes:
        documents: int32 [n] each.
        packing: adaptive, eod or direct.

    Example:
        >>> packed = PackedDocuments([np.arange(3), np.arange(5)], "eod", 4, eos_id=9, noise=Noise(0))
        >>> packed.rows_per_epoch
        3
    """

    documents: Sequence[np.ndarray]
    packing: str
    length: int
    eos_id: int
    noise: Noise
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, compare=False)  # the one that was asked for last

    @property
    def rows_per_epoch(self) -> int:
        ends = len(self.documents) if self.packing == "eod" else 0
        return -(-(sum(map(len, self.documents)) + ends) // self.length)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [T] of an epoch (counted from 0) and the documents int32 [T] that they belong to."""
        if epoch not in self._epochs:
            order = self.noise.generator("data/documents/order", epoch=epoch).permutation(len(self.documents))
            pieces = [self.documents[index] for index in order]
            if self.packing == "eod":
                pieces = [np.append(piece, self.eos_id) for piece in pieces]
            tokens = np.concatenate(pieces).astype(np.int32)
            document = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
            self._epochs.clear()
            self._epochs[epoch] = tokens, document
        return self._epochs[epoch]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and documents of a row, counted through all epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        tokens, document = self.epoch(epoch)
        cut = slice(place * self.length, (place + 1) * self.length)
        return tokens[cut], document[cut] - document[cut][0]

    def batch(self, step: int, size: int) -> Batch:
        """The rows of a step, counted from 1."""
        rows = [self.row((step - 1) * size + number) for number in range(size)]
        segments = [document for _, document in rows] if self.packing == "adaptive" else None
        return document_batch([tokens for tokens, _ in rows], Phase.SFT, step, segments)


def pack_documents(task: Task, tokenizer: PreTrainedTokenizerFast, packing: str, length: int, noise: Noise) -> PackedDocuments:
    """The documents of a task's training split as rows of `length` tokens.

    Raises:
        DataError: a document holds the mask token.
    """
    documents = encode_documents(task, tokenizer)
    return PackedDocuments(documents, packing, length, tokenizer.eos_token_id, noise)


def encode_documents(task: Task, tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """int32 [n] of each document of a split, in the order of the data.

    Raises:
        DataError: a document holds the mask token.
    """
    if not task.size:
        return []
    texts = [example.demonstration for example in sorted(map(task.example, range(task.size)), key=lambda example: example.row)]
    documents = [np.array(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for number, document in enumerate(documents):
        if (document == tokenizer.mask_token_id).any():
            raise DataError(f"{task.description}: document {number} holds the mask token {tokenizer.mask_token}; remove it from the text")
    return [document for document in documents if len(document)]


def document_batch(rows: Sequence[np.ndarray], phase: Phase, step: int, segments: list[np.ndarray] | None = None) -> Batch:
    """Rows of tokens without prompts as a batch."""
    uids = [sample_uid(phase.number, step, number, 0) for number in range(len(rows))]
    return sequence_batch([np.zeros(0)] * len(rows), rows, uids, segments=segments)


def evaluate_documents(crew: Crew, recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerFast) -> dict[str, Metric]:
    """ELBO per token of the first `task.eval_rows` held-out documents, each alone and cut to `sampler.length` tokens."""
    documents = [document[: recipe.sampler.length] for document in encode_documents(task, tokenizer)[: recipe.task.eval_rows]]
    if not documents:
        return {}
    algorithm = Algorithm.compose(eval_algorithm(recipe))
    total = 0.0
    for first in range(0, len(documents), PIECE):
        batch = document_batch(documents[first : first + PIECE], Phase.EVAL, first // PIECE)
        total += float(crew.learners.estimate(algorithm.config, algorithm.credited(batch)).value.sum())
    return {"eval/elbo_per_token": total / sum(map(len, documents)), "eval/num_documents": len(documents)}
