"""Sudoku, 4x4 or 9x9: the share of the originally empty cells that are right, as ESPO and d1 published it for 4x4 (0 without an answer).

An answer is read digit by digit: everything else is dropped, missing cells count as empty, digits beyond the last cell are ignored.

Columns: `puzzle` and `solution`, 16 or 81 digits each in reading order, 0 or `.` for an empty cell. `grid` needs no solution.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from rewards import Prompt, check_answer, column, extract_answer
from rlhub.types import RewardResult

SIDES = {16: 4, 81: 9}  # cells of a grid -> its side


@dataclass(frozen=True)
class Config:
    """`answer`: tags or whole, see `rewards.extract_answer`. `grid`: 1.0 for any solved grid with the puzzle's clues, 0 for all else.

    The published cell fraction counts one solution only, while 124 of the 500 published 4x4 puzzles have several.
    """

    answer: str = "tags"
    grid: bool = False

    def __post_init__(self) -> None:
        check_answer(self.answer)


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """A fraction in [0, 1]; see the module.

    Raises:
        ValueError: the row is not a puzzle with an empty cell and, for the cell fraction, its solution.
    """
    puzzle = str(column(row, "puzzle")).replace(".", "0")
    solution = str(row.get("solution", puzzle) if config.grid else column(row, "solution"))
    if len(puzzle) not in SIDES or len(solution) != len(puzzle) or not (puzzle + solution).isdecimal() or "0" not in puzzle:
        raise ValueError(f"not a 4x4 or 9x9 puzzle with an empty cell and a solution: {puzzle!r}, {solution!r}")
    answer = extract_answer(completion, config.answer)
    if answer is None:
        return RewardResult(0.0, "unparsed", "no answer tags")
    digits = "".join(re.findall(r"[0-9]", answer))
    if not digits:
        return RewardResult(0.0, "unparsed", "no digits")
    cells = digits.ljust(len(puzzle), "0")[: len(puzzle)]
    empty = [cell for cell in range(len(puzzle)) if puzzle[cell] == "0"]
    right = sum(cells[cell] == solution[cell] for cell in empty)
    if config.grid:
        solved = _solves(puzzle, cells)
        return RewardResult(float(solved), detail="solved" if solved else "not a solution of the puzzle")
    return RewardResult(right / len(empty), detail=f"{right} of {len(empty)} cells")


def _solves(puzzle: str, cells: str) -> bool:
    side = SIDES[len(puzzle)]
    box = math.isqrt(side)
    rows = [cells[row * side : (row + 1) * side] for row in range(side)]
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    boxes = [
        "".join(row[left : left + box] for row in rows[top : top + box]) for top in range(0, side, box) for left in range(0, side, box)
    ]
    clues_kept = all(clue in ("0", cell) for clue, cell in zip(puzzle, cells, strict=True))
    return clues_kept and all(set(unit) == set("123456789"[:side]) for unit in rows + columns + boxes)
