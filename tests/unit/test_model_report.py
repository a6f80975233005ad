"""`rlhub model inspect`: sizes against independent counts, from config.json alone and with weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from data_files import DATA, needs_data

from rlhub.checkpoints.adapters import write_fresh_adapter
from rlhub.checkpoints.tokenizers import encode_prompts, load_tokenizer
from rlhub.checkpoints.weights import save_network
from rlhub.commands.main import main
from rlhub.errors import CheckpointError
from rlhub.models.llada import Config, build
from rlhub.planning.model_report import inspect_model
from rlhub.tasks._vocabulary import word_level

WIDTH, LAYERS, HIDDEN, VOCABULARY = 16, 3, 24, 12


@pytest.fixture
def folder(tmp_path) -> Path:
    config = Config(d_model=WIDTH, n_layers=LAYERS, n_heads=4, mlp_hidden_size=HIDDEN, vocab_size=VOCABULARY)
    network = build(config).initialize(torch.Generator().manual_seed(0))
    save_network(network, tmp_path / "model", word_level([str(digit) for digit in range(8)]), max_shard_bytes=8000)
    return tmp_path / "model"


def test_sizes_are_those_of_a_count_by_hand(folder):
    report = inspect_model(folder, learners=4)
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN + 2 * WIDTH
    parameters = LAYERS * layer + 2 * VOCABULARY * WIDTH + WIDTH
    assert (report.family, report.parameters, report.active_parameters) == ("llada", parameters, parameters)
    assert (report.weights, report.dtype, report.weight_bytes, report.problems) == ("present", "float32", 4 * parameters, [])
    assert report.shards == len(list(folder.glob("*.safetensors"))) > 1
    assert report.tokenizer and not report.chat_template
    held = {(stage, count): memory for stage, count, memory in report.train}
    assert {key: (one.weights, one.gradients, one.optimizer) for key, one in held.items()} == {
        (0, 1): (4 * parameters, 4 * parameters, 8 * parameters),
        (1, 4): (4 * parameters, 4 * parameters, 2 * parameters),
        (2, 4): (4 * parameters, parameters, 2 * parameters),
        (3, 4): (parameters, parameters, 2 * parameters),
    }
    assert report.serve.weights == 4 * parameters and report.serve.gradients == report.serve.optimizer == 0


def test_adapters_take_gradients_and_moments_for_themselves_alone(folder, tmp_path):
    rank = 2
    size = LAYERS * rank * (4 * 2 * WIDTH + 3 * (WIDTH + HIDDEN))
    write_fresh_adapter(folder, tmp_path / "adapter", rank, 4.0, "auto", torch.Generator(), load_tokenizer(str(folder)))
    for report in (inspect_model(folder, rank=rank), inspect_model(tmp_path / "adapter")):
        (_, _, alone), *_ = report.train
        assert (report.adapter_rank, report.adapter_parameters, report.problems) == (rank, size, [])
        assert (alone.weights, alone.gradients, alone.optimizer) == (4 * (report.parameters + size), 4 * size, 8 * size)


def test_config_alone_is_enough_and_what_is_missing_is_said(folder, tmp_path):
    whole = inspect_model(folder)
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    report = inspect_model(tmp_path / "bare")
    assert (report.parameters, report.weights, report.serve, report.train) == (whole.parameters, "absent", whole.serve, whole.train)
    assert len(report.problems) == 2 and "no weights" in report.problems[0] and "no tokenizer" in report.problems[1]
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_model(tmp_path / "nothing")


def test_the_command_prints_tables_or_json_and_ends_with_1_on_problems(folder):
    result = CliRunner().invoke(main, ["model", "inspect", str(folder), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["parameters"] == inspect_model(folder).parameters
    (folder / "tokenizer.json").unlink()
    result = CliRunner().invoke(main, ["model", "inspect", str(folder)])
    assert result.exit_code == 1 and "LLaDAModelLM" in result.stdout and "no tokenizer" in result.stdout
    assert "Examples:" in CliRunner().invoke(main, ["model", "inspect", "--help"]).stdout


# Parameters of all and of those that a token uses, as the models' pages have them, in billions.
PUBLISHED = {
    "LLaDA-8B-Instruct": (8.02, 8.02),
    "Dream-v0-Instruct-7B": (7.62, 7.62),
    "LLaDA2.0-mini": (16.3, 1.43),
    "SDAR-4B-Chat": (4.41, 4.41),
}


@needs_data("checkpoints")
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models(model):
    report = inspect_model(DATA / "checkpoints" / model)
    billions = [count / 1e9 for count in (report.parameters, report.active_parameters)]
    assert billions == pytest.approx(PUBLISHED[model], rel=0.005)
    index = json.loads((DATA / "checkpoints" / model / "model.safetensors.index.json").read_text())
    assert report.weight_bytes == pytest.approx(index["metadata"]["total_size"], rel=1e-5) and report.dtype == "bfloat16"
    assert report.shards == len(set(index["weight_map"].values())) and report.weights == "index only" and report.chat_template
    assert [problem for problem in report.problems if "tokenizer" not in problem] == []


@needs_data("checkpoints", "tokenizers")
@pytest.mark.parametrize("model", ["SDAR-4B-Chat", "Dream-v0-Instruct-7B"])
def test_a_published_tokenizer_and_its_chat_template_come_back_unchanged(model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DATA / "checkpoints" / model, source)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DATA / "tokenizers" / "qwen2" / name, source)
    tokenizer = load_tokenizer(str(source))
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = build(Config(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16, vocab_size=len(tokenizer), **ids))
    save_network(network, tmp_path / "out", tokenizer)
    again = load_tokenizer(str(tmp_path / "out"))
    texts = ["Wie geht's?  12,5 % of 3*x\n\tdef f(x):", "数独 4x4 <|im_start|>user<|im_end|>", tokenizer.mask_token or "<|mask|>"]
    assert [ids.tolist() for ids in encode_prompts(again, texts)] == [ids.tolist() for ids in encode_prompts(tokenizer, texts)]
    assert again.chat_template == tokenizer.chat_template is not None
    assert len(again) == len(tokenizer) and again.all_special_tokens == tokenizer.all_special_tokens
    added = json.loads((source / "added_tokens.json").read_text())
    assert [again.convert_tokens_to_ids(name) for name in added] == [tokenizer.convert_tokens_to_ids(name) for name in added]
    mask = json.loads((DATA / "checkpoints" / model / "config.json").read_text())["mask_token_id"]
    assert (
        again.convert_ids_to_tokens(mask) == tokenizer.convert_ids_to_tokens(mask) and again.decode([mask]).lower().strip("<|>") == "mask"
    )
    chat = [{"role": "user", "content": "Sort 3 1 2."}]
    (ids,), (wanted,) = (encode_prompts(one, [chat]) for one in (again, tokenizer))
    assert ids.tolist() == wanted.tolist() and "Sort 3 1 2." in again.decode(ids)
