"""Tokenizers: small vocabularies, prompts and clean decoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhub.checkpoints.tokenizers import decode, encode_prompts, load_tokenizer
from rlhub.errors import CheckpointError, DataError
from rlhub.tasks import load_task, task_tokenizer
from rlhub.tasks._vocabulary import word_level

WORDS = [str(number) for number in range(20)] + ["+", "-", "=", ":"]
TOKENIZER = word_level(WORDS)
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
def test_word_level_round_trip(words):
    text = " ".join(words)
    ids = encode_prompts(TOKENIZER, [text])[0]
    assert ids.dtype == np.int32 and ids.tolist() == [WORDS.index(word) for word in words]
    assert decode(TOKENIZER, ids) == text


def test_special_ids_follow_the_words():
    ids = [TOKENIZER.mask_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    assert ids == [len(WORDS), len(WORDS) + 1, len(WORDS) + 2]
    assert len(TOKENIZER) == len(WORDS) + 4


def test_decode_stops_at_the_first_eos_and_leaves_special_tokens_out():
    mask, eos, pad = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    assert decode(TOKENIZER, np.array([3, mask, 4, pad, eos, 5, eos])) == "3 4"
    assert decode(TOKENIZER, [eos, 1]) == ""
    assert decode(TOKENIZER, [mask, mask]) == ""


def test_chat_and_plain_prompts_mix_in_one_batch():
    tokenizer = word_level(WORDS)
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "user", "content": "1 + 2"}]
    rows = encode_prompts(tokenizer, ["3 4", chat, "5", chat])
    assert [decode(tokenizer, row) for row in rows] == ["3 4", "1 + 2 :", "5", "1 + 2 :"]
    assert all(
        np.array_equal(row, encode_prompts(tokenizer, [prompt])[0]) for row, prompt in zip(rows, ["3 4", chat, "5", chat], strict=True)
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("1 21", "word outside the tokenizer's vocabulary"),
        ("  ", "has no tokens"),
        ([{"role": "user", "content": "1"}], "no chat template"),
    ],
)
def test_bad_prompts_are_data_errors(prompt, message):
    with pytest.raises(DataError, match=message):
        encode_prompts(TOKENIZER, [prompt])


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], ["[MASK]"]])
def test_bad_vocabularies(words):
    with pytest.raises(ValueError, match="distinct words"):
        word_level(words)


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.mask_token_id == TOKENIZER.mask_token_id and loaded.eos_token_id == TOKENIZER.eos_token_id
    assert decode(loaded, encode_prompts(loaded, ["3 + 4 = 7 :"])[0]) == "3 + 4 = 7 :"


def test_missing_tokenizer_names_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "config"),
    [("sort", {}), ("countdown", {"style": "short", "correct_fraction": 0.5}), ("sudoku", {"style": "short", "correct_fraction": 0.5})],
)
def test_task_vocabularies_cover_their_texts(name, config):
    tokenizer = task_tokenizer(name, config)
    task = load_task(name, config, "train", seed=0)
    for index in range(200):
        example = task.example(index)
        for text in (example.prompt, example.demonstration):
            assert decode(tokenizer, encode_prompts(tokenizer, [text])[0]) == text


def test_published_styles_use_the_tokenizer_of_the_model():
    assert task_tokenizer("countdown", {}) is None
    assert task_tokenizer("sudoku", {}) is None
    assert task_tokenizer("jsonl", {"path": "rows.jsonl"}) is None
