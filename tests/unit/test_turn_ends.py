"""An answer ends at EOS or at the end of the assistant's turn: in both the engine and the oracle, in texts, grades and targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhub.algorithm.health import rollout_metrics
from rlhub.algorithm.pairs import encode
from rlhub.api import demonstrations, load_model
from rlhub.checkpoints.folders import stop_ids_of
from rlhub.checkpoints.tokenizers import answer_end, load_tokenizer
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.errors import CheckpointError
from rlhub.models import dream, illada, llada, llada2, llada_moe, sdar
from rlhub.noise import Noise
from rlhub.oracle.generation import generate
from rlhub.tasks.preferences import Preference
from rlhub.training.grading import grade
from rlhub.training.rollouts import Issued
from rlhub.training.supervised import demonstration_batch
from rlhub.types import Example, Request, RewardResult, Rollout

FAMILIES = {"llada": llada, "illada": illada, "llada_moe": llada_moe, "llada2": llada2, "dream": dream, "sdar": sdar}
WORDS = ["[MASK]", "[EOS]", *"0123456789"]
TURN, MASK, EOS = 12, 0, 1
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <|eot_id|> {% endfor %}{% if add_generation_prompt %}a{% endif %}"


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*WORDS, "<|eot_id|>", "u", "a"])}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", eos_token="[EOS]", pad_token="[EOS]")
    made.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny random model of a family, with a tokenizer whose chats end turns with <|eot_id|>."""
    family = FAMILIES[request.param]
    tiny = {**family.TINY, "vocab_size": 16, "mask_token_id": MASK, "eos_token_id": EOS}
    network = family.build(family.Config.from_published(tiny)).initialize(torch.Generator().manual_seed(1))
    save_network(network, tmp_path / "model", tokenizer())
    return tmp_path / "model"


@pytest.mark.parametrize("eos", ["allow", "last", "never"])
@pytest.mark.parametrize("early_stop", ["fill_eos", "none"])
def test_engine_and_oracle_end_answers_at_the_end_of_a_turn(folder: Path, eos: str, early_stop: str) -> None:
    network = load_network(folder)
    assert set(network.profile.stop_ids) == {EOS, TURN} == set(stop_ids_of(folder))
    settings = SamplerConfig(length=8, steps=8, block_length=4, temperature=1.0, eos=eos, early_stop=early_stop)
    requests = [Request(uid, uid, np.array([2, 3, 4], dtype=np.int32)) for uid in range(24)]
    rollouts = Engine(network).generate(requests, settings, Noise(0))
    turned = 0
    for request, rollout in zip(requests, rollouts, strict=True):
        expected, _ = generate(network, request, settings, Noise(0))
        assert rollout.completion_ids.tolist() == expected.completion_ids.tolist() and rollout.length == expected.length
        ends = [place for place, token in enumerate(rollout.completion_ids.tolist()) if token in (EOS, TURN)]
        assert rollout.length == (ends[0] + 1 if ends else 8)
        turned += TURN in rollout.completion_ids[: rollout.length]
        assert eos != "never" or not ends
    assert eos != "allow" or turned, "some answer must end with its turn for this to compare anything"
    assert rollout_metrics([one.graded(RewardResult(1.0)) for one in rollouts], (EOS, TURN))["eos/missing_rate"] == pytest.approx(
        np.mean([not {EOS, TURN} & set(rollout.completion_ids.tolist()) for rollout in rollouts])
    )


def test_what_follows_the_turn_is_no_part_of_the_answer(folder: Path) -> None:
    model = load_model(str(folder))
    (rollout,) = demonstrations(model, [[{"role": "user", "content": "2"}]], ["4"])
    assert rollout.completion_ids.tolist() == [6, TURN, EOS]
    longer = replace(rollout, completion_ids=np.array([6, TURN, 4, EOS], dtype=np.int32), length=2)
    assert model.decode(longer) == "4"


def test_targets_of_chats_end_with_the_turn_and_those_of_texts_do_not() -> None:
    made = tokenizer()
    chat = [{"role": "user", "content": "2"}]
    assert answer_end(made, chat) == [TURN, EOS] and answer_end(made, "2") == [EOS]
    pairs, bad = encode([Preference(0, 1, chat, ("3 4", "5"), (1.0, 0.0)), Preference(1, 2, "2", ("3 4", "5"), (1.0, 0.0))], made, 100)
    assert not bad
    targets = [[list(map(int, one)) for one in pair] for pair in pairs.responses]
    assert targets == [[[5, 6, TURN, EOS], [7, TURN, EOS]], [[5, 6, EOS], [7, EOS]]]


def test_a_response_that_fills_the_canvas_keeps_as_much_of_its_end_as_fits() -> None:
    chat = [{"role": "user", "content": "2"}]
    pairs, _ = encode([Preference(0, 1, chat, ("3 4", "5"), (1.0, 0.0))], tokenizer(), 100, full=3)
    assert [list(map(int, one)) for one in pairs.responses[0]] == [[5, 6, TURN], [7, TURN, EOS]]


def test_ids_of_turns_are_read_from_either_file_and_only_those_of_the_vocabulary(tmp_path: Path) -> None:
    network = llada.build(llada.Config.from_published({**llada.TINY, "vocab_size": 16, "mask_token_id": MASK, "eos_token_id": EOS}))
    save_network(network.initialize(torch.Generator().manual_seed(1)), tmp_path)
    assert stop_ids_of(tmp_path) == (EOS,)
    tokens = {"99": {"content": "<|im_end|>"}, "13": {"content": "<|role_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    assert stop_ids_of(tmp_path) == (EOS, 13)


def test_a_tokenizer_follows_the_config_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LLaDA's published tokenizer names no mask; here it also names another EOS than the model has."""
    network = llada.build(llada.Config.from_published({**llada.TINY, "vocab_size": 16, "mask_token_id": 13, "eos_token_id": EOS}))
    own = tokenizer()
    save_network(network.initialize(torch.Generator().manual_seed(1)), tmp_path, own)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": None, "eos_token": "5"}))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.mask_token_id, loaded.eos_token_id) == (13, EOS)
    assert [record.getMessage() for record in caplog.records if record.name == "rlhub"] == [
        f"{tmp_path}: the eos token is [EOS] (1) as config.json says; the tokenizer's 5 (7) is not used"
    ]


@pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id"])
def test_an_id_outside_the_vocabulary_is_told_at_load(tmp_path: Path, name: str) -> None:
    network = llada.build(llada.Config.from_published({**llada.TINY, "vocab_size": 16, "mask_token_id": 0, "eos_token_id": 1}))
    save_network(network.initialize(torch.Generator().manual_seed(1)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: 99}))
    with pytest.raises(CheckpointError, match=rf"{name}=99, outside its vocabulary of \d+ tokens"):
        load_network(tmp_path)


def test_null_where_it_is_the_default_and_unused_fields_are_no_obstacle() -> None:
    published = {**llada_moe.TINY, "moe_router_score_function": None, "router_num_group": -2, "router_topk_group": -2}
    assert llada_moe.Config.from_published(published) == llada_moe.Config.from_published(llada_moe.TINY)


CHAT = [{"role": "user", "content": "2"}]


def test_graders_see_the_answer_and_not_what_follows_its_turn() -> None:
    steps, none = np.zeros(4, dtype=np.int16), np.zeros(4, np.float32)
    rollout = Rollout(0, 0, np.array([4]), np.array([6, TURN, 4, EOS], np.int32), 2, steps, none, none, np.zeros(4, np.int32), 1)
    issued = Issued([Request(0, 0, np.array([4], np.int32))], [Example(0, CHAT, {"answer": "4"})])
    graders = SimpleNamespace(grade=lambda pieces: [[RewardResult(float(text == "4")) for _, text, _ in piece] for piece in pieces])
    (graded,), texts = grade(SimpleNamespace(graders=graders), issued, [rollout], tokenizer(), 8)
    assert texts == ["4"] and graded.reward == RewardResult(1.0)


def test_demonstrations_of_a_chat_end_with_its_turn() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "sort.yaml", ["sft.batch_size=2"])
    examples = [Example(0, CHAT, {}, "3 4"), Example(1, "2", {}, "3 4")]
    batch = demonstration_batch(SimpleNamespace(name="mine", example=examples.__getitem__), tokenizer(), recipe, 1)
    assert [one.tolist()[:5] for one in batch.completions] == [[5, 6, TURN, EOS, EOS], [5, 6, EOS, EOS, EOS]]
    assert batch.response_length.tolist() == [4, 3]
