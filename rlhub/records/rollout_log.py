"""Dumps of generated samples, `rollouts/step_00010.jsonl`: readable without the tokenizer, one JSON object a sample.

    {"schema": 1, "step": 10, "uid": 7, "group_uid": 1, "prompt": "...", "completion": "...", "tokens": ["3", "+", ...],
     "unmask_step": [0, 2, ...], "logp": [-0.1, null, ...], "reward": 1.0, "status": "ok", "length": 5, "forwards": 8,
     "sampler": {"name": "low_confidence", "steps": 8, ...}, "parts": {"answer": {"value": 1.0, "status": "ok", "detail": "right"}, ...}}

`tokens`, `unmask_step` and `logp` cover the whole canvas; `logp` is the model's at temperature 1 at the step that committed the token;
`parts` is there when the reward combines several, and of the trace fields of `rlhub.types.Rollout` those that were recorded:
`entropy`, `order`, `fallback` per position, `edits` as `[step, position, old, new]`, `predictions` as one canvas a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rewards._grader import to_json
from rlhub.errors import DataError
from rlhub.files import plain, replace_file
from rlhub.types import NEVER, Rollout

SCHEMA = 1
UNGRADED = "ungraded"


def rollout_path(run_dir: Path | str, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step_{step:05d}.jsonl"


def rollout_files(run_dir: Path | str) -> list[Path]:
    """The dumps of a run in the order of their steps."""
    return sorted((Path(run_dir) / "rollouts").glob("step_*.jsonl"), key=lambda path: int(path.stem.removeprefix("step_")))


def dump_rollouts(
    path: Path | str,
    step: int,
    rollouts: Sequence[Rollout],
    texts: Sequence[tuple[str, str]],
    token_strings: Sequence[Sequence[str]],
    name: Callable[[int], str] = str,
) -> None:
    """Writes one dump at once. `texts` holds prompt and completion of each rollout, `token_strings` its canvas token by token; `name`
    is the text of any other token that a trace holds."""
    pairs = zip(rollouts, texts, token_strings, strict=True)
    rows = [rollout_row(step, rollout, *text, strings, name) for rollout, text, strings in pairs]
    replace_file(Path(path), "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def rollout_row(
    step: int, rollout: Rollout, prompt: str, completion: str, tokens: Sequence[str], name: Callable[[int], str] = str
) -> dict[str, Any]:
    """One sample in the schema above."""
    row = {
        "schema": SCHEMA,
        "step": step,
        "uid": int(rollout.uid),
        "group_uid": int(rollout.group_uid),
        "prompt": prompt,
        "completion": completion,
        "tokens": list(tokens),
        "unmask_step": plain(rollout.unmask_step),
        "logp": plain(rollout.logp_model),
        "reward": None if rollout.reward is None else plain(rollout.reward.value),
        "status": UNGRADED if rollout.reward is None else rollout.reward.status,
        "length": int(rollout.length),
        "forwards": int(rollout.num_forwards),
        "sampler": plain(rollout.sampler),
    }
    if rollout.reward is not None and rollout.reward.parts:
        row["parts"] = {label: to_json(part) for label, part in rollout.reward.parts.items()}
    traces = {key: getattr(rollout, key) for key in ("entropy", "order", "fallback")}
    row |= {key: plain(values) for key, values in traces.items() if values is not None}
    if rollout.edits is not None:
        row["edits"] = [[int(at), int(position), name(int(old)), name(int(new))] for at, position, old, new in rollout.edits]
    if rollout.predictions is not None:
        row["predictions"] = [[None if token == NEVER else name(token) for token in canvas] for canvas in rollout.predictions.tolist()]
    return row


def read_rollouts(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a dump."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not a JSON object ({error.msg}); delete the line to go on") from None
        if row.get("schema") != SCHEMA:
            raise DataError(f"{path}, line {number}: schema {row.get('schema')!r}, this version reads {SCHEMA}; delete the file to go on")
        rows.append(row)
    return rows


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token of a canvas on its own, special tokens by name, for display."""
    return [tokenizer.decode([int(token)]) for token in ids]


def token_namer(tokenizer: Any) -> Callable[[int], str]:
    """The text of one token, looked up once each."""
    return cache(lambda token: tokenizer.decode([token]))
