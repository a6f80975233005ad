"""4x4 Sudoku: the share of the originally empty cells that are right, as ESPO and d1 published it (0 without an answer).

An answer is read digit by digit: everything else is dropped, missing cells count as empty, digits beyond the sixteenth are ignored.

Columns: `puzzle` and `solution`, 16 digits each in reading order, 0 for an empty cell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rewards import Prompt, check_answer, column, extract_answer
from rlhub.types import RewardResult

CELLS = 16


@dataclass(frozen=True)
class Config:
    """`answer`: tags or whole, see `rewards.extract_answer`. `grid`: 1.0 for any solved grid with the puzzle's clues, 0 for all else.

    The published cell fraction counts one solution only, while 124 of the 500 published puzzles have several.
    """

    answer: str = "tags"
    grid: bool = False

    def __post_init__(self) -> None:
        check_answer(self.answer)


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """A fraction in [0, 1]; see the module.

    Raises:
        ValueError: the row is not a puzzle with an empty cell and its solution.
    """
    puzzle, solution = str(column(row, "puzzle")), str(column(row, "solution"))
    if len(puzzle) != CELLS or len(solution) != CELLS or "0" not in puzzle:
        raise ValueError(f"not a 4x4 puzzle with an empty cell and a solution: {puzzle!r}, {solution!r}")
    answer = extract_answer(completion, config.answer)
    if answer is None:
        return RewardResult(0.0, "unparsed", "no answer tags")
    digits = "".join(re.findall(r"[0-9]", answer))
    if not digits:
        return RewardResult(0.0, "unparsed", "no digits")
    cells = digits.ljust(CELLS, "0")[:CELLS]
    empty = [cell for cell in range(CELLS) if puzzle[cell] == "0"]
    right = sum(cells[cell] == solution[cell] for cell in empty)
    value = float(_solves(puzzle, cells)) if config.grid else right / len(empty)
    return RewardResult(value, detail=f"{right} of {len(empty)} cells")


def _solves(puzzle: str, cells: str) -> bool:
    rows = [cells[row : row + 4] for row in range(0, CELLS, 4)]
    columns = [cells[start::4] for start in range(4)]
    boxes = [cells[corner : corner + 2] + cells[corner + 4 : corner + 6] for corner in (0, 2, 8, 10)]
    clues_kept = all(clue in ("0", cell) for clue, cell in zip(puzzle, cells, strict=True))
    return clues_kept and all(set(unit) == set("1234") for unit in rows + columns + boxes)
