"""`rlhub sample`: the table and the animation of denoising, prompts from everywhere, settings, and the page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from omegaconf import OmegaConf
from rich.console import Console

import rlhub
from rlhub.checkpoints.sealed import write_manifest
from rlhub.checkpoints.weights import save_network
from rlhub.commands.main import main
from rlhub.config.schema import Recipe
from rlhub.models import llada, sdar
from rlhub.models.llada import Config, LLaDA
from rlhub.records.rollout_log import dump_rollouts, rollout_path
from rlhub.reports import display
from rlhub.reports.display import show_row
from rlhub.tasks._vocabulary import word_level

ROW = {
    "prompt": "say [b]a[/b]",
    "completion": "3 + 4",
    "tokens": ["3", "+", "4\n", "<eos>"],
    "unmask_step": [2, 0, 0, 1],
    "logp": [0.0, np.log(0.25), np.log(0.5), np.log(0.75)],
    "edits": [[1, 2, "9", "4\n"]],
    "sampler": {"block_length": 4},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random model that knows digits, its recipe, and no rollouts."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = word_level([str(digit) for digit in range(10)])
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 24, "max_sequence_length": 32, "init_std": 0.5}
    ids = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = LLaDA(Config(**shape, **ids)).initialize(torch.Generator().manual_seed(0))
    checkpoint = folder / "checkpoints" / "step_00001"
    save_network(network, checkpoint / "hf", tokenizer)
    write_manifest(checkpoint, {"phase": "online", "step": 1, "wall_s": 0.0})
    recipe = OmegaConf.structured(Recipe)
    recipe.sampler.name, recipe.sampler.length, recipe.sampler.steps, recipe.sampler.block_length = "left_to_right", 6, 6, 3
    recipe.sampler.early_stop, recipe.sampler.temperature = "off", 0.0
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(recipe))
    return folder


def sample(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sample", *map(str, arguments)])


def test_without_a_terminal_the_steps_are_a_table() -> None:
    console = Console(file=io.StringIO(), width=20, force_terminal=False)
    show_row(ROW, console)
    assert console.file.getvalue().splitlines() == [
        "say [b]a[/b]",
        "step      block     filled  confidence  canvas",
        "   0        0-3        0/4              _ _ _ _",
        "   1        0-3        2/4      0.2500  _ + 9 _",
        "   2        0-3        3/4      0.5000  _ + 4\\n <eos>  [2: 9 -> 4\\n]",
        "   3        0-3        4/4      1.0000  3 + 4\\n <eos>",
        "completion: 3 + 4",
    ]


def test_a_terminal_plays_every_step_in_the_colour_of_its_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(display, "time", SimpleNamespace(sleep=waits.append))
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="truecolor")
    show_row(ROW, console, delay=0.5)
    text = console.file.getvalue()
    assert waits == [0.5] * 4 and "step 3, 3 of 3" in text and "2: 9 \u2192 4\\n" in text
    # 0.25 lies halfway between the second and the third of seven colours; the active block is underlined.
    assert re.search(r"\x1b\[1;4;38;2;0;0;0;48;2;248;194;123m\+", text)


def test_log_probs_and_forwards_are_those_of_the_chain_rule(run_dir: Path) -> None:
    """Greedy, from left to right, one token a step: log p is the sum over positions of the model's largest log-prob."""
    folder = run_dir / "checkpoints" / "step_00001" / "hf"
    result = sample(folder, "3 1 2")
    assert result.exit_code == 0, result.output
    model = rlhub.load_model(folder)
    tokens, total = [*model.tokenizer("3 1 2")["input_ids"], *[model.mask_id] * 6], 0.0
    for position in range(3, 9):
        logits = model.logits([tokens])[0, position]
        log_probs = logits.log_softmax(-1)
        log_probs[model.mask_id] = -torch.inf
        total += log_probs.max().item()
        tokens[position] = int(log_probs.argmax())
    assert f"log-prob at temperature 1: {total:.4f} nats" in result.output
    assert f"completion: {model.tokenizer.decode(tokens[3:], skip_special_tokens=True)}" in result.output
    length = next((place + 1 for place, token in enumerate(tokens[3:]) if token == model.eos_id), 6)
    assert f"6 forwards for {length} tokens" in result.output and "6 of 6 positions filled" in result.output
    assert "sampler: left_to_right, length 6, steps 6, block_length 3, temperature 0, early_stop off" in result.output
    assert "exact" in result.output or "multiply" in result.output


def test_what_log_probs_mean_depends_on_the_settings(run_dir: Path) -> None:
    exact, unknown = "they multiply to the probability of this rollout", "they do not multiply to the rollout's probability"
    assert exact in sample(run_dir, "3 1", "sampler.name=entropy").output
    assert unknown in sample(run_dir, "3 1", "sampler.name=entropy", "sampler.options.alg_temp=0.5").output
    assert unknown in sample(run_dir, "3 1", "sampler.eos=last").output


def test_another_sampler_drops_the_options_of_the_runs_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("sampler: {name: maskgit, length: 6, options: {curve: linear}}")
    kept = display.sample_config(tmp_path, tmp_path, ["sampler.options.choice_temperature=1"]).sampler
    assert (kept.length, kept.options) == (6, {"curve": "linear", "choice_temperature": 1})
    other = display.sample_config(tmp_path, tmp_path, ["sampler.name=threshold", "sampler.options.threshold=0.5"]).sampler
    assert (other.length, other.options) == (6, {"threshold": 0.5})
    assert display.sample_config(tmp_path, tmp_path, ["sampler.name=threshold"]).sampler.options == {}


def test_a_model_without_a_run_gets_the_defaults_of_generate_in_its_own_blocks(tmp_path: Path) -> None:
    for family in (llada, sdar):
        network = family.build(family.Config(**family.TINY)).initialize(torch.Generator().manual_seed(0))
        save_network(network, tmp_path / family.__name__.rpartition(".")[2])
    blocks = {name: display.sample_config(None, tmp_path / name, ["sampler.steps=32"]).sampler for name in ("sdar", "llada")}
    assert blocks["sdar"].block_length == 4 and blocks["llada"].block_length == 32
    assert all((settings.length, settings.steps, settings.temperature) == (128, 32, 0.0) for settings in blocks.values())


def test_several_prompts_from_arguments_and_files_get_a_page(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("4 4\n\n5 5 5\n")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "6"}\n')
    result = sample(run_dir, "1 2", "7", "--file", tmp_path / "texts.txt", "--html", tmp_path / "t.html", "sampler.name=random", "seed=3")
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if re.fullmatch(r"[\d ]+", line)] == ["1 2", "7", "4 4", "5 5 5"]
    html = (tmp_path / "t.html").read_text()
    assert "tiny: 4 completions" in html and html.count('"prompt": "') == 4 and '"entropy"' in html
    assert sample(run_dir, "--file", tmp_path / "chats.jsonl").output.startswith("6\n")
    again = sample(run_dir, "1 2", "sampler.name=random", "seed=3").output
    assert again.split("sampler:")[0] == result.output.split("sampler:")[0], "the same seed gives the same completion"


def test_without_a_prompt_the_newest_logged_one_is_taken(run_dir: Path) -> None:
    assert "rlhub sample PATH" in sample(run_dir).stderr
    from tests.unit.test_timeline import rollout

    for step in (10, 20):
        dump_rollouts(rollout_path(run_dir, step), step, [rollout()], [(f"{step // 10} 3", "")], [list("abcdef")])
    assert sample(run_dir).output.startswith("2 3\n")


BAD = [
    (["sampler.lenght=3"], "lenght"),
    (["sampler.length=many"], "length"),
    (["speed=2"], "speed"),
    (["1 2", "sampler.length=7"], "7 is not a multiple of block"),
    (["1 2", "sampler.name=thresold"], "sampler.name: samplers has no 'thresold'; did you mean threshold?"),
    (["1 2", "sampler.name=threshold", "sampler.options.treshold=1"], "sampler.options.treshold: unknown key of threshold"),
    (["1 2", "sampler.name=origin", "sampler.options.eps=2"], "sampler.options.eps: eps must be in [0, 1), got 2"),
    (["1 2", "sampler.name=entropy", "sampler.options.eps=-1"], "sampler.options.eps: eps must be in [0, 1), got -1"),
    (["--file", "nowhere.txt"], "nowhere.txt"),
    (["--file", "empty.txt"], "holds no prompts"),
    (["--file", "bad.jsonl"], 'line 1: expected a JSON object with a prompt, such as {"prompt": "..."}'),
    (["--file", "number.jsonl"], "line 1: a prompt is text or chat messages, got 3"),
]


@pytest.mark.parametrize(("arguments", "wanted"), BAD, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_bad_input_ends_in_one_line(
    run_dir: Path, arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.txt", "\n"), ("bad.jsonl", "{}\n"), ("number.jsonl", '{"prompt": 3}\n')):
        Path(name).write_text(text)
    result = sample(run_dir, *arguments)
    assert result.exit_code == 2 and wanted in result.stderr and result.stderr.count("\n") == 1
