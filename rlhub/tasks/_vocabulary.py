"""Tokenizers of the built-in tasks: words, and byte-level BPE trained on the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def word_level(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whitespace-separated words: `tokens` get the ids from 0, then come `[MASK]`, `[EOS]`, `[PAD]` and `[UNK]`.

    Example:
        >>> word_level(["a", "b"]).encode("b a")
        [1, 0]

    Raises:
        ValueError: a token is empty, holds white space or appears twice.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*tokens, *SPECIAL_TOKENS.values()]
    for word, count in Counter(words).items():
        if count > 1 or word.split() != [word]:
            raise ValueError(f"tokens must be distinct words without white space, got {word!r}")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def byte_level(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts, which can spell every text; `[MASK]`, `[EOS]` and `[PAD]` come after `vocabulary`.

    Args:
        vocabulary: number of tokens, at least the 256 bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=sorted(alphabet), show_progress=False))
    special = {name: token for name, token in SPECIAL_TOKENS.items() if name != "unk_token"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


SPECIAL_TOKENS = {"mask_token": "[MASK]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
