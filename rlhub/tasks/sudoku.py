"""4x4 Sudoku: fill a grid so that every row, column and 2x2 box holds 1 to 4.

Only 288 solution grids exist, and the published test puzzles use 229 of them, so a training set of all grids has seen nearly every test
solution. `split` says how that is handled:

    by_grid         (default) training and test never share a solution grid. Without `path` a hash holds out one grid in five; with
                    `path` all its puzzles are the test and training uses the grids that they leave over.
    by_grid_subset  needs `path`: the test is those of its puzzles whose grid the hash holds out; training uses the other grids.
    published       needs `path`: the protocol of d1 and ESPO. Training leaves out the test puzzles but not their solutions: leaky.

Of the 500 published puzzles 124 have more than one solution; the published reward counts only the one in the file. Such a puzzle can also
be solved by a training grid, though never by the graded one when the split is by grid.

Generated puzzles have `blanks` empty cells and exactly one solution. Grids are 16 digits in reading order, 0 for an empty cell.
`published` style is a chat turn with the rules and a worked example (a training grid), `short` style is bare digit tokens. Give `path` and
`split` to both splits.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhub.errors import DataError
from rlhub.noise import Noise, Stream
from rlhub.tasks import Split, Task, first_accepted, first_distinct, held_out
from rlhub.tasks._vocabulary import word_level
from rlhub.tasks.jsonl import existing
from rlhub.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT_ONE_IN = 5
STYLES = ("published", "short")
SPLITS = ("by_grid", "by_grid_subset", "published")
MAX_BLANKS = 12  # no 4x4 puzzle with fewer than four clues has a single solution

INSTRUCTION = """\
Solve a 4x4 Sudoku. Fill the empty cells, written 0, with the digits 1 to 4 so that every row, every column and every 2x2 box holds each \
digit once. Grids are written as 16 digits, row by row.

A worked example. The puzzle {example_puzzle} is the grid
{example_puzzle_grid}
and its solution {example_solution} is the grid
{example_solution_grid}

Write your answer in this format:
<reasoning>
how you get there
</reasoning>
<answer>
the 16 digits of the solved grid
</answer>

Now solve the puzzle {puzzle}."""


class Puzzle(NamedTuple):
    puzzle: str
    solution: str


@dataclass(frozen=True)
class Config:
    style: str = "published"  # published | short
    split: str = "by_grid"  # by_grid | by_grid_subset | published
    blanks: int = 8  # empty cells of generated puzzles
    path: str | None = None  # CSV with columns Puzzle,Solution: the test puzzles
    correct_fraction: float = 1.0  # of the demonstrations; the others keep the clues and fill each row with its missing digits
    test_size: int = 512  # puzzles of the test split when it is generated

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.split != "by_grid" and self.path is None:
            raise ValueError(f"split {self.split} needs path, the CSV with the test puzzles")
        if not 1 <= self.blanks <= MAX_BLANKS:
            raise ValueError(f"blanks must be in 1..{MAX_BLANKS}, got {self.blanks}")
        if not 0 <= self.correct_fraction <= 1:
            raise ValueError(f"correct_fraction must be in [0, 1], got {self.correct_fraction}")


def build(config: Config, split: Split, seed: int) -> Task:
    """An infinite train split, or the test puzzles. Columns: `puzzle`, `solution`; `answer`, the completion of the short style.

    Raises:
        DataError: the file is missing or malformed, or it leaves no grid to train on.
    """
    published = [] if config.path is None else read_puzzles(config.path)
    train_grids, test_grids = split_grids(config, published)
    unseen = sorted(set(train_grids) - set(test_grids)) or train_grids
    worked = _draw(Noise(0).stream("data/sudoku/worked_example"), unseen[:1], config.blanks, frozenset(), 0)
    noise = Noise(seed)
    demonstrate = partial(_demonstration, noise.stream(f"data/sudoku/{split}/demonstration"), config.correct_fraction)

    def example(index: int, puzzle: Puzzle) -> Example:
        prompt, answer = render(puzzle, demonstrate(index, puzzle), worked, config.style)
        return Example(index, prompt, {**puzzle._asdict(), "answer": " ".join(puzzle.solution)}, answer)

    stream = noise.stream(f"data/sudoku/{split}")
    if split == "train":
        excluded = frozenset(row.puzzle for row in published)
        draw = partial(_draw, stream, train_grids, config.blanks, excluded)
        return Task("sudoku", split, f"generated from {len(train_grids)} grids", lambda index: example(index, draw(index)))
    if config.path is None:
        puzzles = first_distinct(partial(_draw, stream, test_grids, config.blanks, frozenset()), config.test_size, "held-out puzzles")
        description = f"generated, {len(puzzles)} puzzles on {len(test_grids)} held-out grids"
    else:
        puzzles = [row for row in published if row.solution in test_grids]
        seen = "seen in training (leaky)" if config.split == "published" else "held out"
        description = f"published {Path(config.path).name}, {len(puzzles)} puzzles, solution grids {seen}"
    return Task("sudoku", split, description, lambda index: example(index, puzzles[index]), len(puzzles))


def tokenizer(config: Config) -> PreTrainedTokenizerFast | None:
    """The digits 0 to 4 for the short style; None for the published one, which is text for the model's tokenizer."""
    return word_level(list("01234")) if config.style == "short" else None


@lru_cache(maxsize=1)
def grids() -> tuple[str, ...]:
    """All 288 solution grids in ascending order."""
    rows = ["".join(row) for row in permutations("1234")]
    bands = [a + b for a, b in product(rows, repeat=2) if not set(a[:2]) & set(b[:2])]
    return tuple(top + low for top, low in product(bands, repeat=2) if all(len(set((top + low)[column::4])) == 4 for column in range(4)))


def solve(puzzle: str) -> list[str]:
    """Every solution grid that agrees with the clues."""
    cells = np.frombuffer(puzzle.encode(), np.uint8)
    clues = cells != ord("0")
    return [grids()[row] for row in np.flatnonzero((_grid_cells()[:, clues] == cells[clues]).all(axis=1))]


def split_grids(config: Config, published: Sequence[Puzzle]) -> tuple[list[str], list[str]]:
    """The solution grids of training and of the test; they share none unless `config.split` is `published`."""
    in_file = {row.solution for row in published}
    if config.split == "published":
        return list(grids()), sorted(in_file)
    held = {grid for grid in grids() if held_out(grid, HELD_OUT_ONE_IN)}
    reserved = in_file if published and config.split == "by_grid" else held
    test = reserved & in_file if published else reserved
    train = [grid for grid in grids() if grid not in reserved]
    if not train or not test:
        what = "train on" if not train else "test"
        raise DataError(f"{config.path}: split {config.split} leaves no grid to {what}, choose another of {', '.join(SPLITS)}")
    return train, sorted(test)


def render(puzzle: Puzzle, answer: str, worked: Puzzle, style: str) -> tuple[Prompt, str]:
    """The prompt of a puzzle and the completion that gives `answer` (16 digits): the whole format of both styles."""
    if style == "short":
        return " ".join(puzzle.puzzle), " ".join(answer)
    prompt = INSTRUCTION.format(
        example_puzzle=worked.puzzle,
        example_puzzle_grid=_drawn(worked.puzzle),
        example_solution=worked.solution,
        example_solution_grid=_drawn(worked.solution),
        puzzle=puzzle.puzzle,
    )
    return [{"role": "user", "content": prompt}], f"<reasoning>\n{_drawn(answer)}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def read_puzzles(path: str) -> list[Puzzle]:
    """The puzzles of a CSV file with the columns Puzzle and Solution.

    Raises:
        DataError: the file is missing, or a row is not a puzzle with a solution of it.
    """
    puzzles = []
    with existing(path).open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            puzzle = Puzzle(row.get("Puzzle") or "", row.get("Solution") or "")
            well_formed = len(puzzle.puzzle) == 16 and set(puzzle.puzzle) <= set("01234") and "0" in puzzle.puzzle
            if not well_formed or puzzle.solution not in solve(puzzle.puzzle):
                raise DataError(f"{path}, row {number}: expected a 4x4 puzzle and its solution in columns Puzzle,Solution, got {row}")
            puzzles.append(puzzle)
    if not puzzles:
        raise DataError(f"{path}: no puzzles")
    return puzzles


@lru_cache(maxsize=1)
def _grid_cells() -> np.ndarray:
    """uint8 [288, 16], the characters of all grids."""
    return np.array([list(grid.encode()) for grid in grids()], dtype=np.uint8)


def _draw(stream: Stream, solutions: Sequence[str], blanks: int, excluded: frozenset[str], uid: int) -> Puzzle:
    def attempt(draw: int) -> Puzzle | None:
        solution = solutions[stream.integer(len(solutions), uid=uid, draw=draw)]
        empty = stream.subset(len(solution), blanks, uid=uid, draw=draw, quantity=1)
        puzzle = "".join("0" if hidden else digit for digit, hidden in zip(solution, empty, strict=True))
        return Puzzle(puzzle, solution) if puzzle not in excluded and len(solve(puzzle)) == 1 else None

    return first_accepted(attempt, f"puzzle with {blanks} blanks and one solution")


def _demonstration(stream: Stream, correct_fraction: float, index: int, puzzle: Puzzle) -> str:
    """The solution with probability `correct_fraction`, else each row's missing digits in a random order, never the solution."""
    if stream.uniform(1, uid=index)[0] < correct_fraction:
        return puzzle.solution
    order = np.argsort(stream.uniform(16, uid=index, draw=1), kind="stable")
    cells = list(puzzle.puzzle)
    for row in range(0, 16, 4):
        missing = [puzzle.solution[cell] for cell in order if row <= cell < row + 4 and puzzle.puzzle[cell] == "0"]
        cells[row : row + 4] = [missing.pop() if digit == "0" else digit for digit in cells[row : row + 4]]
    if "".join(cells) == puzzle.solution:
        blank = next(cell for cell in order if puzzle.puzzle[cell] == "0")
        cells[blank] = str(int(cells[blank]) % 4 + 1)
    return "".join(cells)


def _drawn(grid: str) -> str:
    """A grid as four lines of spaced digits."""
    return "\n".join(" ".join(grid[row : row + 4]) for row in range(0, 16, 4))
