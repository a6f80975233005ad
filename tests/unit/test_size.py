"""Files and functions stay short enough to be read at once, and long functions say what they do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES, SILENT_LINES = 450, 60, 14
FILES = sorted(file for package in ("rlhub", "workers", "rewards") for file in (ROOT / package).rglob("*.py"))


def functions(file: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function of a file with its number of lines."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_one_idea_at_a_time(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    assert {node.name: lines for node, lines in functions(file) if lines > FUNCTION_LINES} == {}
    # A constructor is described by its class.
    silent = [node for node, lines in functions(file) if lines > SILENT_LINES and not ast.get_docstring(node)]
    assert [node.name for node in silent if node.name not in ("__init__", "__post_init__")] == []
