"""The denoising of completions as pictures: states step by step, for the terminal and for a page with a slider.

Everything is drawn from rows of `rlhub.records.rollout_log`, so that what a run logged and what `rlhub sample` generates look the same.
Colours
stay apart for colour-blind readers (PuOr of ColorBrewer, viridis) and every cell brings its own ink, so that they are readable on dark and
on light.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhub.files import replace_file
from rlhub.types import NEVER

SampleRow = Mapping[str, Any]  # see rlhub.records.rollout_log
State = Literal["masked", "new", "edited", "filled"]

CONFIDENCE_COLORS = ("#b35806", "#f1a340", "#fee0b6", "#f7f7f7", "#d8daeb", "#998ec3", "#542788")  # from 0 to 1
ORDER_COLORS = ("#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725")  # first to last step
VISIBLE = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})


class CanvasCell(NamedTuple):
    """One position of the canvas in one state. `old` is the token that an edit replaced, `confidence` the probability at temperature 1 of
    the token that stands at the end, None of one that was replaced later and where it is not recorded."""

    text: str
    state: State
    confidence: float | None = None
    old: str = ""


class Frame(NamedTuple):
    """The canvas after a denoising step (NEVER: before the first one). `block` bounds the active block, [first, last)."""

    step: int
    cells: list[CanvasCell]
    block: tuple[int, int]


def denoising_frames(row: SampleRow, mask: str = "_") -> list[Frame]:
    """The canvas before the first step and after each step that changed it; a position that was never filled stays masked.

    >>> frames = denoising_frames({"tokens": ["3", "+", "4"], "unmask_step": [1, 0, 0]})
    >>> [" ".join(cell.text for cell in frame.cells) for frame in frames]
    ['_ _ _', '_ + 4', '3 + 4']
    """
    steps, confidence = row["unmask_step"], confidences(row)
    edits: dict[int, list[tuple[int, str, str]]] = {}
    for at, position, old, new in row.get("edits") or []:
        edits.setdefault(position, []).append((at, old, new))

    def cell(position: int, step: int) -> CanvasCell:
        if steps[position] == NEVER or steps[position] > step:
            return CanvasCell(mask, "masked")
        mine = edits.get(position, [])
        done = [edit for edit in mine if edit[0] <= step]
        text = done[-1][2] if done else mine[0][1] if mine else row["tokens"][position]
        known = confidence[position] if len(done) == len(mine) else None
        if done and done[-1][0] == step:
            return CanvasCell(text, "edited", known, old=done[-1][1])
        return CanvasCell(text, "new" if steps[position] == step else "filled", known)

    positions = range(len(steps))
    return [Frame(step, [cell(position, step) for position in positions], active_block(row, step)) for step in changing_steps(row)]


def changing_steps(row: SampleRow) -> list[int]:
    """NEVER, then the steps that filled or edited something, in order."""
    return sorted({NEVER, *row["unmask_step"], *(edit[0] for edit in row.get("edits") or [])})


def active_block(row: SampleRow, step: int) -> tuple[int, int]:
    """Bounds of the block that a step worked on, [first, last), cut to the canvas; the first block before the first step."""
    length = len(row["unmask_step"])
    width = row.get("sampler", {}).get("block_length", length) or 1
    touched = [position for position, at in enumerate(row["unmask_step"]) if at == step]
    touched += [position for at, position, *_ in row.get("edits") or [] if at == step]
    offset = block_offset(row["unmask_step"], width)
    number = (min(touched, default=0) + offset) // width if step != NEVER else 0
    return max(0, number * width - offset), min(length, (number + 1) * width - offset)


def block_offset(unmask_step: Sequence[int], width: int) -> int:
    """By how much the first block of the canvas is shorter than `width` because blocks are counted from the prompt's first token.

    Blocks are filled one after the other, so a grid of blocks fits when no step of a block comes before a step of an earlier one.

    >>> block_offset([0, 1, 2, 3], 2), block_offset([0, 2, 1, 4, 3], 2)
    (0, 1)
    """

    def fits(offset: int) -> bool:
        spans: dict[int, tuple[int, int]] = {}
        for position, step in enumerate(unmask_step):
            if step != NEVER:
                low, high = spans.get((position + offset) // width, (step, step))
                spans[(position + offset) // width] = min(low, step), max(high, step)
        ordered = [spans[block] for block in sorted(spans)]
        return all(before[1] < after[0] for before, after in itertools.pairwise(ordered))

    return next((offset for offset in range(width) if fits(offset)), 0)


def confidences(row: SampleRow) -> list[float | None]:
    """Probability of each token at temperature 1 when it was committed; None where it is not known."""
    logps = row.get("logp") or [None] * len(row["unmask_step"])
    return [None if logp is None else math.exp(logp) for logp in logps]


def confidence_color(confidence: float) -> tuple[str, str]:
    """Colour of a cell, and that of the ink on it.

    >>> confidence_color(0.0), confidence_color(0.5), confidence_color(1.0)
    (('#b35806', '#ffffff'), ('#f7f7f7', '#000000'), ('#542788', '#ffffff'))
    """
    place = min(max(confidence, 0.0), 1.0) * (len(CONFIDENCE_COLORS) - 1)
    low = min(int(place), len(CONFIDENCE_COLORS) - 2)
    ends = [[int(color[index : index + 2], 16) for index in (1, 3, 5)] for color in CONFIDENCE_COLORS[low : low + 2]]
    mixed = [round(first + (place - low) * (second - first)) for first, second in zip(*ends, strict=True)]
    luminance = sum(share * (value / 255) ** 2.2 for share, value in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))
    # At 0.18 black and white stand out alike.
    return "#" + "".join(f"{value:02x}" for value in mixed), "#000000" if luminance > 0.18 else "#ffffff"


def settings_text(sampler: Mapping[str, Any]) -> str:
    """A sampler's settings in one line: the usual ones, then those that are not at their default.

    >>> settings_text({"name": "random", "length": 8, "steps": 4, "block_length": 8, "temperature": 1.0, "top_p": 1.0, "eos": "last"})
    'random, length 8, steps 4, block_length 8, temperature 1, eos last'
    """
    from rlhub.config.schema import SamplerConfig

    default = vars(SamplerConfig())
    usual = ("length", "steps", "block_length", "temperature")
    other = [key for key in sampler if key not in ("name", *usual, "options", "records") and sampler[key] != default.get(key)]
    pairs = [(key, sampler[key]) for key in (*usual, *other) if key in sampler] + list((sampler.get("options") or {}).items())
    return ", ".join([str(sampler.get("name", "")), *(f"{key} {_number(value)}" for key, value in pairs)])


def timeline_data(row: SampleRow) -> dict[str, Any]:
    """What the page needs of a row, as JSON data."""
    traces = {key: row[key] for key in ("entropy", "order", "fallback") if row.get(key)}
    facts = [f"{row['forwards']} forwards"] if "forwards" in row else []
    if row.get("reward") is not None or row.get("status", "ungraded") != "ungraded":
        facts = [f"reward {_number(row['reward'])}", f"status {row['status']}", *facts]
    steps = changing_steps(row)
    return {
        "prompt": row.get("prompt", ""),
        "tokens": row["tokens"],
        "unmask": row["unmask_step"],
        "confidence": [None if value is None else round(value, 4) for value in confidences(row)],
        "length": row.get("length", len(row["tokens"])),
        "steps": steps,
        "blocks": [active_block(row, step) for step in steps],
        "edits": row.get("edits") or [],
        "predictions": _shown_predictions(row, steps),
        "facts": ", ".join([*facts, *([settings_text(row["sampler"])] if row.get("sampler") else [])]),
        **{key: [None if value is None else round(value, 4) for value in values] for key, values in traces.items()},
    }


def write_timelines(rows: Sequence[SampleRow], path: Path | str, title: str) -> Path:
    """Writes a page of its own with one timeline a row; returns where it is."""
    replace_file(Path(path), render("timeline.html.j2", title=title, timelines=[timeline_data(row) for row in rows]))
    return Path(path)


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder. Text is escaped; the player that templates include gets its colours here."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(confidence_colors=CONFIDENCE_COLORS, order_colors=ORDER_COLORS, **values)


def _shown_predictions(row: SampleRow, steps: Sequence[int]) -> list[list[str | None]]:
    """For each of `steps` what was predicted at it, where that is recorded."""
    predictions = row.get("predictions") or []
    return [predictions[step] if 0 <= step < len(predictions) else [] for step in steps] if predictions else []


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
