"""Rewards: the published values, and the ways to name a grader."""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import load_grader
from rewards.countdown import MAX_CHARACTERS, evaluate

NUMBERS = {"numbers": [30, 100, 93], "target": 37}
PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
SUDOKU = {"puzzle": PUZZLE, "solution": SOLUTION}
WRONG = "".join("0" if clue == "0" else digit for clue, digit in zip(PUZZLE, SOLUTION, strict=True))


def tags(answer):
    return f"<reasoning>so</reasoning>\n<answer>\n{answer}\n</answer>"


def graded(reward, completion, row, **options):
    return load_grader({"name": reward, **options})("", completion, row)


@pytest.mark.parametrize(
    ("completion", "value", "status"),
    [
        ("30+100-93", 0.0, "unparsed"),  # no tags
        ("<answer>30+100-93", 0.0, "unparsed"),
        (tags("30+100-93"), 1.0, "ok"),
        (tags("(30 + 100) - 93"), 1.0, "ok"),
        (tags("-93+30+100"), 1.0, "ok"),
        (tags("1") + tags("100-93+30"), 1.0, "ok"),  # the last answer counts
        (tags("100-93+30") + tags("1"), 0.1, "ok"),
        (tags("30+100-92"), 0.1, "ok"),  # other numbers
        (tags("30+100"), 0.1, "ok"),
        (tags("30+100-93+30-30"), 0.1, "ok"),
        (tags("30-100+93"), 0.1, "ok"),  # value 23
        (tags("30+100-93 = 37"), 0.1, "unparsed"),  # not an expression
        (tags(""), 0.1, "unparsed"),
        (tags("__import__('os')"), 0.1, "unparsed"),
        (tags("30+100-93-"), 0.1, "ok"),
        (tags("30/(100-100)*93"), 0.1, "ok"),
        (tags("30**100**93"), 0.1, "ok"),  # must not be computed
        (tags("30//100+93"), 0.1, "ok"),
        (tags("+30+100-93"), 0.1, "ok"),
        (tags("(" * 5000 + "30+100-93" + ")" * 5000), 0.1, "ok"),
        (tags("-" * 100000 + "1"), 0.1, "ok"),
        (tags("9" * 5000), 0.1, "ok"),
    ],
)
def test_countdown_published_values(completion, value, status):
    result = graded("countdown", completion, NUMBERS)
    assert (result.value, result.status) == (value, status)


@pytest.mark.parametrize(
    ("completion", "value", "status"),
    [
        ("30 + 100 - 93", 1.0, "ok"),
        ("30 - 100 + 93", 0.1, "ok"),
        ("30 100 - 93", 0.1, "ok"),
        ("", 0.0, "unparsed"),
        ("+ - (", 0.0, "unparsed"),
        ("30 + 100 - 93 = 37", 0.0, "unparsed"),
    ],
)
def test_countdown_whole_completion(completion, value, status):
    result = graded("countdown", completion, NUMBERS, answer="whole")
    assert (result.value, result.status) == (value, status)


def test_countdown_division_is_exact():
    row = {"numbers": [1, 3, 3], "target": 1}
    assert graded("countdown", tags("1/3*3"), row).value == 1.0
    assert evaluate("8/(3-8/3)") == 24


LITERALS = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(LITERALS, lambda part: st.tuples(st.just("("), part, st.sampled_from("+-*/"), part, st.just(")")).map("".join))


@given(EXPRESSIONS)
def test_evaluate_agrees_with_python(expression):
    literals_as_fractions = re.sub("([0-9]+)", r"Fraction(\1)", expression)
    try:
        expected = eval(literals_as_fractions, {"Fraction": Fraction}) if len(expression) <= MAX_CHARACTERS else None
    except ZeroDivisionError:
        expected = None
    assert evaluate(expression) == expected


@pytest.mark.parametrize("text", ["", "1.5", "True", "abs(1)", "1 2", "2**3", "7//2", "7%2", "+1", "1,2", "x", "\0", "1 if 1 else 2"])
def test_evaluate_refuses_everything_else(text):
    assert evaluate(text) is None


@pytest.mark.parametrize(
    ("completion", "value", "status"),
    [
        (SOLUTION, 0.0, "unparsed"),
        (tags(SOLUTION), 1.0, "ok"),
        (tags(" ".join(SOLUTION)), 1.0, "ok"),
        (tags("\n".join(SOLUTION[row : row + 4] for row in range(0, 16, 4))), 1.0, "ok"),
        (tags(SOLUTION + "99"), 1.0, "ok"),  # cut to 16
        (tags(WRONG), 0.0, "ok"),
        (tags("9" + SOLUTION[1:]), 1.0, "ok"),  # clues are not counted
        (tags(SOLUTION[:8]), 0.5, "ok"),  # padded: 4 of the 8 empty cells come in the first 8
        (tags("no idea"), 0.0, "unparsed"),
        (tags(WRONG) + tags(SOLUTION), 1.0, "ok"),
    ],
)
def test_sudoku_published_values(completion, value, status):
    result = graded("sudoku", completion, SUDOKU)
    assert (result.value, result.status) == (value, status)


def test_sudoku_cell_fractions():
    cells, empty = list(SOLUTION), [cell for cell in range(16) if PUZZLE[cell] == "0"]
    for wrong, cell in enumerate(empty, start=1):
        cells[cell] = "9"
        assert graded("sudoku", " ".join(cells), SUDOKU, answer="whole").value == (8 - wrong) / 8


def test_sudoku_grid_accepts_every_solution_and_nothing_less():
    row = {"puzzle": "3040413004000304", "solution": "3241413224131324"}  # of the published test; it has a second solution
    other = "3241413214232314"
    assert graded("sudoku", tags(row["solution"]), row, grid=True).value == 1.0
    assert graded("sudoku", tags(other), row, grid=True).value == 1.0
    assert graded("sudoku", tags(other), row).value == 0.5  # the published rule counts the file's solution only
    assert graded("sudoku", tags("3241413224132314"), row, grid=True).value == 0.0
    assert graded("sudoku", tags("9" + SOLUTION[1:]), SUDOKU, grid=True).value == 0.0
    assert graded("sudoku", tags(SOLUTION[:15]), SUDOKU, grid=True).value == 0.0


@pytest.mark.parametrize(
    ("completion", "value", "status"),
    [("1 2 3", 1.0, "ok"), ("  1\n2  3 ", 1.0, "ok"), ("1 2", 0.0, "ok"), ("123", 0.0, "ok"), ("", 0.0, "unparsed")],
)
def test_exact_match(completion, value, status):
    result = graded("exact_match", completion, {"answer": "1 2 3"})
    assert (result.value, result.status) == (value, status)


@pytest.mark.parametrize(
    ("completion", "exact", "partial"),
    [
        (tags("1"), 1.0, 1.0),
        ("  " + tags("1") + "\n", 1.0, 1.0),
        ("so " + tags("1"), 0.0, 1.0),
        (tags("1") * 2, 0.0, 1.0),
        ("<reasoning>a</reasoning><answer>1", 0.0, 0.75),
        ("<answer>1</answer><reasoning>a</reasoning>", 0.0, 0.5),
        ("nothing", 0.0, 0.0),
    ],
)
def test_format_tags(completion, exact, partial):
    assert graded("format_tags", completion, {}).value == exact
    assert graded("format_tags", completion, {}, partial=True).value == partial
    assert graded("format_tags", "nothing", {}).status == "unparsed"


GRADERS = """
from rewards import column
from rlhub.types import RewardResult

def native(prompt, completion, row, scale=1.0):
    return scale * len(completion)

def result(prompt, completion, row):
    return RewardResult(0.5, detail=prompt)

def trl(completions, **columns):
    assert columns["prompts"] and columns["answer"] == ["x"]
    return [float(len(text)) for text in completions]

def trl_closed(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]

def trl_chat(prompts, completions, **columns):
    return [float(len(turns[-1]["content"])) for turns in completions]

def nothing(prompt, completion, row):
    return None

def infinite(prompt, completion, row):
    return float("inf")
"""


@pytest.fixture
def grader_file(tmp_path):
    path = tmp_path / "grader.py"
    path.write_text(GRADERS)
    return path


def test_functions_from_a_file(grader_file):
    def value(function, prompt="p", **options):
        return load_grader({"name": f"{grader_file}:{function}", **options})(prompt, "abc", {"answer": "x"}).value

    assert value("native") == 3.0
    assert value("native", scale=2.0) == 6.0
    assert value("result") == 0.5
    assert value("trl") == 3.0
    assert value("trl_closed") == 0.0
    assert value("trl_chat", prompt=[{"role": "user", "content": "p"}]) == 3.0


@pytest.mark.parametrize("function", ["nothing", "infinite"])
def test_a_value_that_is_no_number_is_rejected_and_not_a_zero(grader_file, function):
    result = load_grader({"name": f"{grader_file}:{function}"})("p", "abc", {})
    assert result.status == "rejected" and not result.valid and not math.isfinite(result.value)


def test_functions_and_modules_by_dotted_path(grader_file, monkeypatch):
    monkeypatch.syspath_prepend(str(grader_file.parent))
    assert load_grader({"name": "grader:native"})("p", "abc", {}).value == 3.0
    assert load_grader({"name": "rewards.exact_match"})("p", "x", {"answer": "x"}).value == 1.0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "has no name"),
        ({"name": "countdwn"}, "did you mean countdown"),
        ({"name": "countdown", "anser": "tags"}, "anser: unknown key of countdown; did you mean answer"),
        ({"name": "countdown", "answer": "all"}, "tags, whole, got 'all'"),
        ({"name": "sudoku", "grid": "perhaps"}, "perhaps"),
        ({"name": "nowhere.graders:f"}, "no module 'nowhere.graders'"),
        ({"name": "nowhere/grader.py:f"}, "file not found: nowhere/grader.py"),
        ({"name": "rewards.countdown:grad"}, "did you mean grade"),
        ({"name": "rewards.countdown:evaluate", "exact": 1}, "unknown option 'exact'"),
    ],
)
def test_bad_parts(part, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_grader(part)
    assert "\n" not in str(caught.value)


def test_missing_columns_and_bad_rows_raise():
    with pytest.raises(ValueError, match="column 'target', the task's rows have: numbers"):
        graded("countdown", "1", {"numbers": [1]})
    with pytest.raises(ValueError, match="empty cell"):
        graded("sudoku", tags(SOLUTION), {"puzzle": SOLUTION, "solution": SOLUTION})
