"""Grades that were given before, in memory or in a folder that workers and runs may share."""

from __future__ import annotations

import hashlib
import json
import pickle
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rewards._grader import Item, from_json, to_json
from rlhub.types import RewardResult

MAX_IN_MEMORY = 500_000  # grades; the oldest are forgotten


class GradeCache:
    """Valid grades by grader version, prompt, completion and row. A failure is never kept: it may not happen again.

    Args:
        place: `memory` or a folder.
    """

    def __init__(self, place: str) -> None:
        self.in_memory = place == "memory"
        if not self.in_memory:
            Path(place).mkdir(parents=True, exist_ok=True)
        path = ":memory:" if self.in_memory else str(Path(place) / "grades.sqlite")
        self.database = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        self.lock = threading.Lock()
        self.database.execute("CREATE TABLE IF NOT EXISTS grades (key BLOB PRIMARY KEY, result TEXT)")

    def look_up(self, version: str, items: Sequence[Item]) -> list[RewardResult | None]:
        """What is known of each item."""
        with self.lock:
            query, keys = "SELECT result FROM grades WHERE key = ?", [grade_key(version, item) for item in items]
            rows = [self.database.execute(query, (key,)).fetchone() for key in keys]
        return [None if row is None else replace(from_json(json.loads(row[0])), cached=True) for row in rows]

    def keep(self, version: str, graded: Iterable[tuple[Item, RewardResult]]) -> None:
        """Remember the valid ones."""
        rows = [(grade_key(version, item), json.dumps(to_json(result))) for item, result in graded if result.valid and not result.cached]
        if not rows:
            return
        with self.lock:
            self.database.execute("BEGIN IMMEDIATE")
            self.database.executemany("INSERT OR REPLACE INTO grades VALUES (?, ?)", rows)
            if self.in_memory:
                newest = "(SELECT max(rowid) FROM grades)"
                self.database.execute(f"DELETE FROM grades WHERE rowid <= {newest} - ?", (MAX_IN_MEMORY,))
            self.database.execute("COMMIT")


def grade_key(version: str, item: Item) -> bytes:
    """A hash of everything that a grade depends on."""
    text = json.dumps([version, *item], sort_keys=True, default=lambda value: pickle.dumps(value).hex())
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
