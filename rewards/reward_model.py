"""A learned reward: what a sequence-classification checkpoint says of prompt and completion, run by transformers or vLLM.

A checkpoint with one label gives its logit (`sigmoid` its sigmoid), one with several the probability of `label`. The text is

- the chat template of the checkpoint's tokenizer over the prompt and the completion as the assistant's turn, where it has one;
- else prompt and completion as the tokenizer's own text pair (`[CLS] prompt [SEP] completion [SEP]`), chat prompts joined by newlines;
- or, with `separator`, the one text prompt + separator + completion.

An item that cannot be scored (an empty completion, broken Unicode, too many tokens) is `rejected` with the reason. A value does not
depend on the other items of its batch beyond rounding (1e-5 in float32). Both backends give the same values (1e-3); vLLM (docs/vllm.md)
batches better and knows fewer architectures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import Item, Prompt
from rewards.answers.text import Unusable, check_text, plain
from rlhub.types import RewardResult

if TYPE_CHECKING:
    from torch import Tensor

    from rewards._vllm_checkpoint import VllmCheckpoint

Encoded = dict[str, list[int]]  # input_ids and, where the tokenizer makes them, token_type_ids


@dataclass(frozen=True)
class Config:
    model: str = ""  # checkpoint folder in the Hugging Face layout, or a name on the Hub
    label: int | None = None  # index whose probability is the value; needed where the checkpoint has several labels
    sigmoid: bool = False  # of the logit of a checkpoint with one label
    separator: str | None = None  # see above
    too_long: str = "reject"  # or truncate_left: cut the prompt's first tokens, and say how many in the result's detail
    max_tokens: int | None = None  # of one item; None: what tokenizer and checkpoint allow
    max_batch_tokens: int = 16384  # padded tokens of one forward pass; a longer single item forms a batch of its own
    dtype: str = "float32"  # or bfloat16
    device: str = "cpu"  # as torch names it
    backend: str = "transformers"  # or vllm

    def __post_init__(self) -> None:
        check_model_options(self)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in evaluation mode with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def max_tokens(self) -> int:
        """The longest sequence that tokenizer and network allow."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)

    def outputs(self, rows: Sequence[Encoded], max_batch_tokens: int) -> list[Tensor]:
        """The head's output of each row on the CPU in float32: [C] of a sequence head, [L, C] of a token head, for C labels."""
        import torch

        outputs: dict[int, Tensor] = {}
        padding = self.model.config.pad_token_id
        # Without a padding token a causal classifier cannot tell where a row ends, so rows go through it one by one.
        for batch in length_batches([len(row["input_ids"]) for row in rows], 0 if padding is None else max_batch_tokens):
            lengths = [len(rows[index]["input_ids"]) for index in batch]
            # Padding goes to the right, where no causal model sees it and where classifiers look for the last token before it.
            arguments = {
                name: torch.tensor(
                    [rows[index][name] + [filler] * (max(lengths) - length) for index, length in zip(batch, lengths, strict=True)]
                )
                for name, filler in (("input_ids", padding or 0), ("token_type_ids", 0))
                if name in rows[batch[0]]
            }
            arguments["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            with torch.inference_mode():
                logits = self.model(**{name: value.to(self.model.device) for name, value in arguments.items()}).logits.float().cpu()
            for index, length, output in zip(batch, lengths, logits, strict=True):
                outputs[index] = output if output.dim() == 1 else output[:length]
        return [outputs[index] for index in range(len(rows))]


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """The value of one completion, see `grade_batch`."""
    return grade_batch([(prompt, completion, row)], config)[0]


def grade_batch(items: Sequence[Item], config: Config) -> list[RewardResult]:
    """One result per item, in order.

    Raises:
        ValueError: the checkpoint cannot be loaded, is no classifier, or does not fit `label` and `sigmoid`.
    """
    checkpoint = load("AutoModelForSequenceClassification", config)
    check_labels(checkpoint, config)
    results: list[RewardResult] = [RewardResult(math.nan, "rejected")] * len(items)
    rows: dict[int, tuple[Encoded, int]] = {}
    for index, (prompt, completion, _) in enumerate(items):
        try:
            rows[index] = encode(checkpoint, prompt, completion, config)
        except Unusable as error:
            results[index] = RewardResult(math.nan, "rejected", str(error))
    outputs = checkpoint.outputs([encoded for encoded, _ in rows.values()], config.max_batch_tokens)
    for (index, (_, cut)), logits in zip(rows.items(), outputs, strict=True):
        value = scores(logits, config).item()
        detail = f"{cut} prompt tokens cut" if cut else ""
        results[index] = RewardResult(value, detail=detail) if math.isfinite(value) else RewardResult(value, "rejected", f"scored {value}")
    return results


def prepare(config: Config) -> None:
    """Loads the checkpoint; raises ValueError as `grade_batch` does."""
    check_labels(load("AutoModelForSequenceClassification", config), config)


def version(config: Any) -> str:
    """What the grades depend on beside the options: the files of a checkpoint folder, by size and time of change."""
    files = sorted(path for path in Path(config.model).rglob("*") if path.is_file())
    return json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def own_limits(config: Any) -> bool:
    """A forward pass ends by itself, and a model takes what memory it takes."""
    return True


def check_model_options(config: Any) -> None:
    """Raises ValueError where the options that all models share are wrong."""
    if not config.model:
        raise ValueError("model is missing, give a checkpoint folder or a name on the Hub")
    choices_of = {"too_long": ("reject", "truncate_left"), "dtype": ("float32", "bfloat16"), "backend": ("transformers", "vllm")}
    for name, choices in choices_of.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, got {getattr(config, name)!r}")
    for name in ("max_tokens", "max_batch_tokens"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def load(auto_class: str, config: Any) -> Checkpoint | VllmCheckpoint:
    """A checkpoint with the head that `auto_class` of transformers gives it, loaded once per process.

    Raises:
        ValueError: it is not there, or it has no trained head: transformers would make one up at random.
    """
    return _load(auto_class, config.model, config.dtype, config.device, config.backend)


@lru_cache(maxsize=4)
def _load(auto_class: str, path: str, dtype: str, device: str, backend: str) -> Checkpoint | VllmCheckpoint:
    """A reward model or classifier, loaded once in each process.

    Raises:
        ValueError: the folder holds no such model, in one line.
    """
    if backend == "vllm":
        from rewards._vllm_checkpoint import load_checkpoint

        return load_checkpoint(path, dtype, "classify" if "Sequence" in auto_class else "token_classify")
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model, report = getattr(transformers, auto_class).from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"no reward model {path!r}: {str(error).strip().partition(chr(10))[0]}") from error
    if report["missing_keys"]:
        raise ValueError(f"{path} is no trained reward model: it lacks {', '.join(sorted(report['missing_keys']))}")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Checkpoint(model.eval().requires_grad_(False).to(device), tokenizer)


def check_labels(checkpoint: Checkpoint | VllmCheckpoint, config: Any) -> None:
    """Raises ValueError unless `label` and `sigmoid` fit the checkpoint's number of labels."""
    count = checkpoint.num_labels
    if count == 1 and config.label is not None:
        raise ValueError(f"{config.model} has one label, its logit is the value: leave out label, or set sigmoid")
    if count > 1 and (config.label is None or not 0 <= config.label < count or config.sigmoid):
        got = f"label {config.label} and sigmoid {config.sigmoid}"
        raise ValueError(f"{config.model} has {count} labels: set label to 0..{count - 1} and leave out sigmoid, got {got}")


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def chat_ids(tokenizer: Any, conversation: list[dict[str, str]], **options: Any) -> list[int]:
    """The conversation in the tokenizer's chat template. Raises Unusable where the template refuses it."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **options)
    except TemplateError as error:
        raise Unusable(f"the chat template refuses the conversation: {error}") from error


def encode(checkpoint: Checkpoint | VllmCheckpoint, prompt: Prompt, completion: str, config: Any) -> tuple[Encoded, int]:
    """The model's input by the rule of the module's docstring, and how many prompt tokens were cut.

    Raises:
        Unusable: the item cannot be scored.
    """
    check_text(prompt, completion)
    tokenizer = checkpoint.tokenizer
    if config.separator is not None:
        encoded = tokenizer(plain(prompt) + config.separator + completion)
    elif tokenizer.chat_template:
        conversation = [*messages(prompt), {"role": "assistant", "content": completion}]
        encoded = {"input_ids": chat_ids(tokenizer, conversation)}
    else:
        encoded = tokenizer(plain(prompt), completion)
    kept = {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}
    return fit(checkpoint, kept, len(tokenizer(completion, add_special_tokens=False)["input_ids"]), config)


def fit(checkpoint: Checkpoint | VllmCheckpoint, encoded: Encoded, completion_tokens: int, config: Any) -> tuple[Encoded, int]:
    """The input within the limit of tokens, and how many were cut: a leading special token and the whole completion stay.

    Raises:
        Unusable: it is too long, the completion has no token, or a token has no embedding.
    """
    if not completion_tokens:
        raise Unusable("the completion has no tokens")
    ids, tokenizer, vocabulary = encoded["input_ids"], checkpoint.tokenizer, checkpoint.vocabulary
    if max(ids) >= vocabulary:
        raise Unusable(f"token {max(ids)} is outside the model's vocabulary of {vocabulary}")
    limit = min(config.max_tokens or checkpoint.max_tokens, checkpoint.max_tokens)
    cut = len(ids) - limit
    if cut <= 0:
        return encoded, 0
    if config.too_long == "reject":
        raise Unusable(f"{len(ids)} tokens, the limit is {limit}; too_long: truncate_left cuts the prompt")
    head = int(ids[0] in tokenizer.all_special_ids)
    if completion_tokens + head > limit:
        raise Unusable(f"the completion alone has {completion_tokens} tokens, the limit is {limit}")
    return {name: values[:head] + values[head + cut :] for name, values in encoded.items()}, cut


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices sorted by length in batches of at most `max_tokens` padded tokens; a longer single row forms a batch of its own."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def scores(logits: Tensor, config: Any) -> Tensor:
    """Values [...] from logits [..., C]."""
    if logits.shape[-1] == 1:
        return logits[..., 0].sigmoid() if config.sigmoid else logits[..., 0]
    return logits.softmax(-1)[..., config.label]
