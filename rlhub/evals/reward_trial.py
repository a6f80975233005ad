"""Grading a file of completions as training does: statuses, confusion against labels, disagreements and time per item."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, get_args

from rewards import Item
from rewards.pool import RewardPool, RewardPoolConfig
from rlhub.errors import DataError, UserError
from rlhub.tasks.jsonl import read_jsonl
from rlhub.types import RewardResult, RewardStatus

if TYPE_CHECKING:
    from rich.console import Group

LONG = 200  # rows from which a terminal sees a progress bar
LOOK_SECONDS = 0.2  # between its updates
LABELS = {
    **dict.fromkeys(["1", "1.0", "true", "yes", "correct", "right", "pass", "passed"], True),
    **dict.fromkeys(["0", "0.0", "false", "no", "incorrect", "wrong", "fail", "failed"], False),
}
FIELDS = ("prompt", "completion", "label")


def grade_file(part: dict[str, Any], path: str, columns: str = "", config: RewardPoolConfig | None = None) -> dict[str, Any]:
    """The report of `rlhub reward test`: plain values, ready for JSON.

    `statuses` sums to `rows`, a failed grade agrees with no label, and `seconds_per_item` is the time from the first item's start to the
    last one's end, over the rows: more processes make it smaller.

    Args:
        part: `{"name": ..., **options}`.
        config: processes, deadline and memory of the grading.

    Raises:
        UserError: the file, a row, the reward's name or an option is not usable.
    """
    rows = _rows(path, _mapping(columns))
    start = time.perf_counter()
    with RewardPool(part, config) as pool:
        prepared = time.perf_counter()
        results = _results(pool, [item for _, item, _ in rows])
        seconds = time.perf_counter() - prepared
    values = [result.value for result in results if result.valid and math.isfinite(result.value)]
    labelled = [(number, item, label, result) for (number, item, label), result in zip(rows, results, strict=True) if label is not None]
    confusion = Counter(_cell(label, result) for _, _, label, result in labelled)
    cells = ("true_positive", "false_positive", "true_negative", "false_negative", "failed")
    agreeing = confusion["true_positive"] + confusion["true_negative"]
    failed = [(number, result) for (number, *_), result in zip(rows, results, strict=True) if not result.valid]
    failures = Counter(f"{result.status}: {_last_line(result.detail)}" for _, result in failed)
    return {
        "reward": part["name"],
        "data": path,
        "rows": len(rows),
        "counts": {"right": sum(_right(result) for result in results), "graded": len(values), "labelled": len(labelled)},
        "statuses": {status: sum(result.status == status for result in results) for status in get_args(RewardStatus)},
        "failures": dict(failures.most_common(20)),
        "first_failure": _failure(*failed[0]) if failed else None,
        "mean": sum(values) / len(values) if values else None,
        "agreement": agreeing / len(labelled) if labelled else None,
        "confusion": {cell: confusion[cell] for cell in cells} if labelled else None,
        "disagreements": [
            _disagreement(number, item, label, result)
            for number, item, label, result in labelled
            if _cell(label, result) not in ("true_positive", "true_negative")
        ],
        "seconds_to_prepare": prepared - start,
        "seconds_per_item": seconds / len(rows),
    }


def report_view(report: dict[str, Any], show: int) -> Group:
    """The report for a terminal, with the first `show` disagreements."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Table("what", "value", title=f"{report['reward']} on {report['data']}")
    summary.add_row("rows", str(report["rows"]))
    for status, count in report["statuses"].items():
        summary.add_row(f"status {status}", str(count))
    summary.add_row("right (value 1)", str(report["counts"]["right"]))
    summary.add_row("mean value", "none" if report["mean"] is None else f"{report['mean']:.4f}")
    summary.add_row("time per item", f"{1000 * report['seconds_per_item']:.3g} ms")
    views: list[Table | Text] = [summary]
    views += [Text(f"{count} x {failure}", style="red") for failure, count in report["failures"].items()]
    if report["confusion"]:
        summary.add_row("agreement with labels", f"{100 * report['agreement']:.2f} % of {report['counts']['labelled']}")
        cells = {cell: str(count) for cell, count in report["confusion"].items()}
        confusion = Table("", "graded right", "graded wrong")
        confusion.add_row("label right", cells["true_positive"], cells["false_negative"])
        confusion.add_row("label wrong", cells["false_positive"], cells["true_negative"])
        views += [confusion, Text(f"labelled rows without a grade: {cells['failed']}")]
    found = report["disagreements"]
    if found and show > 0:
        table = Table("row", "label", "value", "status", "gold", "detail", title=f"disagreements, {min(show, len(found))} of {len(found)}")
        for entry in found[:show]:
            value = "none" if entry["value"] is None else f"{entry['value']:g}"
            texts = [str(entry["gold"])[-60:], _last_line(str(entry["detail"]))[:80]]
            table.add_row(str(entry["row"]), str(entry["label"]), value, entry["status"], *map(Text, texts))
        views.append(table)
    return Group(*views)


def _rows(path: str, mapping: dict[str, str]) -> list[tuple[int, Item, bool | None]]:
    """(row number, item, label) of every row; the columns of the item are all fields but prompt, completion and label."""
    rows = []
    for number, row in read_jsonl(path):
        where = f"{path}, row {number}"
        missing = [source for name, source in mapping.items() if source not in row and name != "label"]
        if missing:
            raise DataError(f"{where}: no field {missing[0]!r}; the row has: {', '.join(row) or 'none'} (rename with --columns)")
        columns = {key: value for key, value in row.items() if key not in (mapping[name] for name in FIELDS)}
        columns |= {name: row[source] for name, source in mapping.items() if name not in FIELDS}
        prompt, completion = row[mapping["prompt"]], row[mapping["completion"]]
        if not isinstance(completion, str):
            raise DataError(f"{where}: the completion must be text, got {type(completion).__name__}")
        if not isinstance(prompt, str | list):
            raise DataError(f"{where}: the prompt must be text or chat messages, got {type(prompt).__name__}")
        rows.append((number, (prompt, completion, columns), _label(row.get(mapping["label"]), where)))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _mapping(columns: str) -> dict[str, str]:
    """Column -> field of the file."""
    pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
    for name, _, source in pairs:
        if not name.strip() or not source.strip():
            raise UserError(f"--columns {columns!r}: write NAME=FIELD,NAME=FIELD, e.g. completion=output,label=is_correct")
    return {name: name for name in FIELDS} | {name.strip(): source.strip() for name, _, source in pairs}


def _label(value: Any, where: str) -> bool | None:
    if value is None:
        return None
    text = str(value).strip().lower()
    if text not in LABELS:
        raise DataError(f"{where}: label {value!r} is neither right nor wrong; write true or false")
    return LABELS[text]


def _results(pool: RewardPool, items: list[Item]) -> list[RewardResult]:
    from rich.console import Console
    from rich.progress import Progress

    silent = not sys.stderr.isatty() or len(items) < LONG
    grades = pool.submit(items)
    with Progress(console=Console(stderr=True), disable=silent, transient=True) as progress:
        bar = progress.add_task("grading", total=len(items))
        while wait([grades], LOOK_SECONDS).not_done:
            progress.update(bar, completed=pool.num_graded)
    return grades.result()


def _right(result: RewardResult) -> bool:
    return result.valid and result.value == 1.0


def _cell(label: bool, result: RewardResult) -> str:
    if not result.valid:
        return "failed"
    right = _right(result)
    return f"{'true' if right == label else 'false'}_{'positive' if right else 'negative'}"


def _disagreement(number: int, item: Item, label: bool, result: RewardResult) -> dict[str, Any]:
    value = result.value if math.isfinite(result.value) else None
    gold = item[2].get("answer")
    return {"row": number, "label": label, "value": value, "status": result.status, "gold": gold, "detail": result.detail}


def _failure(number: int, result: RewardResult) -> dict[str, Any]:
    return {"row": number, "status": result.status, "detail": result.detail}


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:200]
