"""`rlhub sample`: denoising in the terminal. Masked cells fill up step by step in the colour of the model's confidence."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rewards.answers.text import plain as plain_prompt
from rlhub.config.schema import SamplerConfig, TraceField
from rlhub.errors import DataError, UserError
from rlhub.parts import assign, flatten, load_part, part_config
from rlhub.records.rollout_log import read_rollouts, rollout_files, rollout_row, token_namer, token_strings
from rlhub.reports.timeline import (
    CONFIDENCE_COLORS,
    VISIBLE,
    CanvasCell,
    Frame,
    SampleRow,
    confidence_color,
    denoising_frames,
    settings_text,
    write_timelines,
)
from rlhub.samplers import log_probs
from rlhub.types import NEVER, Rollout

MASK = "\u2591"
RECORDED: tuple[TraceField, ...] = ("entropy", "order")  # beside what the run's own sampler records
LOG_PROBS = {
    "exact": "they multiply to the probability of this rollout",
    "given_order": "exact for the tokens given their positions",
    "none": "positions depend on draws that are not recorded, so they do not multiply to the rollout's probability",
}


@dataclass
class SampleConfig:
    """What `rlhub sample` can be told: `sampler.temperature=0 seed=3 delay=0.5`."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0
    delay: float = 0.15  # seconds a step stays


def show_sample(
    path: Path, prompts: Sequence[str] = (), overrides: Sequence[str] = (), file: Path | None = None, html: Path | None = None
) -> None:
    """Generates one completion per prompt and shows how each came to be.

    Args:
        path: run folder (its newest checkpoint is taken), checkpoint or model folder in Hugging Face layout.
        prompts: texts to complete; without any, and without a file, the first prompt of the run's newest dump of rollouts.
        overrides: `key=value` for `SampleConfig`; the sampler starts from the recipe of the run that `path` belongs to.
        file: more prompts, see `read_prompts`.
        html: where to write a page with the timelines as well.

    Raises:
        UserError: there is no prompt, or the settings do not fit together.
    """
    from rlhub.checkpoints.sealed import resolve_model_path, run_folder_of
    from rlhub.inference import generate_with, load_model

    path = Path(path)
    run_dir, folder = run_folder_of(path), resolve_model_path(path)
    config = sample_config(run_dir, folder, overrides)
    asked = [*prompts, *(read_prompts(file) if file else [])] or [recorded_prompt(run_dir)]
    model = load_model(folder)
    config.sampler.records = sorted({*config.sampler.records, *RECORDED})
    try:
        rollouts = generate_with(model, asked, config.sampler, config.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    rows = [sample_row(rollout, model.tokenizer, prompt) for rollout, prompt in zip(rollouts, asked, strict=True)]
    console = Console()
    for number, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        if number:
            console.print()
        show_row(row, console, config.delay)
        _print(console, numbers_text(rollout), style="dim")
    if html is not None:
        title = f"{(run_dir or path).resolve().name}: {len(rows)} completion{'s' * (len(rows) > 1)}"
        _print(console, f"timeline {write_timelines(rows, html, title)}")


def sample_row(rollout: Rollout, tokenizer: Any, prompt: Any) -> dict[str, Any]:
    """A rollout as its run would log it."""
    completion = tokenizer.decode(rollout.completion_ids[: rollout.length].tolist(), skip_special_tokens=True)
    strings = token_strings(tokenizer, rollout.completion_ids)
    return rollout_row(0, rollout, plain_prompt(prompt), completion, strings, token_namer(tokenizer))


def show_row(row: SampleRow, console: Console | None = None, delay: float = 0.15) -> None:
    """Plays the denoising of a row in place on a terminal, `delay` seconds a step; prints a table of its steps anywhere else."""
    console = console or Console()
    frames = denoising_frames(row, MASK if console.is_terminal else "_")
    _print(console, row["prompt"], style="bold")
    if console.is_terminal:
        with Live(console=console, refresh_per_second=30, transient=False) as live:
            for number, frame in enumerate(frames):
                live.update(_picture(frame, number, len(frames) - 1), refresh=True)
                time.sleep(delay)
    else:
        for line in step_table(row, frames):
            _print(console, line)
    _print(console, f"completion: {row['completion']}")


def step_table(row: SampleRow, frames: Sequence[Frame]) -> list[str]:
    """A line for each step: what it filled or edited, how sure the model was of the least sure of these, and the canvas after it."""
    length = len(row["tokens"])
    lines = [f"{'step':>4}  {'block':>9}  {'filled':>9}  {'confidence':>10}  canvas"]
    for frame in frames:
        filled = sum(cell.state != "masked" for cell in frame.cells)
        written = [cell for cell in frame.cells if cell.state in ("new", "edited")]
        least = min((cell.confidence for cell in written if cell.confidence is not None), default=None)
        block = f"{frame.block[0]}-{frame.block[1] - 1}"
        edits = [f"  [{position}: {_visible(cell.old)} -> {_visible(cell.text)}]" for position, cell in enumerate(frame.cells) if cell.old]
        confidence = "" if least is None else f"{least:.4f}"
        canvas = " ".join(_visible(cell.text) for cell in frame.cells)
        lines.append(f"{frame.step + 1:>4}  {block:>9}  {f'{filled}/{length}':>9}  {confidence:>10}  {canvas}{''.join(edits)}")
    return lines


def numbers_text(rollout: Rollout) -> str:
    """Settings, forwards and log-probs of a rollout, one line each."""
    filled = rollout.unmask_step != NEVER
    per_token = rollout.num_forwards / max(1, rollout.length)
    module = load_part("samplers", rollout.sampler["name"])
    meaning = log_probs(module, part_config(module, rollout.sampler["options"]), rollout.sampler["eos"])
    lines = [
        f"sampler: {settings_text(rollout.sampler)}",
        f"{rollout.num_forwards} forwards for {rollout.length} tokens through the first end of text ({per_token:.2f} per token), "
        f"{int(filled.sum())} of {len(filled)} positions filled",
        f"log-prob at temperature 1: {rollout.logp_model[filled].sum():.4f} nats, under the law that drew: "
        f"{rollout.logp_sample[filled].sum():.4f} nats; {LOG_PROBS[meaning]}",
    ]
    if rollout.entropy is not None and filled.any():
        lines.append(f"entropy when filled: mean {rollout.entropy[filled].mean():.4f}, highest {rollout.entropy[filled].max():.4f} nats")
    return "\n".join(lines)


def sample_config(run_dir: Path | None, model_folder: Path, overrides: Sequence[str]) -> SampleConfig:
    """The run's sampler, or for a model without a run those of `rlhub.generate`; then the overrides, of which unknown ones are refused."""
    recorded = OmegaConf.load(run_dir / "config.yaml").get("sampler", {}) if run_dir else _sampler_for(model_folder)
    told = OmegaConf.from_dotlist(list(overrides))
    name = OmegaConf.select(told, "sampler.name")
    if name is not None and name != recorded.get("name"):
        recorded["options"] = {}  # they were another sampler's
    config = OmegaConf.structured(SampleConfig)
    for key, value in flatten(OmegaConf.to_container(OmegaConf.merge({"sampler": recorded}, told))):
        assign(config, SampleConfig, key, value, owner="sample")
    return OmegaConf.to_object(config)


def _sampler_for(model_folder: Path) -> DictConfig:
    """Defaults of `rlhub.generate`, in the blocks that the model was trained on if it has any."""
    from rlhub.checkpoints.folders import empty_network, published_config

    block = empty_network(published_config(model_folder)).profile.block_length
    return OmegaConf.create({"length": 128, "steps": 64, "block_length": block or 32, "temperature": 0.0})


def recorded_prompt(run_dir: Path | None) -> str:
    """The first prompt of the newest dump of rollouts."""
    for file in reversed(rollout_files(run_dir) if run_dir else []):
        for row in read_rollouts(file):
            return row["prompt"]
    raise UserError('no prompt is recorded there; give one: rlhub sample PATH "PROMPT"')


def read_prompts(file: Path) -> list[Any]:
    """The prompts of a file: one text a line, or from JSON lines (`.jsonl`) the `prompt` of each row, text or chat messages.

    Raises:
        DataError: there is no such file, it has no prompts, or a line has none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"{file} holds no prompts; write one a line")
    return [_row_prompt(file, number, line) for number, line in numbered] if file.suffix == ".jsonl" else [line for _, line in numbered]


def _row_prompt(file: Path, number: int, line: str) -> Any:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, TypeError, KeyError):
        raise DataError(f'{file}, line {number}: expected a JSON object with a prompt, such as {{"prompt": "..."}}') from None
    if not isinstance(prompt, str | list) or not prompt:
        raise DataError(f"{file}, line {number}: a prompt is text or chat messages, got {prompt!r:.80}")
    return prompt


def _picture(frame: Frame, number: int, last: int) -> Group:
    """What the terminal shows of a state: the canvas, the edits of this step, and how far it is."""
    text = Text()
    for position, cell in enumerate(frame.cells):
        text.append(_visible(cell.text), style=_style(cell, frame.block[0] <= position < frame.block[1])).append(" ")
    edits = [f"{position}: {_visible(cell.old)} \u2192 {_visible(cell.text)}" for position, cell in enumerate(frame.cells) if cell.old]
    scale = Text("confidence 0 ", style="dim")
    for color in CONFIDENCE_COLORS:
        scale.append("  ", style=f"on {color}")
    scale.append(" 1   ").append("new", style="bold").append("   ").append("edited", style="bold reverse")
    counter = Table.grid(padding=(0, 2))
    counter.add_row(ProgressBar(total=max(1, last), completed=number, width=24), Text(f"step {frame.step + 1}, {number} of {last}"), scale)
    return Group(text, *([Text("edits  " + ",  ".join(edits), style="bold")] if edits else []), counter)


def _style(cell: CanvasCell, in_block: bool) -> str:
    underline = " underline" if in_block else ""
    if cell.state == "masked":
        return f"dim{underline}"
    fill = ""
    if cell.confidence is not None:
        color, ink = confidence_color(cell.confidence)
        fill = f"{ink} on {color}"
    return {"filled": "", "new": "bold ", "edited": "bold reverse "}[cell.state] + fill + underline


def _visible(text: str) -> str:
    return text.translate(VISIBLE)


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
