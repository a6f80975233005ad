"""Denoising as data and as a page: states step by step, blocks, colours, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from rlhub.records.rollout_log import dump_rollouts, read_rollouts
from rlhub.reports.timeline import (
    active_block,
    block_offset,
    confidence_color,
    denoising_frames,
    settings_text,
    timeline_data,
    write_timelines,
)
from rlhub.types import NEVER, Rollout

WORDS = ["a", "b", "<i>c</i>", "</script><script>alert(1)</script>", "e\nf", "<eos>", "<mask>"]


def rollout() -> Rollout:
    """Six positions in two blocks; position 1 is edited twice, position 5 is never filled."""
    steps = np.array([1, 0, 1, 2, 3, NEVER], np.int16)
    logp = np.log(np.array([0.5, 0.25, 1.0, 0.9, 0.8, np.nan])).astype(np.float32)
    return Rollout(
        uid=7,
        group_uid=7,
        prompt_ids=np.arange(3, dtype=np.int32),
        completion_ids=np.array([0, 1, 2, 3, 4, 6], np.int32),
        length=5,
        unmask_step=steps,
        logp_sample=logp,
        logp_model=logp,
        policy_version=np.zeros(6, np.int32),
        num_forwards=4,
        sampler={"name": "edit", "length": 6, "steps": 4, "block_length": 3, "temperature": 1.0, "top_p": 0.9},
        entropy=np.linspace(0, 1, 6).astype(np.float32),
        order=np.array([0, 0, 1, 0, 0, NEVER], np.int16),
        predictions=np.array([[0, 4, 0, NEVER, NEVER, NEVER], [0, 2, 2, NEVER, NEVER, NEVER], [NEVER] * 6, [NEVER] * 6], np.int32),
        edits=((1, 1, 4, 2), (3, 1, 2, 1)),
        fallback=np.zeros(6, dtype=bool),
    )


@pytest.fixture
def row(tmp_path: Path) -> dict:
    """As a run logs it and a report reads it."""
    file = tmp_path / "step_00001.jsonl"
    dump_rollouts(
        file, 1, [rollout()], [("<b>prompt</b>", "abc")], [[WORDS[token] for token in rollout().completion_ids]], WORDS.__getitem__
    )
    return read_rollouts(file)[0]


# By hand: the canvas before the first step and after the steps 0 to 3.
CANVASES = [
    ["_", "_", "_", "_", "_", "_"],
    ["_", "e\nf", "_", "_", "_", "_"],
    ["a", "<i>c</i>", "<i>c</i>", "_", "_", "_"],
    ["a", "<i>c</i>", "<i>c</i>", WORDS[3], "_", "_"],
    ["a", "b", "<i>c</i>", WORDS[3], "e\nf", "_"],
]


def test_a_dump_keeps_the_whole_trace(row: dict) -> None:
    assert row["edits"] == [[1, 1, "e\nf", "<i>c</i>"], [3, 1, "<i>c</i>", "b"]] and row["forwards"] == 4
    assert row["order"] == [0, 0, 1, 0, 0, NEVER] and row["entropy"][5] == 1.0 and row["sampler"]["top_p"] == 0.9
    assert row["predictions"][0] == ["a", "e\nf", "a", None, None, None]


def test_frames_follow_fills_and_edits(row: dict) -> None:
    frames = denoising_frames(row)
    assert [[cell.text for cell in frame.cells] for frame in frames] == CANVASES and [frame.step for frame in frames] == [-1, 0, 1, 2, 3]
    assert [frame.cells[1].state for frame in frames] == ["masked", "new", "edited", "filled", "edited"]
    assert frames[2].cells[1].old == "e\nf" and frames[4].cells[1].old == "<i>c</i>"
    # The recorded confidence is that of the token that stands at the end.
    assert [frame.cells[1].confidence for frame in frames[1:4]] == [None] * 3 and frames[4].cells[1].confidence == pytest.approx(0.25)
    assert [frame.block for frame in frames] == [(0, 3), (0, 3), (0, 3), (3, 6), (0, 3)]


def test_blocks_counted_from_the_prompt_are_found() -> None:
    random = np.random.default_rng(0)
    for width, length in ((3, 11), (4, 16), (5, 13)):
        for offset in range(width):
            block = (np.arange(length) + offset) // width
            # Two tokens of a block are filled in one step, so that a wrong grid cannot fit.
            steps = [int(number) * width + int(random.integers(width - 1)) for number in block]
            found = block_offset(steps, width)
            row = {"tokens": [""] * length, "unmask_step": steps, "sampler": {"block_length": width}}
            for position, step in enumerate(steps):
                first, end = active_block(row, step)
                assert first <= position < end and end - first <= width
            assert all(len(set(block[(np.arange(length) + found) // width == number])) <= 2 for number in range(4))
    assert block_offset([NEVER] * 4, 2) == 0


def test_colours_go_from_one_end_to_the_other_with_readable_ink() -> None:
    for share in np.linspace(0, 1, 101):
        background, ink = ([int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)] for color in confidence_color(float(share)))

        def luminance(channels: list[float]) -> float:  # WCAG 2
            linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        bright, dark = sorted((luminance(background), luminance(ink)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, f"hard to read at {share}"


def test_settings_are_told_without_defaults() -> None:
    text = settings_text(rollout().sampler | {"eos": "allow", "options": {"threshold": 0.5}})
    assert text == "edit, length 6, steps 4, block_length 3, temperature 1, top_p 0.9, threshold 0.5"


def test_the_page_is_self_contained_and_escapes_what_a_model_wrote(row: dict, tmp_path: Path) -> None:
    html = write_timelines([row, row], tmp_path / "t.html", "run <1>").read_text()
    assert "run &lt;1&gt;" in html and html.count("<script") == html.count("</script>") == 3
    assert "<i>c" not in html and "<b>prompt" not in html
    assert not re.search(r"https?:|src=|href=|@import|url\(", html)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data == json.loads(json.dumps([timeline_data(row)] * 2)) and data[0]["tokens"][3] == WORDS[3]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_plays_the_same_states(row: dict, tmp_path: Path) -> None:
    page = write_timelines([{**row, "predictions": []}], tmp_path / "t.html", "t")
    probe = """<script>
      const out = [], root = document.querySelector(".timeline");
      for (let frame = 0; frame < 5; frame++) {
        const cells = [...root.querySelectorAll(".canvas span")];
        out.unshift({ texts: cells.map(cell => cell.lastChild.textContent), names: cells.map(cell => cell.className),
          counter: root.querySelector("output").textContent });
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", cancelable: true }));
      }
      document.body.append(Object.assign(document.createElement("pre"), { id: "out", textContent: JSON.stringify(out) }));
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--dump-dom"]
    command = ["chromium", *options, f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    out = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))
    shown = [[text.replace("_", "\u2591").replace("\n", "\\n") for text in canvas] for canvas in CANVASES]
    assert [frame["texts"] for frame in out] == shown
    assert [frame["counter"] for frame in out] == ["all masked", *(f"step {step} of 4" for step in (1, 2, 3, 4))]
    assert [frame["names"][1] for frame in out] == ["block masked", "block new unknown", "block edited unknown", "unknown", "block edited"]
    assert out[-1]["names"][5] == "tail masked"
