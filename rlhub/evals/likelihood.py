"""Multiple-choice benchmarks by likelihood: the choice that the model finds most likely after the prompt (`rlhub eval --likelihood`).

    monte_carlo   the ELBO from `draws` masks whose counts are spread over equal strata by one offset (LLaDA, arXiv 2502.09992, Eq. 6 and
                  appendix B.5): each draw keeps the uniform law, their mean varies less than that of independent draws. A choice of so few
                  tokens that all its masks are no more than the draws is scored over all of them, without error.
    chain         tokens revealed one by one, from left to right unless `order` says otherwise, without error (SMDM, arXiv 2410.18514)

Choices of an item share their noise: those of equal length are scored under the same masks, so what a mask does to all of them cancels
in the comparison. With `guidance` w the scored log-probs are those of the logits un + (w + 1) (cond - un), where `un` hides the prompt
(SMDM, Eq. 7).

Results are kept item by item in a JSON-lines file, so that a stopped evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhub.algorithm.batching import sequence_batch
from rlhub.algorithm.scoring import token_log_probs
from rlhub.checkpoints.tokenizers import encode_prompts
from rlhub.errors import DataError, UserError
from rlhub.likelihoods import sequence_draws
from rlhub.networks.finite import check_finite
from rlhub.networks.profile import Profile
from rlhub.noise import Noise, sample_uid
from rlhub.parts import load_part
from rlhub.phases import Phase
from rlhub.records.progress import RunProgress
from rlhub.tasks import load_task
from rlhub.types import Batch, Credit, Example
from rlhub.views import all_masks, chain, model_blocks

METHODS = ("monte_carlo", "chain")
NORMALIZATIONS = ("sum", "token", "byte")


@dataclass(frozen=True)
class Config:
    path: str = ""  # file ending in .jsonl, .jsonl.gz or .parquet; else a source for datasets.load_dataset
    subset: str | None = None  # of a source: the configuration
    source_split: str = "test"  # of a source: its split
    prompt: str = "prompt"  # field with the prompt: text, or chat messages
    choices: str = "choices"  # field with the choices: texts, or {"text": texts, "label": names}
    answer: str = "answer"  # field with the right one: its text, its name, a letter or a number counted from 0
    template: str | None = None  # text with {field} places that makes the prompt, instead of the field `prompt`
    chat: bool = False  # pass the prompt on as one user message, for the model's chat template
    separator: str = " "  # before each choice
    limit: int | None = None  # use the first rows only
    method: str = "monte_carlo"  # monte_carlo | chain
    order: str = "forward"  # of chain: forward | backward | random
    draws: int = 128
    guidance: float = 0.0  # w of unsupervised classifier-free guidance; 0: off
    normalize: str = "sum"  # sum: nats | token: nats per token | byte: nats per byte of the choice's text
    seed: int = 0
    max_tokens: int = 8192  # of the rows that are scored together
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {self.normalize!r}")
        if self.draws < 1 or self.max_tokens < 1:
            raise ValueError(f"draws and max_tokens must be at least 1, got {self.draws} and {self.max_tokens}")
        if self.order not in chain.ORDERS:
            raise ValueError(f"order must be one of {', '.join(chain.ORDERS)}, got {self.order!r}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")


@dataclass(frozen=True)
class Item:
    """A question: prompt and choices as tokens, and the place of the right choice."""

    index: int
    prompt: np.ndarray  # int32 [Lp]
    choices: tuple[np.ndarray, ...]  # int32 [L] each
    num_bytes: tuple[int, ...]  # of each choice's text
    answer: int

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.prompt, *self.choices):
            digest.update(len(part).to_bytes(4, "big") + part.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Score:
    """How likely a choice is: `value` in nats, and its Monte-Carlo standard error, which is too wide for stratified draws."""

    value: float
    standard_error: float
    num_forwards: int


def evaluate_choices(path: Path, config: Config, out: Path | None = None, progress: RunProgress | None = None) -> dict[str, Any]:
    """Accuracy of a model on multiple-choice data, continued from what `out` holds already.

    Args:
        path: a model folder, a checkpoint or a run.
        out: JSON-lines file of the results by item; None: `<path>/likelihood/`, one file for each data and settings.

    Raises:
        UserError: `out` holds results of another model, of other data or settings.
        DataError: the data cannot be read, or an item does not fit the model.
    """
    from rlhub.checkpoints.sealed import resolve_model_path
    from rlhub.inference import load_model
    from rlhub.training.reference_cache import weights_hash

    folder = resolve_model_path(Path(path))
    model = load_model(folder, config.device)
    items = read_items(config, model.tokenizer, model.network.max_length)
    kept = ("max_tokens", "device", "normalize", "limit")  # what changes no score
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in kept}
    settings |= {"weights": weights_hash(folder)}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    out = Path(path) / "likelihood" / f"{Path(config.path).name.partition('.')[0]}-{digest}.jsonl" if out is None else out
    log = ResultLog(out, settings)
    for item in items:
        if item.index in log.results and log.results[item.index]["tokens"] != item.fingerprint:
            raise UserError(f"{out} has item {item.index} with other tokens than {config.path} has now; choose another file with --out")
    waiting = [item for item in items if item.index not in log.results]
    progress = progress or RunProgress(enabled=False)
    progress.phase("likelihood", len(items), len(items) - len(waiting))
    for chunk in _chunks(waiting, config):
        scores = score_items(model.network, chunk, config, model.device)
        log.add([_result(item, score) for item, score in zip(chunk, scores, strict=True)])
        progress.update(sum(item.index in log.results for item in items))
    return summarize([log.results[item.index] for item in items], config) | {"data": config.path, "results": str(out)}


def read_items(config: Config, tokenizer: Any, context: int) -> list[Item]:
    """The items of the data as tokens; prompt and choices are encoded apart, so that choices of a prompt see the same tokens.

    Raises:
        DataError: a row lacks a field, has fewer than two choices, no right one among them, or is longer than the context.
    """
    options = {key: getattr(config, key) for key in ("path", "prompt", "template", "chat", "limit", "subset", "source_split")}
    task = load_task("jsonl", options, "test", 0)
    examples = [task.example(index) for index in range(task.size)]
    items = []
    for example, prompt in zip(examples, encode_prompts(tokenizer, [example.prompt for example in examples]), strict=True):
        texts, answer = parse_choices(example, config)
        encoded = tokenizer([config.separator + text for text in texts], add_special_tokens=False)["input_ids"]
        where = f"{config.path}, row {example.row + 1}"
        for text, ids in zip(texts, encoded, strict=True):
            if not ids or tokenizer.mask_token_id in ids:
                raise DataError(f"{where}: the choice {text!r} has {'the mask token in it' if ids else 'no tokens'}; mend the row")
            if len(prompt) + len(ids) > context:
                raise DataError(f"{where}: prompt and choice have {len(prompt) + len(ids)} tokens, the model's context is {context}")
        choices = tuple(np.array(ids, dtype=np.int32) for ids in encoded)
        items.append(Item(example.row, prompt, choices, tuple(len(text.encode()) for text in texts), answer))
    return items


def parse_choices(example: Example, config: Config) -> tuple[list[str], int]:
    """Texts of the choices and the place of the right one, which may be given as its text, its name, a letter or a number from 0.

    Raises:
        DataError: there are fewer than two, or the right one is not among them.
    """
    where = f"{config.path}, row {example.row + 1}"
    for name in (config.choices, config.answer):
        if example.columns.get(name) is None:
            raise DataError(f"{where}: no field {name!r}; the row has: {', '.join(example.columns)}")
    choices, answer = example.columns[config.choices], example.columns[config.answer]
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (choices, None)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: the choices must be a list of at least two texts, got {choices!r:.80}")
    names = [texts, labels or [], list(string.ascii_uppercase[: len(texts)]), [str(place) for place in range(len(texts))]]
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer, names = str(answer), names[3:]
    for known in names:
        if answer in known:
            return texts, known.index(answer)
    raise DataError(f"{where}: the answer {answer!r} is none of the {len(texts)} choices: give its text, name, letter or number from 0")


@torch.no_grad()
def score_items(network: torch.nn.Module, items: Sequence[Item], config: Config, device: torch.device | str = "cpu") -> list[list[Score]]:
    """The scores of each item's choices; an item's do not depend on the others."""
    places = [(number, choice) for number, item in enumerate(items) for choice in range(len(item.choices))]
    batch = _batch(items, places)
    kinds: dict[str, list[int]] = {}
    for sample in range(len(batch)):
        kinds.setdefault(_views_of(batch, sample, network.profile, config), []).append(sample)
    scores: list[list[Score]] = [[None] * len(item.choices) for item in items]  # type: ignore[list-item]
    for name, samples in kinds.items():
        part = load_part("views", name)
        options = {"elbo": {"draws": config.draws, "levels": "stratified"}, "chain": {"order": config.order}}.get(name, {})
        chosen = _batch(items, [places[sample] for sample in samples])
        credit = Credit(torch.zeros(len(samples), dtype=torch.float64), torch.ones(len(samples), dtype=torch.bool))
        views = part.make(chosen, credit, part.Config(**options), Noise(config.seed).stream("likelihood"), 0, network.profile)
        log_prob = token_log_probs(network, views, config.max_tokens, device, config.guidance)
        check_finite(bool(torch.isfinite(log_prob).all()), network, "log-probs")
        draws = sequence_draws(log_prob.double(), views)
        forwards = torch.bincount(views.sample, minlength=len(samples)) * (2 if config.guidance else 1)
        errors = draws.std(1) / draws.shape[1] ** 0.5 if draws.shape[1] > 1 else torch.zeros(len(samples))
        for sample, value, error, count in zip(samples, draws.mean(1).tolist(), errors.tolist(), forwards.tolist(), strict=True):
            number, choice = places[sample]
            scores[number][choice] = Score(value, error, count)
    return scores


class ResultLog:
    """Results by item in a JSON-lines file whose first line holds the settings; a line that was cut off by a kill is removed.

    Raises:
        UserError: the file holds results of other settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.results = file, {}
        lines = [] if not file.exists() else file.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            file.write_text("".join(lines), encoding="utf-8")
        if not lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._write([{"settings": settings}])
            return
        try:
            before, *rows = [json.loads(line) for line in lines]
            known = before["settings"]
            self.results = {row["item"]: row for row in rows}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is no file of likelihood results; choose another with --out, nothing was overwritten") from None
        for key in sorted({*known, *settings}):
            if known.get(key) != settings.get(key):
                raise UserError(
                    f"{file} holds results with {key}={known.get(key)!r}, now it is {settings.get(key)!r}; "
                    "choose another file with --out, nothing was overwritten"
                )

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._write(rows)
        self.results |= {row["item"]: row for row in rows}

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))


def summarize(results: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Accuracy under each normalisation, with the standard error of `normalize`'s over items; ties go to the first choice."""
    accuracy = {name: float(np.mean([np.argmax(normalized(row, name)) == row["answer"] for row in results])) for name in NORMALIZATIONS}
    mean = accuracy[config.normalize]
    return {
        "likelihood/accuracy": mean,
        "likelihood/standard_error": math.sqrt(mean * (1 - mean) / max(len(results) - 1, 1)),
        **{f"likelihood/accuracy_{name}": value for name, value in accuracy.items()},
        "likelihood/chance": float(np.mean([1 / len(row["scores"]) for row in results])),
        "likelihood/num_items": len(results),
        "likelihood/num_forwards": sum(row["num_forwards"] for row in results),
    }


def normalized(result: dict[str, Any], normalize: str) -> np.ndarray:
    """float64 [C], scores of the choices per unit of `normalize`."""
    units = {"sum": 1.0, "token": result["num_tokens"], "byte": np.maximum(result["num_bytes"], 1)}[normalize]
    return np.asarray(result["scores"]) / units


def _result(item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "item": item.index,
        "tokens": item.fingerprint,
        "answer": item.answer,
        "scores": [score.value for score in scores],
        "standard_errors": [score.standard_error for score in scores],
        "num_tokens": [len(choice) for choice in item.choices],
        "num_bytes": list(item.num_bytes),
        "num_forwards": sum(score.num_forwards for score in scores),
    }


def _chunks(items: Sequence[Item], config: Config) -> Iterator[list[Item]]:
    """Runs of items that fill at least one scoring pass."""
    chunk: list[Item] = []
    tokens = 0
    for item in items:
        chunk.append(item)
        rows = [len(choice) if config.method == "chain" else config.draws for choice in item.choices]
        tokens += sum(count * (len(item.prompt) + len(choice)) for count, choice in zip(rows, item.choices, strict=True))
        if tokens >= config.max_tokens:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _views_of(batch: Batch, sample: int, profile: Profile, config: Config) -> str:
    if config.method == "chain":
        return "chain"
    longest = max(block.stop - block.start for block in model_blocks(batch, sample, profile))
    return "all_masks" if longest <= all_masks.Config().max_tokens and 2**longest - 1 <= config.draws else "elbo"


def _batch(items: Sequence[Item], places: Sequence[tuple[int, int]]) -> Batch:
    """Choices as samples; those of an item have one uid and so the same noise."""
    return sequence_batch(
        [items[number].prompt for number, _ in places],
        [items[number].choices[choice] for number, choice in places],
        [sample_uid(Phase.EVAL.number, 0, items[number].index, 0) for number, _ in places],
    )
