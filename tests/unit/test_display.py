"""The animation of denoising, and the command behind `rlhub sample` with a fake model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from rlhub import display
from rlhub.config import Recipe
from rlhub.display import Cell, animate, denoising_frames, sample_config, show_rollout, show_sample
from rlhub.errors import RecipeError, UserError
from rlhub.rollout_log import dump_rollouts, rollout_path
from rlhub.types import NEVER, Rollout

WORDS = ["3", "+", "4", "<eos>", "<mask>"]


class FakeTokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(WORDS[token] for token in ids if not skip_special_tokens or token < 3)


def rollout(steps: tuple[int, ...] = (2, 0, 0, 1)) -> Rollout:
    ids = np.array([4 if step == NEVER else index for index, step in enumerate(steps)], dtype=np.int32)
    logp = np.zeros(len(ids), np.float32)
    version = np.zeros(len(ids), np.int32)
    return Rollout(1, 0, np.arange(2, dtype=np.int32), ids, len(ids), np.array(steps, np.int16), logp, logp, version, num_forwards=3)


def test_frames_fill_the_canvas_step_by_step() -> None:
    frames = denoising_frames(WORDS[:4], [2, 0, 0, 1])
    assert [[cell.text for cell in frame] for frame in frames] == [
        ["_", "_", "_", "_"],
        ["_", "+", "4", "_"],
        ["_", "+", "4", "<eos>"],
        ["3", "+", "4", "<eos>"],
    ]
    assert [cell.state for cell in frames[2]] == ["masked", "filled", "filled", "new"]


def test_a_position_that_was_never_filled_stays_masked() -> None:
    frames = denoising_frames(["a", "b"], [NEVER, 0], mask="#")
    assert len(frames) == 2 and frames[-1] == [Cell("#", "masked"), Cell("b", "new")]


def test_empty_canvas_has_one_empty_frame() -> None:
    assert denoising_frames([], []) == [[]]


def test_without_a_terminal_each_step_is_a_line() -> None:
    console = Console(file=io.StringIO(), width=20, force_terminal=False)
    animate(denoising_frames(["a\n", "[b]"], [0, 1]), console, title="say [a]")
    assert console.file.getvalue() == "say [a]\nstep   0: _ _\nstep   1: a\\n _\nstep   2: a\\n [b]\n"


def test_terminal_plays_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(display, "time", SimpleNamespace(sleep=waits.append))
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    animate(denoising_frames(WORDS[:4], [2, 0, 0, 1]), console, delay=0.5)
    text = console.file.getvalue()
    assert waits == [0.5] * 4 and "step 3" in text and "\x1b[1;30;42m+" in text


def test_rollout_is_shown_with_its_text() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    show_rollout(rollout(), FakeTokenizer(), "Target: 7", console)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "Target: 7" and lines[4] == "step   3: 3 + 4 <eos>"
    assert lines[5:] == ["completion: 3+4", "3 denoising steps, 3 forwards, 4 tokens"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    recipe = OmegaConf.structured(Recipe)
    recipe.sampler.length, recipe.sampler.name = 4, "random"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(recipe))
    (tmp_path / "checkpoints" / "step_00010" / "hf").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Puts a fake model behind `rlhub.load_model` and `rlhub.generate`; collects what they were asked."""
    seen: dict = {}

    def load_model(path: Path) -> SimpleNamespace:
        seen["model"] = path
        return SimpleNamespace(tokenizer=FakeTokenizer())

    def generate(model: object, prompts: list[str], **options: object) -> list[Rollout]:
        seen.update(options, prompts=prompts)
        return [rollout()]

    package, checkpoint = ModuleType("rlhub"), ModuleType("rlhub.checkpoint")
    package.__path__ = list(sys.modules["rlhub"].__path__)
    package.load_model, package.generate = load_model, generate
    checkpoint.resolve_model_path = lambda path: path / "hf"
    monkeypatch.setitem(sys.modules, "rlhub", package)
    monkeypatch.setitem(sys.modules, "rlhub.checkpoint", checkpoint)
    return seen


def test_sample_uses_the_sampler_of_the_run(run_dir: Path, asked: dict, capsys: pytest.CaptureFixture) -> None:
    checkpoint = run_dir / "checkpoints" / "step_00010"
    show_sample(checkpoint, "Target: 7", ["sampler.temperature=0", "seed=5"])
    assert asked == {
        "model": checkpoint / "hf",
        "prompts": ["Target: 7"],
        "sampler": "random",
        "length": 4,
        "steps": 8,
        "block_length": 8,
        "temperature": 0.0,
        "seed": 5,
    }
    assert "completion: 3+4" in capsys.readouterr().out


def test_sample_takes_its_prompt_from_the_newest_dump(run_dir: Path, asked: dict) -> None:
    with pytest.raises(UserError, match="rlhub sample PATH"):
        show_sample(run_dir)
    for step in (10, 20):
        dump_rollouts(rollout_path(run_dir, step), step, [rollout()], [(f"prompt of {step}", "3+4")], [WORDS[:4]])
    show_sample(run_dir)
    assert asked["prompts"] == ["prompt of 20"]


@pytest.mark.parametrize("override", ["sampler.lenght=3", "sampler.length=many", "speed=2"])
def test_bad_overrides_are_refused(run_dir: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=override.split("=")[0].rpartition(".")[2]) as caught:
        sample_config(run_dir, [override])
    assert "\n" not in str(caught.value)


def test_defaults_without_a_run() -> None:
    assert sample_config(None, []).sampler.length == 8
