"""Preference data: every published form of a row, what cannot be used and why, and the split by prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from data_files import DATA, needs_data

from rlhub.algorithm.pairs import PairOrder, encode
from rlhub.errors import DataError
from rlhub.noise import Noise
from rlhub.tasks import load_task, task_tokenizer
from rlhub.tasks._vocabulary import byte_level
from rlhub.tasks.preferences import Config, load_preferences, parse

HH = DATA / "hh-rlhf" / "harmless-base.test.jsonl.gz"
USER = [{"role": "user", "content": "What color is the sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": f"It is {color}."}] for color in ("blue", "green"))


def write(path: Path, rows: list) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(["What color is the sky? It is blue. It is green."], 256)


# The forms are those of TRL's page "Dataset formats and types" and of the HH-RLHF files.
@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", (" blue.", " green.")),
        ({"prompt": USER, "chosen": BLUE, "rejected": GREEN}, USER, ("It is blue.", "It is green.")),
        ({"chosen": [*USER, *BLUE], "rejected": [*USER, *GREEN]}, USER, ("It is blue.", "It is green.")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", (" blue.", " green.")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, "The sky is", (" blue", " black")),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant: Is blue",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant: Is red",
            },
            "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant:",
            (" Is blue", " Is red"),
        ),
    ],
    ids=["standard", "conversational", "implicit conversational", "implicit text", "implicit text within a word", "hh"],
)
def test_published_forms(row, prompt, responses):
    found = parse(row, 3, 4)
    assert (found.prompt, found.responses, found.rewards, found.row, found.number) == (prompt, responses, (1.0, 0.0), 3, 4)


@pytest.mark.parametrize(("label", "reward"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (-1, 0.0), (0.7, 1.0)])
@pytest.mark.parametrize(("prompt", "completion"), [("The sky is", " blue."), (USER, BLUE)])
def test_unpaired_forms(prompt, completion, label, reward):
    found = parse({"prompt": prompt, "completion": completion, "label": label}, 0, 1)
    assert found.rewards == (reward,) and found.prompt == prompt and len(found.responses) == 1


def test_dialogues_become_chat_messages():
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant:"
    found = parse({"chosen": text + " blue", "rejected": text + " red"}, 0, 1, chat=True)
    assert found.prompt == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Sky?"},
    ]
    assert parse({"prompt": "Sky?", "chosen": "blue", "rejected": "red"}, 0, 1, chat=True).prompt == [{"role": "user", "content": "Sky?"}]


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD = [
    ({**PAIR, "rejected": "c"}, "chosen equals rejected"),
    ({"chosen": "same text", "rejected": "same text"}, "chosen equals rejected"),
    ({**PAIR, "prompt": " \n"}, "prompt is empty"),
    ({**PAIR, "chosen": ""}, "chosen is empty"),
    ({**PAIR, "rejected": "  "}, "rejected is empty"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "rejected is empty"),
    ({"chosen": "blue", "rejected": "green"}, "prompt is empty"),
    ({"prompt": "p", "chosen": "c"}, "no field 'rejected'"),
    ({"text": "p"}, "no field 'chosen'; the row has: text"),
    ({**PAIR, "chosen": None}, "no field 'chosen'"),
    ({**PAIR, "chosen": 7}, "chosen must be text or a list with one assistant message"),
    ({**PAIR, "chosen": [*USER]}, "one assistant message"),
    ({**PAIR, "prompt": 7}, "prompt must be text or messages"),
    ({"prompt": "p", "completion": "c", "label": "good"}, "label must be true, false or a number, got 'good'"),
    ({"prompt": "p", "completion": "c"}, "no field 'label'"),
    ({"chosen": [*USER, *BLUE], "rejected": [*BLUE, *GREEN]}, "part before their last message"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"}, "part before their last assistant turn"),
    ({**PAIR, "chosen": "\ud800"}, "broken encoding: lone surrogates"),
    (b'{"prompt": "p", "chosen": "\xff", "rejected": "r"}', "broken encoding: not UTF-8 at byte 27"),
    (b'{"prompt": "p", ', "not JSON"),
    ([1, 2], "expected an object, got list"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_what_cannot_be_used_is_reported_by_row(tmp_path, row, reason):
    path = write(tmp_path / "pairs.jsonl", [PAIR, row, {**PAIR, "prompt": "q"}])
    good, bad = load_preferences(Config(path, held_out_one_in=0), "train")
    assert [one.number for one in good] == [1, 3] and [one.row for one in good] == [0, 2]
    assert [one.number for one in bad] == [2] and reason in bad[0].reason and "\n" not in bad[0].reason


def test_tokens_decide_the_rest(tokenizer):
    rows = [
        ({"prompt": "sky", "chosen": "blue", "rejected": "green"}, None),
        ({"prompt": "sky", "chosen": "b" * 60, "rejected": "green"}, "64 tokens with the end of the response, the limit is 63"),
        ({"prompt": "sky", "chosen": "a [MASK] b", "rejected": "green"}, "the text holds the mask token [MASK]"),
        ({"prompt": "sky", "chosen": "b" * 59, "rejected": "green"}, None),
    ]
    pairs, bad = encode([parse(row, number, number + 1) for number, (row, _) in enumerate(rows)], tokenizer, 63)
    assert [(one.number, one.reason) for one in bad] == [(number + 1, reason) for number, (_, reason) in enumerate(rows) if reason]
    assert pairs.row.tolist() == [0, 3]
    assert tokenizer.decode(pairs.responses[0][0]) == "blue[EOS]"


def test_a_response_that_fills_the_canvas_has_no_end(tokenizer):
    rows = [parse({"prompt": "sky", "chosen": "blue", "rejected": "red"}, 0, 1)]
    for full, lengths in ((0, [5, 4]), (4, [4, 4]), (3, [5, 3])):
        assert [len(response) for response in encode(rows, tokenizer, 63, full)[0].responses[0]] == lengths


def test_a_word_outside_the_vocabulary_is_a_bad_row():
    from rlhub.tasks._vocabulary import word_level

    rows = [{"prompt": "1 2", "chosen": "1", "rejected": "2"}, {"prompt": "1 x", "chosen": "1", "rejected": "2"}]
    rows.append({"prompt": "1", "chosen": "1  2", "rejected": "1 2"})
    pairs, bad = encode([parse(row, number, number + 1) for number, row in enumerate(rows)], word_level(["1", "2"]), 32)
    assert len(pairs) == 1 and [one.number for one in bad] == [2, 3]
    assert "outside the tokenizer's vocabulary" in bad[0].reason and bad[1].reason == "chosen and rejected have the same tokens"


def test_gzip_and_parquet_hold_the_same(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"p{number}", "chosen": "c", "rejected": "r"} for number in range(5)]
    plain = write(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    loaded = [
        load_preferences(Config(str(tmp_path / f"pairs.{end}"), held_out_one_in=0), "train") for end in ("jsonl", "jsonl.gz", "parquet")
    ]
    assert loaded[0] == loaded[1] == loaded[2] and len(loaded[0][0]) == 5


def test_a_torn_gzip_file_is_one_line(tmp_path):
    whole = gzip.compress(b"".join(json.dumps({**PAIR, "prompt": str(number)}).encode() + b"\n" for number in range(2000)))
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz is not a whole gzip file.*download it again"):
        load_preferences(Config(str(tmp_path / "torn.jsonl.gz")), "train")


def test_prompts_are_held_out_by_hash_and_never_on_both_sides(tmp_path):
    rows = [{"prompt": f"p{number % 100}", "chosen": f"c{number}", "rejected": "r"} for number in range(300)]
    config = Config(write(tmp_path / "pairs.jsonl", rows), held_out_one_in=5)
    train, test = (load_preferences(config, split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 300 and 30 <= len(test) <= 90
    assert not {one.prompt for one in train} & {one.prompt for one in test}


def test_a_test_file_of_its_own(tmp_path):
    config = Config(write(tmp_path / "a.jsonl", [PAIR]), test_path=write(tmp_path / "b.jsonl", [{**PAIR, "prompt": "q"}, {"bad": 1}]))
    assert [one.prompt for one in load_preferences(config, "train")[0]] == ["p"]
    good, bad = load_preferences(config, "test")
    assert [one.prompt for one in good] == ["q"] and [one.number for one in bad] == [2]


def test_pairs_and_unpaired_rows_do_not_mix(tmp_path):
    path = write(tmp_path / "mixed.jsonl", [PAIR, {"prompt": "p", "completion": "c", "label": True}])
    with pytest.raises(DataError, match="row 1 is a pair and row 2 is unpaired; split the file in two"):
        load_preferences(Config(path, held_out_one_in=0), "train")


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path):
    with pytest.raises(DataError, match="no usable preferences; the first of 2 bad ones is row 1: no field 'chosen'"):
        load_preferences(Config(write(tmp_path / "bad.jsonl", [{}, {}]), held_out_one_in=0), "train")


def test_every_epoch_has_every_pair_once():
    order = PairOrder(num_pairs=50, pairs_per_step=16, noise_plans=2, noise=Noise(0))
    steps = [order.step(step) for step in range(1, 13)]
    assert [epoch for epoch, _ in steps] == [0] * 4 + [1] * 4 + [2] * 4
    for epoch in range(3):
        sizes = [len(which) for at, which in steps if at == epoch]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(pair for at, which in steps if at == epoch for pair in which.tolist()) == list(range(50))
    assert steps[0][1].tolist() != steps[4][1].tolist()
    assert [order.needed(steps) for steps in (3, 4, 5, 12)] == [{0: 3}, {0: 4}, {0: 4, 1: 1}, {0: 4, 1: 4}]


@needs_data("hh-rlhf")
def test_human_preferences_parse():
    """2,312 dialogues: 4 have an empty answer and 5 part before the last turn, because a turn's marker is misspelt."""
    config = Config(str(HH), held_out_one_in=10)
    train, bad = load_preferences(config, "train")
    test, again = load_preferences(config, "test")
    assert len(train) + len(test) + len(bad) == 2312 and not again
    reasons = [one.reason for one in bad]
    assert reasons.count("the dialogues part before their last assistant turn") == 5
    assert sum("is empty" in reason for reason in reasons) == 4 and len(reasons) == 9
    assert all(one.prompt.startswith("\n\nHuman:") and one.prompt.endswith("\n\nAssistant:") for one in (*train, *test))


@needs_data("hh-rlhf")
def test_a_tokenizer_trained_on_the_data_spells_every_text():
    options = {"path": str(HH), "vocabulary": 512, "limit": 200}
    trained, task = task_tokenizer("preferences", options), load_task("preferences", options, "train", seed=0)
    assert len(trained) == 512 + 3
    for index in range(20):
        example = task.example(index)
        for text in (example.prompt, example.demonstration, "Zoë 你好 \U0001f600"):
            assert trained.decode(trained(text)["input_ids"]) == text
