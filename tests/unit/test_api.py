"""The public Python functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import rlhub
from rlhub import oracle
from rlhub.checkpoints.sealed import write_manifest
from rlhub.checkpoints.tokenizers import decode
from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import SamplerConfig
from rlhub.errors import CheckpointError, DataError, UserError
from rlhub.models.llada import Config, LLaDA
from rlhub.noise import Noise
from rlhub.tasks._vocabulary import word_level
from rlhub.types import Request

WORDS = ["0", "1", "2", "3", "4", "5", "6", "7", ">"]
CANVAS = {"length": 8, "steps": 4, "block_length": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = word_level(WORDS)
    config = Config(
        d_model=16,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=24,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_sequence_length=64,
        init_std=0.3,
    )
    path = tmp_path_factory.mktemp("model")
    save_network(LLaDA(config).initialize(torch.Generator().manual_seed(0)), path, tokenizer)
    return path


@pytest.fixture(scope="module")
def model(folder) -> rlhub.Model:
    return rlhub.load_model(folder)


def test_import_is_light():
    script = "import sys, rlhub; assert 'torch' not in sys.modules and 'generate' in dir(rlhub); rlhub.generate"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        rlhub.genrate  # noqa: B018


def test_logits_are_the_networks(model):
    tokens = torch.tensor([[0, 3, model.mask_id, 8], [5, model.mask_id, model.mask_id, 1]])
    logits = model.logits(tokens)
    expected = torch.stack([oracle.forward(model.network, row) for row in tokens])
    assert logits.shape == (2, 4, len(WORDS) + 4) and not logits.requires_grad
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(tokens.tolist()), logits, atol=0, rtol=0)


def test_load_model_finds_the_newest_checkpoint_of_a_run(model, tmp_path):
    for step, scale in ((1, 1.0), (2, 2.0)):
        network = LLaDA(model.network.config)
        network.load_state_dict({name: scale * value for name, value in model.network.state_dict().items()})
        checkpoint = tmp_path / "checkpoints" / f"step_{step:05d}"
        save_network(network, checkpoint / "hf")
        write_manifest(checkpoint, {"phase": "online", "step": step, "wall_s": 1.0})
    (tmp_path / "checkpoints" / "step_00003" / "hf").mkdir(parents=True)  # killed before it was sealed
    newest = rlhub.load_model(tmp_path)
    name = "model.transformer.wte.weight"
    assert torch.equal(newest.network.state_dict()[name], 2 * model.network.state_dict()[name])
    with pytest.raises(CheckpointError, match="no tokenizer"):
        rlhub.generate(newest, ["1 2"], **CANVAS)
    (rollout,) = rlhub.generate(newest, [[1, 2]], **CANVAS)
    assert len(rollout.completion_ids) == 8
    with pytest.raises(CheckpointError, match="does not exist"):
        rlhub.load_model(tmp_path / "nothing")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_is_the_engine_with_keyed_noise(model, temperature):
    rollouts = rlhub.generate(model, ["1 2 >", "7 >", "1 2 >"], temperature=temperature, seed=5, **CANVAS)
    settings = SamplerConfig(temperature=temperature, **CANVAS)
    for row, (rollout, ids) in enumerate(zip(rollouts, ([1, 2, 8], [7, 8], [1, 2, 8]), strict=True)):
        assert rollout.prompt_ids.tolist() == ids
        expected, _ = oracle.generate(model.network, Request(row, row, np.array(ids, dtype=np.int32)), settings, Noise(5))
        np.testing.assert_array_equal(rollout.completion_ids, expected.completion_ids)
        assert isinstance(decode(model.tokenizer, rollout.completion_ids), str)
    same = (rollouts[0].completion_ids == rollouts[2].completion_ids).all()
    assert same == (temperature == 0), "equal prompts get their own noise"
    other = rlhub.generate(model, ["1 2 >"], temperature=temperature, seed=6, **CANVAS)
    assert (other[0].completion_ids == rollouts[0].completion_ids).all() == (temperature == 0)


def test_prompts_may_be_text_ids_and_chats(model, folder):
    kinds = ["1 2 >", np.array([1, 2, 8]), [1, 2, 8], torch.tensor([1, 2, 8]).numpy()]
    completions = {tuple(rollout.completion_ids.tolist()) for rollout in rlhub.generate(model, kinds, **CANVAS)}
    assert len(completions) == 1
    chatty = rlhub.load_model(folder)
    chatty.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}>{% endif %}"
    mixed = rlhub.generate(chatty, [[1, 2, 8], [{"role": "user", "content": "1 2"}], "3"], **CANVAS)
    assert [rollout.prompt_ids.tolist() for rollout in mixed] == [[1, 2, 8], [1, 2, 8], [3]]
    with pytest.raises(DataError, match="no chat template"):
        rlhub.generate(model, [[{"role": "user", "content": "1 2"}]], **CANVAS)
    assert rlhub.generate(model, [], **CANVAS) == []


def test_progress_goes_to_the_terminal_only_when_asked(model, capsys):
    rlhub.generate(model, ["1"], **CANVAS)
    assert capsys.readouterr().out == ""
    rlhub.generate(model, ["1"], progress=True, **CANVAS)
    assert "generate 4/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "1 2 >"}, "give a list of prompts"),
        ({"prompts": [[1, 99]]}, "token ids 1 to 99, the vocabulary has 0 to 12"),
        ({"prompts": [[0.5]]}, "a prompt is text, chat messages or a row of token ids"),
        ({"prompts": ["1"], "sampler": "low_confidense"}, "did you mean low_confidence?"),
        ({"prompts": ["1"], "block_length": 3}, "8 is not a multiple of block_length 3; use length 6 or 9"),
        ({"prompts": ["1"], "steps": 3}, "3 is not a multiple of the 2 blocks (length / block_length); use 2 or 4"),
        ({"prompts": [[1] * 60]}, "prompt of 60 tokens plus a canvas of 8 exceeds the model's context of 64"),
    ],
)
def test_generate_refuses(model, arguments, message):
    with pytest.raises(ValueError) as error:
        rlhub.generate(model, **(CANVAS | arguments))
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- likelihood


def exact_elbo(model, prompt: list[int], completion: list[int]) -> float:
    def log_prob(masked):
        row = prompt + np.where(masked, model.mask_id, completion).tolist()
        return oracle.forward(model.network, row)[len(prompt) :].log_softmax(-1)[range(len(completion)), completion]

    with torch.no_grad():
        return oracle.elbo_exact(log_prob, len(completion)).item()


def test_exact_likelihood_is_the_enumeration(model):
    exact = rlhub.log_likelihood(model, "1 2 >", "2 1 5 [EOS] 5", views="exact")
    assert exact.value == pytest.approx(exact_elbo(model, [1, 2, 8], [2, 1, 5, model.eos_id, 5]), abs=1e-4)
    assert (exact.standard_error, exact.length, exact.draws.shape) == (0.0, 5, (1,))
    one = rlhub.log_likelihood(model, [4], [7], views="exact").value
    log_probs = model.logits([[4, model.mask_id]])[0, 1].log_softmax(-1)
    assert one == pytest.approx(log_probs[7].item(), abs=1e-5), "a single token has one mask"


@pytest.mark.parametrize("views", ["elbo", "coupled"])
def test_estimates_agree_with_the_exact_value(model, views):
    completion = [2, 1, 5, 0, 5, 7]
    exact = rlhub.log_likelihood(model, "1 2 >", completion, views="exact").value
    estimate = rlhub.log_likelihood(model, "1 2 >", completion, views=views, draws=1500, seed=1)
    assert 0 < estimate.standard_error < 0.5
    assert abs(estimate.value - exact) < 4 * estimate.standard_error
    assert (estimate.length, len(estimate.draws)) == (6, 1500)
    assert estimate.standard_error == pytest.approx(np.std(estimate.draws, ddof=1) / 1500**0.5)
    again = rlhub.log_likelihood(model, "1 2 >", completion, views=views, draws=1500, seed=1)
    assert again.value == estimate.value
    other = rlhub.log_likelihood(model, "1 2 >", completion, views=views, draws=1500, seed=2)
    assert other.value != estimate.value


def test_a_single_draw_has_no_standard_error(model):
    assert np.isnan(rlhub.log_likelihood(model, "1", "2 3", draws=1).standard_error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": "full_mask"}, "views must be one of exact, all_masks, chain, coupled, elbo, got 'full_mask'"),
        ({"views": "elb"}, "did you mean elbo"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"completion": []}, "no tokens"),
        ({"completion": "3 [MASK]"}, "holds the mask token"),
        ({"completion": [1] * 13, "views": "exact"}, "stops at 12 tokens, the completion has 13"),
        ({"completion": [1] * 64}, "1 + 64 prompt and completion tokens, the model's context is 64"),
    ],
)
def test_log_likelihood_refuses(model, arguments, message):
    with pytest.raises(UserError) as error:
        rlhub.log_likelihood(model, **({"prompt": "1", "completion": "2"} | arguments))
    assert message in str(error.value)


def test_train_resolves_the_recipe_and_returns_the_run_folder(tmp_path, monkeypatch):
    seen = []
    fake = ModuleType("rlhub.training.run")
    fake.train = lambda recipe: seen.append(recipe) or Path("runs/x")
    monkeypatch.setitem(sys.modules, "rlhub.training.run", fake)
    (tmp_path / "recipe.yaml").write_text("run: {steps: 7, seed: 3}\n")
    assert rlhub.train(tmp_path / "recipe.yaml", overrides=["run.steps=2"]) == Path("runs/x")
    assert (seen[0].run.steps, seen[0].run.seed) == (2, 3)
