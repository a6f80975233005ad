"""Learned rewards on tiny random checkpoints: values against direct forward passes, batches against single items, and bad input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from rewards import load_grader, process_reward, reward_model
from rewards.reward_model import length_batches
from rlhub.types import RewardResult
from workers.reward import RewardWorker

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "<user>", "<assistant>", "<end>", "<step>"]
WORDS = [f"w{number}" for number in range(40)]
MAX_TOKENS = 64
CHAT = (
    "{{ '<s>' }}{% for message in messages %}{% if message['content'] == 'w39' %}{{ raise_exception('no w39') }}{% endif %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def tokenizer(chat: bool, pad: bool = True) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate([*SPECIAL, *WORDS, "beyond"])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.normalizer = normalizers.Replace("~", "")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not chat:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        )
    special = {"pad_token": "[PAD]"} if pad else {}
    special |= {"bos_token": "<s>"} if chat else {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        additional_special_tokens=["<user>", "<assistant>", "<end>", "<step>"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )
    if chat:
        out.chat_template = CHAT
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`checkpoint("bert" or "llama", head, num_labels)`: the folder of a random model whose scores are far apart."""
    made: dict[tuple, str] = {}

    def make(family: str, head: str = "sequence", labels: int = 1, pad: bool = True) -> str:
        key = (family, head, labels, pad)
        if key in made:
            return made[key]
        shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=MAX_TOKENS)
        shape |= dict(vocab_size=len(SPECIAL) + len(WORDS), num_labels=labels, initializer_range=0.2)  # "beyond" has no embedding
        torch.manual_seed(0)
        if family == "bert":
            build = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification, "none": BertModel}[head]
            model = build(BertConfig(**shape, pad_token_id=0 if pad else None))
        else:
            build = {"sequence": LlamaForSequenceClassification, "token": LlamaForTokenClassification}[head]
            model = build(LlamaConfig(**shape, pad_token_id=0 if pad else None, bos_token_id=4, eos_token_id=7))
        folder = str(tmp_path_factory.mktemp("checkpoint"))
        model.save_pretrained(folder)
        tokenizer(chat=family == "llama", pad=pad).save_pretrained(folder)
        return made.setdefault(key, folder)

    return make


def ids(text: str) -> list[int]:
    return [[*SPECIAL, *WORDS].index(word) for word in text.split()]


def direct(folder: str, tokens: list[int], types: list[int] | None = None, head: str = "sequence") -> torch.Tensor:
    """The logits of one row, by transformers alone."""
    family = {"BertConfig": "Bert", "LlamaConfig": "Llama"}
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    build = getattr(transformers, f"{family[type(config).__name__]}For{head.title()}Classification")
    arguments = {"input_ids": torch.tensor([tokens])} | ({"token_type_ids": torch.tensor([types])} if types else {})
    with torch.no_grad():
        return build.from_pretrained(folder, dtype=torch.float32).eval()(**arguments).logits[0]


def words(generator: np.random.Generator, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS[:39], generator.integers(low, high)))


def items(count: int, separator: str = " ") -> list[tuple[str, str, dict]]:
    generator = np.random.default_rng(0)
    return [(words(generator, 1, 25), separator.join(words(generator, 1, 7) for _ in range(3)), {}) for _ in range(count)]


def values(results: list[RewardResult]) -> list[float]:
    assert {result.status for result in results} == {"ok"}
    return [result.value for result in results]


# ---------------------------------------------------------------------------------------------------------------- values


def test_a_text_pair_without_a_chat_template(checkpoint) -> None:
    folder = checkpoint("bert")
    expected = direct(folder, ids("[CLS] w1 w2 [SEP] w3 [SEP]"), [0, 0, 0, 0, 1, 1]).item()
    config = reward_model.Config(model=folder)
    result = reward_model.grade("w1 w2", "w3", {}, config)
    assert result.value == pytest.approx(expected, abs=1e-6) and (result.status, result.detail) == ("ok", "")
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert reward_model.grade(chat, "w3", {}, config).value == pytest.approx(expected, abs=1e-6)
    squashed = reward_model.grade("w1 w2", "w3", {}, reward_model.Config(model=folder, sigmoid=True)).value
    assert squashed == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-6)


def test_one_text_with_a_separator(checkpoint) -> None:
    folder = checkpoint("bert")
    expected = direct(folder, ids("[CLS] w1 w9 w3 [SEP]")).item()
    result = reward_model.grade("w1", "w3", {}, reward_model.Config(model=folder, separator=" w9 "))
    assert result.value == pytest.approx(expected, abs=1e-6)


def test_the_chat_template_where_there_is_one(checkpoint) -> None:
    folder = checkpoint("llama")
    config = reward_model.Config(model=folder)
    expected = direct(folder, ids("<s> <user> w1 w2 <end> <assistant> w3 <end>")).item()
    assert reward_model.grade("w1 w2", "w3", {}, config).value == pytest.approx(expected, abs=1e-6)
    chat = [{"role": "user", "content": "w1 w2"}]
    assert reward_model.grade(chat, "w3", {}, config).value == pytest.approx(expected, abs=1e-6)
    refused = reward_model.grade("w39", "w3", {}, config)
    assert refused.status == "rejected" and "no w39" in refused.detail


def test_the_probability_of_a_label(checkpoint) -> None:
    folder = checkpoint("bert", labels=3)
    expected = direct(folder, ids("[CLS] w1 [SEP] w3 [SEP]"), [0, 0, 0, 1, 1]).softmax(-1)
    got = [reward_model.grade("w1", "w3", {}, reward_model.Config(model=folder, label=label)).value for label in range(3)]
    assert got == pytest.approx(expected.tolist(), abs=1e-6) and sum(got) == pytest.approx(1, abs=1e-6)


def test_bfloat16_is_near(checkpoint) -> None:
    folder = checkpoint("llama")
    precise, rough = (
        values(reward_model.grade_batch(items(20), reward_model.Config(model=folder, dtype=dtype))) for dtype in ("float32", "bfloat16")
    )
    assert precise != rough and np.corrcoef(precise, rough)[0, 1] > 0.99


# --------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("module", "family", "head", "options", "pad"),
    [
        (reward_model, "bert", "sequence", {}, True),
        (reward_model, "llama", "sequence", {}, True),
        (reward_model, "llama", "sequence", {}, False),
        (process_reward, "bert", "token", {"step_separator": " <step> "}, True),
        (process_reward, "llama", "token", {"step_separator": " <step> "}, True),
        (process_reward, "llama", "sequence", {"step_separator": " <step> ", "head": "sequence"}, True),
    ],
)
def test_values_do_not_depend_on_the_batch(checkpoint, module, family, head, options, pad) -> None:
    config = {"model": checkpoint(family, head, pad=pad), **options}
    given_items = items(40, " <step> ")
    alone = values([module.grade(*item, module.Config(**config)) for item in given_items])
    assert np.std(alone) > 0.1
    order = np.random.default_rng(1).permutation(len(given_items))
    for max_batch_tokens in (1, 100, 100_000):
        together = values(
            module.grade_batch([given_items[index] for index in order], module.Config(**config, max_batch_tokens=max_batch_tokens))
        )
        assert together == pytest.approx([alone[index] for index in order], abs=1e-5)


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = length_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens for batch in batches)


POISON = {
    "empty": ("w1", " \n", "empty"),
    "no tokens": ("w1", "~", "no tokens"),
    "surrogate": ("w1", "w2 \ud800 w3", "lone surrogate at character 3"),
    "surrogate in the prompt": ("\udfff", "w2", "prompt has a lone surrogate"),
    "too long": ("w1 " * 80, "w2", "the limit is 64"),
    "unknown token": ("w1", "beyond", "outside the model's vocabulary of 49"),
}


@pytest.mark.parametrize("name", POISON)
@pytest.mark.parametrize("module", [reward_model, process_reward])
def test_one_poisoned_item_of_200_loses_nothing_of_the_rest(checkpoint, module, name: str) -> None:
    folder = checkpoint("bert", "token" if module is process_reward else "sequence")
    prompt, completion, reason = POISON[name]
    given_items = items(200)
    clean = values(module.grade_batch(given_items, module.Config(model=folder)))
    given_items[77] = (prompt, completion, {})
    results = load_grader({"name": module.__name__.removeprefix("rewards."), "model": folder}).grade_batch(given_items)
    assert results[77].status == "rejected" and reason in results[77].detail and math.isnan(results[77].value)
    del results[77], clean[77]
    assert values(results) == pytest.approx(clean, abs=1e-5)


def test_a_reward_worker_serves_a_model(checkpoint) -> None:
    folder = checkpoint("llama")
    given_items = [*items(50), ("w1", "", {})]
    worker = RewardWorker({"name": "reward_model", "model": folder}, deadline_seconds=0.001)  # a model bounds its own time
    results = worker.grade(given_items)
    assert values(results[:50]) == pytest.approx(
        values(reward_model.grade_batch(given_items[:50], reward_model.Config(model=folder))), abs=1e-5
    )
    assert Counter(result.status for result in results) == {"ok": 50, "rejected": 1}


# ------------------------------------------------------------------------------------------------------------ truncation


def test_truncation_is_asked_for_told_and_keeps_the_completion(checkpoint) -> None:
    folder = checkpoint("bert")
    config = reward_model.Config(model=folder, too_long="truncate_left", max_tokens=8)
    result = reward_model.grade("w1 w2 w3 w4 w5 w6", "w7 w8", {}, config)
    expected = direct(folder, ids("[CLS] w4 w5 w6 [SEP] w7 w8 [SEP]"), [0] * 5 + [1] * 3).item()
    assert result.value == pytest.approx(expected, abs=1e-6) and result.detail == "3 prompt tokens cut"
    whole = reward_model.grade("w1", "w7 w8 w9 w10 w11 w12 w13 w14", {}, config)
    assert whole.status == "rejected" and "completion alone has 8 tokens" in whole.detail
    refused = reward_model.grade("w1 w2 w3 w4 w5 w6", "w7 w8", {}, reward_model.Config(model=folder, max_tokens=8))
    assert refused.status == "rejected" and "11 tokens, the limit is 8" in refused.detail


def test_truncation_moves_the_steps(checkpoint) -> None:
    folder = checkpoint("llama", "token")
    options = dict(model=folder, step_separator=" / ", marker="<step>", reduce="last")
    config = process_reward.Config(**options, too_long="truncate_left", max_tokens=9)
    result = process_reward.grade("w1 w2 w3 w4", "w5 / w6 w7", {}, config)
    expected = direct(folder, ids("<s> w4 <end> <assistant> w5 <step> w6 w7 <step>"), head="token")[[5, 8], 0].tolist()
    assert json.loads(result.detail)["steps"] == pytest.approx(expected, abs=1e-5)
    assert json.loads(result.detail)["prompt_tokens_cut"] == 4


# ---------------------------------------------------------------------------------------------------------- process rewards


@pytest.mark.parametrize(
    ("reduce", "formula"), [("min", min), ("mean", lambda steps: sum(steps) / 3), ("product", math.prod), ("last", lambda steps: steps[2])]
)
def test_scores_of_steps_are_reduced(checkpoint, reduce: str, formula) -> None:
    folder = checkpoint("bert", "token", labels=2)
    config = process_reward.Config(model=folder, label=1, step_separator=" / ", marker="<step>", reduce=reduce)
    result = process_reward.grade("w1", "w2 w3 / w4 /   / w5", {}, config)
    logits = direct(folder, ids("[CLS] w1 [SEP] w2 w3 <step> w4 <step> w5 <step>"), head="token")
    steps = logits.softmax(-1)[[5, 7, 9], 1].tolist()
    assert json.loads(result.detail) == {"steps": pytest.approx(steps, abs=1e-5)}
    assert result.value == pytest.approx(formula(steps), abs=1e-5)


def test_a_sequence_model_scores_the_prefixes(checkpoint) -> None:
    folder = checkpoint("llama")
    config = process_reward.Config(model=folder, head="sequence", sigmoid=True, reduce="mean")
    steps = ["w1 w2", "w3", "w4 w5"]
    result = process_reward.grade("w6", "\n\n".join(steps), {}, config)
    prefixes = [("w6", "\n\n".join(steps[:count]), {}) for count in (1, 2, 3)]
    expected = values(reward_model.grade_batch(prefixes, reward_model.Config(model=folder, sigmoid=True)))
    assert json.loads(result.detail)["steps"] == pytest.approx(expected, abs=1e-5)
    assert result.value == pytest.approx(np.mean(expected), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"too_long": "cut"}, "too_long must be reject or truncate_left, got 'cut'"),
        ({"dtype": "float8"}, "dtype must be"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, message: str) -> None:
    for name in ("reward_model", "process_reward"):
        with pytest.raises(ValueError, match=message):
            load_grader({"name": name, "model": "x", **options})


@pytest.mark.parametrize(
    ("options", "message"), [({"reduce": "max"}, "reduce"), ({"head": "x"}, "head"), ({"reduce": "product"}, "needs probabilities")]
)
def test_bad_options_of_process_rewards(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grader({"name": "process_reward", "model": "x", **options})


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (1, {"label": 0}, "has one label"),
        (3, {}, r"has 3 labels: set label to 0\.\.2"),
        (3, {"label": 3}, "label 3"),
        (3, {"label": 1, "sigmoid": True}, "sigmoid True"),
    ],
)
def test_labels_must_fit_the_checkpoint(checkpoint, labels: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grader({"name": "reward_model", "model": checkpoint("bert", labels=labels), **options}).prepare()


def test_a_checkpoint_without_a_trained_head_is_refused(checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trained reward model: it lacks classifier\.bias, classifier\.weight"):
        load_grader({"name": "reward_model", "model": checkpoint("bert", "none")}).prepare()
    with pytest.raises(ValueError, match="no reward model"):
        load_grader({"name": "process_reward", "model": str(tmp_path)}).prepare()


def test_the_version_follows_the_weights(checkpoint, tmp_path: Path) -> None:
    for file in Path(checkpoint("bert")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    part = {"name": "reward_model", "model": str(tmp_path)}
    before = load_grader(part).version
    assert load_grader(part).version == before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert load_grader(part).version != before
