"""Multiple choice by likelihood: estimates against enumeration, guidance, a planted model, evaluations that are stopped and continued."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rlhub
from rlhub.checkpoints.weights import save_network
from rlhub.commands.main import main
from rlhub.errors import DataError, UserError
from rlhub.evals import likelihood as likelihood_eval
from rlhub.evals.likelihood import Config, Item, evaluate_choices, normalized, parse_choices, read_items, score_items, summarize
from rlhub.models import sdar
from rlhub.models.llada import Config as LLaDAConfig
from rlhub.models.llada import LLaDA
from rlhub.networks.layout import pack_layout
from rlhub.networks.profile import Profile
from rlhub.tasks._vocabulary import word_level
from rlhub.types import Example

WORDS = [str(digit) for digit in range(10)] + ["?"]
EXAMPLES = Path(__file__).parents[2] / "recipes" / "data" / "sort_choices.jsonl"
PROMPT, ANSWER = [3, 7, 2], [5, 1, 8, 4]


def build(vocab: int, mask_id: int, eos_id: int) -> LLaDA:
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=48,
        vocab_size=vocab,
        init_std=0.4,
        mask_token_id=mask_id,
        eos_token_id=eos_id,
        max_sequence_length=64,
    )
    return LLaDA(config).initialize(torch.Generator().manual_seed(3)).eval()


@pytest.fixture(scope="module")
def network() -> LLaDA:
    return build(24, 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = word_level(WORDS)
    path = tmp_path_factory.mktemp("model")
    save_network(build(len(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id), path, tokenizer)
    return path


def item_of(*choices, prompt=PROMPT, answer=0, index=0) -> Item:
    arrays = tuple(np.array(choice, dtype=np.int32) for choice in choices)
    return Item(index, np.array(prompt, dtype=np.int32), arrays, tuple(3 * len(choice) for choice in choices), answer)


@torch.no_grad()
def law(network, prompt, state, guidance: float = 0.0) -> torch.Tensor:
    """Log-probs [L, V] of the answer's positions, guided as in SMDM's Eq. 7: p(x | c)^(1 + w) / p(x | masks)^w, normalised."""

    def logits(row):
        return network.head(network.denoise(torch.tensor(row), pack_layout([len(row)])), torch.arange(len(row)))[len(prompt) :]

    given = logits([*prompt, *state]).log_softmax(-1)
    free = logits([network.mask_id] * len(prompt) + list(state)).log_softmax(-1)
    return ((1 + guidance) * given - guidance * free).log_softmax(-1)


def exact_elbo(network, prompt, answer, guidance: float = 0.0) -> float:
    """The mean over counts l and sets of that size of (L / l) times the log-probs of the set."""
    length, total = len(answer), 0.0
    for count in range(1, length + 1):
        sets = list(itertools.combinations(range(length), count))
        for hidden in sets:
            state = [network.mask_id if place in hidden else token for place, token in enumerate(answer)]
            log_probs = law(network, prompt, state, guidance)
            total += sum(log_probs[place, answer[place]].item() for place in hidden) / len(sets) / count
    return total


def chain_rule(network, prompt, answer, guidance: float = 0.0) -> float:
    states = [answer[:place] + [network.mask_id] * (len(answer) - place) for place in range(len(answer))]
    return sum(law(network, prompt, state, guidance)[place, answer[place]].item() for place, state in enumerate(states))


class Crowd(torch.nn.Module):
    """Knows a token the better the more of the row is visible, and a little by which tokens these are."""

    mask_id, eos_id, vocab_size, max_length = 0, 1, 24, 64
    profile = Profile(mask_id=0, eos_id=1, stop_ids=(1,), pad_id=1, lora_targets="")

    def denoise(self, tokens, layout, targets=None):
        rows = []
        for first, last in itertools.pairwise(layout.row_offsets.tolist()):
            row = tokens[first:last]
            slope = 4 * (row == 0).double().mean() + 0.003 * row.sum()
            rows.append((-slope * torch.arange(24) / 24).expand(len(row), 24))
        return torch.cat(rows) if targets is None else torch.cat(rows)[targets]

    def head(self, hidden, target_rows=None):
        return hidden if target_rows is None else hidden[target_rows]


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("guidance", [0.0, 0.8])
def test_short_choices_are_exact_and_the_chain_rule_is_the_chain_rule(network, guidance):
    items = [item_of(ANSWER, [5, 2], [9]), item_of([4, 4], [6, 6, 6], prompt=[2, 2, 9, 9, 9], index=1)]
    for method, reference in (("monte_carlo", exact_elbo), ("chain", chain_rule)):
        scores = score_items(network, items, Config(path="x", method=method, guidance=guidance))
        for item, row in zip(items, scores, strict=True):
            for choice, score in zip(item.choices, row, strict=True):
                assert score.value == pytest.approx(reference(network, item.prompt.tolist(), choice.tolist(), guidance), abs=1e-4)
                rows = len(choice) if method == "chain" else 2 ** len(choice) - 1
                assert score.standard_error == 0 and score.num_forwards == rows * (2 if guidance else 1)


def test_estimates_agree_with_enumeration_and_strata_lower_their_variance(network):
    """Means over 200 seeds of 4 draws; independent draws are those of the public function."""
    item = item_of([5, 1, 8, 4, 4, 9, 2, 6])
    answer = item.choices[0].tolist()
    for net, factor in ((network, 1.1), (Crowd(), 0.5)):  # of random weights the masks decide, of models that read context the level
        expected = exact_elbo(net, PROMPT, answer)
        strata = [score_items(net, [item], Config(path="x", draws=4, seed=seed))[0][0].value for seed in range(200)]
        model = rlhub.Model(net, Path("."))
        independent = [rlhub.log_likelihood(model, PROMPT, answer, draws=4, seed=seed).value for seed in range(200)]
        for values in (strata, independent):
            assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(200)
        assert np.var(strata) < factor * np.var(independent), (np.var(strata), np.var(independent))


def test_equal_lengths_share_their_masks(network):
    """A choice beside its copy differs by nothing; and the difference of two similar choices varies less than with noise of their own."""
    answer, other = [5, 1, 8, 4, 4, 9, 2, 6], [5, 1, 8, 4, 4, 9, 2, 7]
    shared, separate = [], []
    for seed in range(150):
        config = Config(path="x", draws=4, seed=seed)
        (first, copy, second), (alone,) = score_items(network, [item_of(answer, answer, other), item_of(other, index=1)], config)
        assert first.value == copy.value
        shared.append(first.value - second.value)
        separate.append(first.value - alone.value)
    assert np.var(shared) < 0.7 * np.var(separate), (np.var(shared), np.var(separate))


def test_an_item_does_not_depend_on_the_others_or_on_the_token_budget(network):
    items = [item_of([5 + index, 1, 8, 4, 4, 9, 2, 6], [2, 2, 3], index=index) for index in range(3)]
    config = Config(path="x", draws=8)
    together = score_items(network, items, config)
    for item, row in zip(items, together, strict=True):
        (alone,) = score_items(network, [item], replace(config, max_tokens=20))
        assert [score.value for score in alone] == pytest.approx([score.value for score in row], abs=1e-4)


def test_block_causal_models_are_scored_block_by_block():
    config = sdar.Config.from_published({**sdar.TINY, "mask_token_id": 1, "eos_token_id": 0})
    network = sdar.build(config).initialize(torch.Generator().manual_seed(0)).eval()
    answer = [4, 8, 2, 6, 12]  # one token in the prompt's block, then four
    ((score,),) = score_items(network, [item_of(answer)], Config(path="x"))
    expected = exact_elbo(network, PROMPT, answer[:1]) + exact_elbo(network, PROMPT + answer[:1], answer[1:])
    assert score.value == pytest.approx(expected, abs=1e-4) and score.num_forwards == 15


@pytest.mark.parametrize("guidance", [0.0, 1.1])
def test_the_public_function_takes_guidance_and_the_chain_rule(network, guidance):
    model = rlhub.Model(network, Path("."))
    value = rlhub.log_likelihood(model, PROMPT, ANSWER, views="exact", guidance=guidance).value
    assert value == pytest.approx(exact_elbo(network, PROMPT, ANSWER, guidance), abs=1e-4)
    chain = rlhub.log_likelihood(model, PROMPT, ANSWER, views="chain", guidance=guidance)
    assert chain.value == pytest.approx(chain_rule(network, PROMPT, ANSWER, guidance), abs=1e-4) and chain.standard_error == 0
    with pytest.raises(UserError, match="guidance must be 0 or more"):
        rlhub.log_likelihood(model, PROMPT, ANSWER, guidance=-1.0)


class Sorter(torch.nn.Module):
    """Knows one thing: the token at place i of the answer is the i-th smallest of the prompt, with probability 0.9."""

    mask_id, eos_id, vocab_size, max_length = 11, 12, 15, 64
    profile = Profile(mask_id=11, eos_id=12, stop_ids=(12,), pad_id=12, lora_targets="")

    def denoise(self, tokens, layout, targets=None):
        rows = []
        for first, last in itertools.pairwise(layout.row_offsets.tolist()):
            row = tokens[first:last].tolist()
            best = [*[0] * 8, *sorted(row[:8])]
            law = torch.full((len(row), 15), 0.1 / 14)
            law[torch.arange(len(row)), torch.tensor(best[: len(row)])] = 0.9
            rows.append(law.log())
        return torch.cat(rows) if targets is None else torch.cat(rows)[targets]

    def head(self, hidden):
        return hidden


@pytest.mark.parametrize("method", ["monte_carlo", "chain"])
def test_a_model_that_knows_the_answer_is_right_and_chance_is_not(method):
    config = Config(path=str(EXAMPLES), draws=8, method=method)
    items = read_items(config, word_level([*WORDS[:10], "a"]), 64)
    assert len(items) == 100 and {len(item.choices) for item in items} == {4}
    scores = score_items(Sorter(), items, config)
    results = [likelihood_eval._result(item, row) for item, row in zip(items, scores, strict=True)]
    summary = summarize(results, config)
    assert summary["likelihood/accuracy"] == 1.0 and summary["likelihood/chance"] == 0.25
    wrong = [{**row, "answer": (row["answer"] + 1) % 4} for row in results]
    assert summarize(wrong, config)["likelihood/accuracy"] == 0.0


def test_normalisations_by_hand():
    row = {"scores": [-6.0, -8.0, -9.0], "num_tokens": [1, 2, 3], "num_bytes": [4, 10, 3], "num_forwards": 5}
    results = [{**row, "answer": answer} for answer in (2, 2, 1, 2, 1, 0, 2)]
    summary = summarize(results, Config(path="x", normalize="byte"))
    assert summary["likelihood/accuracy_sum"] == 1 / 7, "-6 is the largest"
    assert summary["likelihood/accuracy_token"] == 4 / 7, "-9 / 3 is"
    assert summary["likelihood/accuracy_byte"] == summary["likelihood/accuracy"] == 2 / 7, "-8 / 10 is"
    for name, values in {"sum": [-6, -8, -9], "token": [-6, -4, -3], "byte": [-1.5, -0.8, -3]}.items():
        assert normalized(row, name).tolist() == values
        assert summarize(results, Config(path="x", normalize=name))["likelihood/accuracy"] == summary[f"likelihood/accuracy_{name}"]
    assert normalized(row | {"num_bytes": [0, 10, 3]}, "byte")[0] == -6, "a choice of no text counts as one byte"
    assert summary["likelihood/standard_error"] == pytest.approx(math.sqrt(2 / 7 * 5 / 7 / 6))
    assert summary["likelihood/num_forwards"] == 35


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("choices", "answer", "place"),
    [
        (["red", "blue"], 1, 1),
        (["red", "blue"], "blue", 1),
        (["red", "blue"], "B", 1),
        (["red", "blue"], "0", 0),
        (["1", "0"], "0", 1),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "A", 0),
    ],
)
def test_answers_by_text_name_letter_or_number(choices, answer, place):
    texts, found = parse_choices(Example(0, "?", {"choices": choices, "answer": answer}), Config(path="x"))
    assert (texts, found) == (choices["text"] if isinstance(choices, dict) else choices, place)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1 ?", "choices": ["1"], "answer": 0}, "row 1: the choices must be a list of at least two texts"),
        ({"prompt": "1 ?", "choices": ["1", "2"], "answer": "C"}, "the answer 'C' is none of the 2 choices"),
        ({"prompt": "1 ?", "choices": ["1", "2"], "answer": 2}, "the answer '2' is none of the 2 choices"),
        ({"prompt": "1 ?", "choices": ["1", "2"]}, "row 1: no field 'answer'; the row has: prompt, choices"),
        ({"prompt": "1 ?", "choices": ["1", "[MASK]"], "answer": 0}, "has the mask token in it"),
        ({"prompt": "1 ?", "choices": ["1", "2 " * 70], "answer": 0}, "the model's context is 64"),
    ],
)
def test_bad_rows_are_told(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_items(Config(path=str(tmp_path / "rows.jsonl")), word_level(WORDS), 64)


# -------------------------------------------------------------------------------------------------------------- runs


class Stop(Exception):
    pass


class StopAfter:
    """A progress that is stopped after some updates."""

    def __init__(self, updates: int) -> None:
        self.left, self.seen = updates, []

    def phase(self, name, total, done):
        self.seen.append((total, done))

    def update(self, step):
        self.left -= 1
        if self.left == 0:
            raise Stop


def test_a_stopped_evaluation_continues(folder, tmp_path):
    config = Config(path=str(EXAMPLES), limit=6, draws=4, max_tokens=100)
    whole = evaluate_choices(folder, config, tmp_path / "whole.jsonl")
    out = tmp_path / "stopped.jsonl"
    with pytest.raises(Stop):
        evaluate_choices(folder, config, out, StopAfter(3))
    assert len(out.read_text().splitlines()) == 4
    with out.open("a") as handle:
        handle.write('{"item": 3, "scor')  # as a kill leaves it
    progress = StopAfter(99)
    continued = evaluate_choices(folder, config, out, progress)
    assert progress.seen == [(6, 3)] and out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert {**continued, "results": ""} == {**whole, "results": ""} and continued["likelihood/num_items"] == 6
    assert evaluate_choices(folder, replace(config, limit=4), out)["likelihood/num_items"] == 4, "other limits share the file"
    before = out.read_text()
    with pytest.raises(UserError, match=r"draws=4, now it is 8.*nothing was overwritten"):
        evaluate_choices(folder, replace(config, draws=8), out)
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(UserError, match="no file of likelihood results"):
        evaluate_choices(folder, config, tmp_path / "notes.txt")
    assert out.read_text() == before and (tmp_path / "notes.txt").read_text() == "mine\n"


def test_changed_data_is_not_mixed(folder, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "1 ?", "choices": ["1", "2"], "answer": 0}, {"prompt": "2 ?", "choices": ["1", "2"], "answer": 1}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate_choices(folder, Config(path=str(data)), out)
    rows[1]["prompt"] = "3 ?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="item 1 with other tokens"):
        evaluate_choices(folder, Config(path=str(data)), out)


def test_the_command(folder, tmp_path):
    arguments = ["eval", str(folder), "--likelihood", str(EXAMPLES), "limit=3", "draws=2", "--out", str(tmp_path / "out.jsonl"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["likelihood/num_items"] == 3 and "likelihood 3/3" in result.stderr
    wrong = CliRunner().invoke(main, [*arguments, "drwas=3"])
    assert wrong.exit_code == 2 and "did you mean draws" in wrong.stderr and wrong.stderr.count("\n") == 1
    missing = CliRunner().invoke(main, ["eval", str(folder), "--likelihood", "nowhere.jsonl"])
    assert missing.exit_code == 2 and "not found: nowhere.jsonl" in missing.stderr
