"""Denoising in the terminal: masked cells fill up step by step, the new ones highlighted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rlhub.config import SamplerConfig
from rlhub.errors import UserError
from rlhub.parts import assign, flatten
from rlhub.rollout_log import read_rollouts, rollout_files, token_strings
from rlhub.types import NEVER, Rollout

State = Literal["masked", "new", "filled"]
STYLES: dict[State, str] = {"masked": "dim", "new": "bold black on green", "filled": ""}
VISIBLE = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})


class Cell(NamedTuple):
    """One position of the canvas in one frame."""

    text: str
    state: State


def denoising_frames(tokens: Sequence[str], unmask_step: Sequence[int], mask: str = "_") -> list[list[Cell]]:
    """The canvas before the first step and after each step; a position that was never filled stays masked.

    >>> [" ".join(cell.text for cell in frame) for frame in denoising_frames(["3", "+", "4"], [1, 0, 0])]
    ['_ _ _', '_ + 4', '3 + 4']
    """

    def cell(token: str, filled_at: int, step: int) -> Cell:
        if filled_at == NEVER or filled_at > step:
            return Cell(mask, "masked")
        return Cell(token, "new" if filled_at == step else "filled")

    steps = range(-1, max(unmask_step, default=NEVER) + 1)
    return [[cell(token, int(at), step) for token, at in zip(tokens, unmask_step, strict=True)] for step in steps]


def animate(frames: Iterable[Sequence[Cell]], console: Console | None = None, delay: float = 0.15, title: str = "") -> None:
    """Plays the frames in place on a terminal, `delay` seconds each; prints them one below the other anywhere else."""
    console = console or Console()
    if not console.is_terminal:
        if title:
            console.print(title, markup=False, highlight=False, soft_wrap=True)
        for step, frame in enumerate(frames):
            console.print(f"step {step:3d}: {plain_frame(frame)}", markup=False, highlight=False, soft_wrap=True)
        return
    with Live(console=console, refresh_per_second=30, transient=False) as live:
        for step, frame in enumerate(frames):
            live.update(Group(Text(title, style="bold"), frame_text(frame), Text(f"step {step}", style="dim")), refresh=True)
            time.sleep(delay)


def plain_frame(frame: Sequence[Cell]) -> str:
    """A frame in one line, cells apart by a space."""
    return " ".join(cell.text.translate(VISIBLE) for cell in frame)


def frame_text(frame: Sequence[Cell]) -> Text:
    """A frame with its colours. Masked cells are as wide as one character, so that the text grows as it is written."""
    text = Text()
    for cell in frame:
        shown = "\u2591" if cell.state == "masked" else cell.text.translate(VISIBLE)
        text.append(shown, style=STYLES[cell.state]).append(" ")
    return text


@dataclass
class SampleConfig:
    """What `rlhub sample` can be told: `sampler.temperature=0 seed=3 delay=0.5`."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0
    delay: float = 0.15  # seconds a frame stays


def show_sample(path: Path, prompt: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Generates one completion and shows how it came to be.

    Args:
        path: run folder (its newest checkpoint is taken) or checkpoint folder in Hugging Face layout.
        prompt: text to complete; None takes the first prompt of the run's newest dump of rollouts.
        overrides: `key=value` for `SampleConfig`; the sampler starts from the recipe of the run that `path` belongs to.
    """
    from rlhub import generate, load_model
    from rlhub.checkpoint import resolve_model_path

    path = Path(path)
    run_dir = run_folder(path)
    config = sample_config(run_dir, overrides)
    model = load_model(resolve_model_path(path))
    prompt = recorded_prompt(run_dir) if prompt is None else prompt
    sampler = config.sampler
    [rollout] = generate(
        model,
        [prompt],
        sampler=sampler.name,
        length=sampler.length,
        steps=sampler.steps,
        block_length=sampler.block_length,
        temperature=sampler.temperature,
        seed=config.seed,
    )
    show_rollout(rollout, model.tokenizer, prompt, delay=config.delay)


def show_rollout(rollout: Rollout, tokenizer: Any, prompt: str, console: Console | None = None, delay: float = 0.15) -> None:
    """Plays a rollout under its prompt, then prints its text."""
    console = console or Console()
    frames = denoising_frames(token_strings(tokenizer, rollout.completion_ids), rollout.unmask_step.tolist())
    animate(frames, console, delay, title=prompt)
    completion = tokenizer.decode(rollout.completion_ids[: rollout.length].tolist(), skip_special_tokens=True)
    console.print(f"completion: {completion}", markup=False, highlight=False, soft_wrap=True)
    counts = f"{len(frames) - 1} denoising steps, {rollout.num_forwards} forwards, {rollout.length} tokens"
    console.print(counts, style="dim", highlight=False)


def run_folder(path: Path) -> Path | None:
    """The run that a checkpoint or model folder lies in, None where there is none."""
    return next((folder for folder in [path, *path.resolve().parents[:3]] if (folder / "config.yaml").is_file()), None)


def sample_config(run_dir: Path | None, overrides: Sequence[str]) -> SampleConfig:
    """Defaults, then the run's sampler, then the overrides; a key or type that does not exist is refused."""
    recorded = OmegaConf.load(run_dir / "config.yaml").get("sampler", {}) if run_dir else {}
    told = OmegaConf.merge({"sampler": recorded}, OmegaConf.from_dotlist(list(overrides)))
    config = OmegaConf.structured(SampleConfig)
    for key, value in flatten(OmegaConf.to_container(told)):
        assign(config, SampleConfig, key, value, owner="sample")
    return OmegaConf.to_object(config)


def recorded_prompt(run_dir: Path | None) -> str:
    """The first prompt of the newest dump of rollouts."""
    for file in reversed(rollout_files(run_dir) if run_dir else []):
        for row in read_rollouts(file):
            return row["prompt"]
    raise UserError('no prompt is recorded there; give one: rlhub sample PATH "PROMPT"')
