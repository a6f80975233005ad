"""9x9 and 4x4 Sudoku: cell and grid credit against grids made by an independent pattern."""

from __future__ import annotations

import pytest

from rewards import load_grader

# A shifted pattern: row r is 1..9 rotated by 3 (r mod 3) + r div 3, which fulfils all rules.
NINE = "".join(str((3 * (row % 3) + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))
FOUR = "1234341221434321"


def with_holes(solution, holes, mark="0"):
    return "".join(mark if cell in holes else digit for cell, digit in enumerate(solution))


def graded(completion, row, **options):
    return load_grader({"name": "sudoku", "answer": "whole", **options})("", completion, row)


@pytest.mark.parametrize("solution", [FOUR, NINE])
@pytest.mark.parametrize("mark", ["0", "."])
def test_cell_credit_is_the_share_of_the_holes(solution, mark):
    holes = list(range(0, len(solution), 3))
    row = {"puzzle": with_holes(solution, holes, mark), "solution": solution}
    for wrong in range(len(holes) + 1):
        answer = with_holes(solution, holes[:wrong])
        result = graded(" ".join(answer), row)
        assert (result.value, result.status) == ((len(holes) - wrong) / len(holes), "ok")


@pytest.mark.parametrize("solution", [FOUR, NINE])
def test_grid_credit_needs_no_solution_and_all_cells(solution):
    row = {"puzzle": with_holes(solution, range(1, len(solution), 2))}
    assert graded(solution, row, grid=True).value == 1.0
    for cell in range(len(solution)):
        broken = solution[:cell] + str(int(solution[cell]) % 4 + 1) + solution[cell + 1 :]
        assert graded(broken, row, grid=True).value == 0.0
    assert graded(solution[:-1], row, grid=True).value == 0.0


def test_grid_credit_keeps_the_clues_and_the_boxes():
    swapped = NINE.translate(str.maketrans("12", "21"))  # solved, but another puzzle
    assert graded(swapped, {"puzzle": with_holes(NINE, range(40))}, grid=True).value == 0.0
    assert graded(swapped, {"puzzle": "0" * 81}, grid=True).value == 1.0
    latin = "".join(str((row + column) % 9 + 1) for row in range(9) for column in range(9))  # rows and columns right, boxes not
    assert graded(latin, {"puzzle": "0" * 81}, grid=True).value == 0.0


def test_nothing_to_grade_is_unparsed():
    row = {"puzzle": with_holes(NINE, [0]), "solution": NINE}
    assert graded("no idea", row).status == "unparsed"
    assert graded(NINE, row, answer="tags").status == "unparsed"


@pytest.mark.parametrize(
    "row", [{"puzzle": "0" * 25, "solution": "1" * 25}, {"puzzle": NINE, "solution": NINE}, {"puzzle": "0x" * 8, "solution": FOUR}]
)
def test_rows_that_are_no_puzzles_raise(row):
    with pytest.raises(ValueError, match="4x4 or 9x9"):
        graded("1", row)
