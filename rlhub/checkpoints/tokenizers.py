"""Text to token ids and back, for checkpoint tokenizers and for the small vocabularies of the built-in tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhub.checkpoints.folders import CONFIG, empty_network, published_config
from rlhub.errors import CheckpointError, DataError
from rlhub.tasks._vocabulary import SPECIAL_TOKENS
from rlhub.types import Prompt

log = logging.getLogger("rlhub")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder in the Hugging Face layout.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    # AutoTokenizer would consult config.json, whose model types transformers does not know, and run a repository's own code.
    loader, options = AutoTokenizer, {"trust_remote_code": False}
    if (Path(path) / "tokenizer.json").exists():
        loader, options = PreTrainedTokenizerFast, {}
    elif (Path(path) / "vocab.json").exists() and (Path(path) / "merges.txt").exists():  # Dream and SDAR
        loader, options = Qwen2Tokenizer, {}
    try:
        tokenizer = loader.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"no tokenizer in {path}: save one there with the checkpoint, e.g. tokenizer.json ({reason})") from error
    if (Path(path) / CONFIG).exists():
        _follow_config(tokenizer, Path(path))
    return tokenizer


def _follow_config(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Give a tokenizer the mask, EOS and padding that the model has: published tokenizers name other ones, or none (LLaDA's mask).

    Raises:
        CheckpointError: the model's mask is no token of the tokenizer.
    """
    profile = empty_network(published_config(folder), str(folder / CONFIG)).profile
    for name, number in (("mask", profile.mask_id), ("eos", profile.eos_id), ("pad", profile.pad_id)):
        own = getattr(tokenizer, f"{name}_token_id")
        token = tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(tokenizer) else None
        if own == number:
            continue
        if token is None:
            if name == "mask":
                raise CheckpointError(
                    f"{folder}: the model's mask is token {number}, the tokenizer has {len(tokenizer)}; use the model's own"
                )
            continue
        if own is not None:
            shown = f"{getattr(tokenizer, f'{name}_token')} ({own})"
            log.warning(
                "%s: the %s token is %s (%d) as config.json says; the tokenizer's %s is not used", folder, name, token, number, shown
            )
        if own is None or name != "pad":  # nothing of ours pads by the tokenizer
            setattr(tokenizer, f"{name}_token", token)


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """int32 [Lp] for each prompt: plain text as the tokenizer encodes it, chat messages through its template up to the assistant's turn.

    Raises:
        DataError: a prompt has no tokens or a word outside the vocabulary, or it is a chat and the tokenizer has no chat template.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    plain = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str)]
    chats = [row for row, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if plain:
        for row, encoded in zip(plain, tokenizer([prompts[row] for row in plain])["input_ids"], strict=True):
            ids[row] = encoded
    if chats:
        if not tokenizer.chat_template:
            raise DataError("the prompts are chat messages but the tokenizer has no chat template: use an instruction-tuned checkpoint")
        messages = [prompts[row] for row in chats]
        encoded_chats = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        for row, encoded in zip(chats, encoded_chats, strict=True):
            ids[row] = encoded
    for prompt, encoded in zip(prompts, ids, strict=True):
        if not encoded:
            raise DataError(f"the prompt {prompt!r} has no tokens")
        if tokenizer.unk_token == SPECIAL_TOKENS["unk_token"] and tokenizer.unk_token_id in encoded:
            raise DataError(f"the prompt {prompt!r} has a word outside the tokenizer's vocabulary of {len(tokenizer)}")
    return [np.asarray(encoded, dtype=np.int32) for encoded in ids]


def answer_end(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """The tokens that follow an answer: EOS, and in a chat before it the end of the assistant's turn, as the chat template writes it."""
    turn = None if isinstance(prompt, str) else turn_end(tokenizer)
    return [tokenizer.eos_token_id] if turn in (None, tokenizer.eos_token_id) else [turn, tokenizer.eos_token_id]


@lru_cache(maxsize=8)
def turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that a chat template writes behind an assistant's words; None without a template, or where it writes none."""
    if not tokenizer.chat_template:
        return None
    words = "zq"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]
    rest = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False).rpartition(words)[2]
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None


def decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray | Sequence[int]) -> str:
    """The text of a completion `[L]` up to its first EOS, without special tokens (so positions that were never filled leave no trace)."""
    row = np.asarray(ids)
    ends = np.flatnonzero(row == tokenizer.eos_token_id)
    return tokenizer.decode(row[: ends[0]] if len(ends) else row, skip_special_tokens=True)
