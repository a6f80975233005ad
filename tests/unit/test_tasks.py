"""Tasks: training and test problems never meet, examples are pure functions of their keys, bad input is named."""

import json
from collections import Counter
from itertools import permutations, product

import pytest
from data_files import DATA, needs_data
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import load_grader
from rewards.countdown import evaluate
from rlhub.errors import DataError
from rlhub.tasks import countdown, first_accepted, held_out, load_task, sort, sudoku

COUNTDOWN = DATA / "countdown" / "cd3_test.jsonl"
SUDOKU = DATA / "sudoku" / "4x4_test.csv"
GSM8K = DATA / "gsm8k" / "test.jsonl"

SMALL = [
    ("sort", {"test_size": 64}),
    ("countdown", {"test_size": 16}),
    ("countdown", {"style": "short", "max_number": 20, "correct_fraction": 0.5, "test_size": 16}),
    ("sudoku", {"test_size": 64}),
    ("sudoku", {"style": "short", "blanks": 6, "correct_fraction": 0.5, "test_size": 64}),
]


def rows(task, count):
    return [task.example(index) for index in range(count)]


def accuracy(task, reward, count=200):
    grade = load_grader(reward)
    return sum(grade(row.prompt, row.demonstration, row.columns).value == 1.0 for row in rows(task, count)) / count


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return write


# Every task


@pytest.mark.parametrize(("name", "config"), SMALL)
@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_pure_functions_of_seed_split_and_index(name, config, split):
    one, two, other = (load_task(name, config, split, seed) for seed in (0, 0, 1))
    forward = rows(one, 16)
    assert [two.example(index) for index in reversed(range(16))] == forward[::-1]
    assert rows(other, 16) != forward
    assert [row.row for row in forward] == list(range(16))


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_test_splits_are_finite_and_distinct(name, config):
    task = load_task(name, config, "test", seed=0)
    prompts = [json.dumps(row.prompt) for row in rows(task, task.size)]
    assert len(set(prompts)) == task.size == config["test_size"]
    assert str(task.size) in task.description and "held-out" in task.description
    assert task.fingerprint() == load_task(name, config, "test", seed=0).fingerprint()
    with pytest.raises(IndexError):
        task.example(task.size)


def test_fingerprint_follows_prompts_and_columns():
    prints = {load_task("sort", {"test_size": 8, "digits": digits}, "test", seed).fingerprint() for digits in (6, 8) for seed in (0, 1)}
    assert len(prints) == 4 and all(len(text) == 64 for text in prints)
    demonstrations = {load_task("sort", {"test_size": 8, "correct_fraction": q}, "test", 0).fingerprint() for q in (0.0, 1.0)}
    assert len(demonstrations) == 1


def test_unknown_names_and_options():
    with pytest.raises(DataError, match="tasks has no 'sorted'; did you mean sort"):
        load_task("sorted", {}, "train", 0)
    with pytest.raises(DataError, match=r"no module 'nowhere\.task'"):
        load_task("nowhere.task", {}, "train", 0)
    with pytest.raises(DataError, match="digit: unknown key of sort; did you mean digits"):
        load_task("sort", {"digit": 8}, "train", 0)
    with pytest.raises(DataError, match="split must be train or test, got 'eval'"):
        load_task("sort", {}, "eval", 0)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("sort", {"digits": "many"}, "many"),
        ("sort", {"digits": 0}, "digits must be at least 1, got 0"),
        ("sort", {"correct_fraction": 1.5}, "correct_fraction must be in .0, 1., got 1.5"),
        ("countdown", {"style": "long"}, "published, short, got 'long'"),
        ("countdown", {"operators": "+^"}, "operators"),
        ("sudoku", {"split": "random"}, "by_grid_subset, published, got 'random'"),
        ("sudoku", {"split": "published"}, "needs path"),
        ("sudoku", {"blanks": 13}, "blanks must be in 1..12, got 13"),
        ("jsonl", {}, "path is missing"),
    ],
)
def test_bad_values_are_one_line(name, config, message):
    with pytest.raises(DataError, match=message) as caught:
        load_task(name, config, "train", 0)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_impossible_problems_end():
    with pytest.raises(DataError, match="lower test_size"):
        load_task("sort", {"digits": 2, "test_size": 40}, "test", 0)
    with pytest.raises(DataError, match="found no wrong expression"):
        load_task("countdown", {"operators": "+", "correct_fraction": 0.0}, "train", 0).example(0)
    with pytest.raises(DataError, match="found no number in 10000 draws"):
        first_accepted(lambda attempt: None, "number")


def test_a_task_module_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "word_tasks").mkdir()
    (tmp_path / "word_tasks" / "word.py").write_text(
        "from dataclasses import dataclass\n"
        "from rlhub.tasks import Task\n"
        "from rlhub.types import Example\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    word: str = 'a'\n"
        "def build(config, split, seed):\n"
        "    return Task('word', split, 'one row', lambda index: Example(index, config.word, {}), 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_task("word_tasks.word", {"word": "b"}, "test", 0).example(0).prompt == "b"


# Sort


def test_sort_multisets_are_disjoint():
    train = {row.columns["answer"] for row in rows(load_task("sort", {}, "train", 0), 8_000)}
    test = {row.columns["answer"] for row in rows(load_task("sort", {}, "test", 1), 512)}
    assert not train & test and len(train) > 5_000


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_sort_holds_out_whole_multisets(digits, random):
    shuffled = random.sample(digits, len(digits))
    assert sort.is_held_out(tuple(digits)) == sort.is_held_out(tuple(shuffled))


def test_sort_demonstrations():
    task = load_task("sort", {}, "train", 0)
    assert accuracy(task, {"name": "exact_match"}, 2000) == pytest.approx(0.3, abs=0.04)
    for row in rows(task, 200):
        assert Counter(row.demonstration.split()) == Counter(row.prompt.split())
    assert accuracy(load_task("sort", {"correct_fraction": 1.0}, "train", 0), {"name": "exact_match"}) == 1.0


# Countdown


def countdown_problems(task, count):
    return [countdown.Problem(tuple(row.columns["numbers"]), row.columns["target"]) for row in rows(task, count)]


@pytest.mark.parametrize("style", ["published", "short"])
def test_generated_countdown_problems_are_disjoint(style):
    config = {"style": style, "max_number": 10, "test_size": 30}
    train = {countdown.identity(problem, style) for problem in countdown_problems(load_task("countdown", config, "train", 0), 2000)}
    test = {countdown.identity(problem, style) for problem in countdown_problems(load_task("countdown", config, "test", 1), 30)}
    assert not train & test
    assert not any(held_out(problem, countdown.HELD_OUT_ONE_IN) for problem in train)


@pytest.mark.parametrize(("style", "answer"), [("published", "tags"), ("short", "whole")])
def test_countdown_demonstrations(style, answer):
    reward = {"name": "countdown", "answer": answer}
    right = load_task("countdown", {"style": style}, "train", 0)
    assert accuracy(right, reward) == 1.0
    mixed = load_task("countdown", {"style": style, "correct_fraction": 0.3, "max_number": 20}, "train", 0)
    assert accuracy(mixed, reward, 400) == pytest.approx(0.3, abs=0.08)
    grade = load_grader(reward)
    for row in rows(mixed, 200):
        result = grade("", row.demonstration, row.columns)
        assert result.value == 1.0 or result.detail.startswith("value ")  # well-formed over the same numbers
        assert 1 <= row.columns["target"] <= 100 and all(1 <= number <= 20 for number in row.columns["numbers"])


def test_countdown_operators_and_numbers():
    task = load_task("countdown", {"style": "short", "operators": "+-", "numbers": 4, "max_number": 9}, "train", 0)
    for row in rows(task, 50):
        assert len(row.demonstration.split()) == 7 and set(row.demonstration) <= set("0123456789+- ")


def test_countdown_worked_example_is_not_a_test_problem():
    assert "[2, 3, 4] reach 5 with 2*4-3" in countdown.INSTRUCTION and evaluate("2*4-3") == 5
    assert not held_out(countdown.identity(countdown.Problem((2, 3, 4), 5), "published"), countdown.HELD_OUT_ONE_IN)


@needs_data("countdown")
def test_published_countdown_problems():
    task = load_task("countdown", {"path": str(COUNTDOWN)}, "test", 0)
    assert task.description == "published cd3_test.jsonl, 256 problems"
    problems = countdown_problems(task, task.size)
    assert problems[0] == ((30, 100, 93), 23, None)
    assert len({countdown.identity(problem, "published") for problem in problems}) == 256
    assert ((2, 3, 4), 5) not in {(tuple(sorted(problem.numbers)), problem.target) for problem in problems}
    assert all(any(value == problem.target for value in reachable(problem.numbers)) for problem in problems[:20])


def reachable(numbers):
    for a, b, c in permutations(numbers):
        for first, second in product("+-*/", repeat=2):
            yield evaluate(f"({a}{first}{b}){second}{c}")
            yield evaluate(f"{a}{first}({b}{second}{c})")


@needs_data("countdown")
@pytest.mark.parametrize("style", ["published", "short"])
def test_training_avoids_the_published_countdown_problems(style):
    config = {"path": str(COUNTDOWN), "style": style}
    test = countdown_problems(load_task("countdown", config, "test", 0), 256)
    train = countdown_problems(load_task("countdown", config, "train", 0), 1000)
    identities = {countdown.identity(problem, style) for problem in test}
    assert not identities & {countdown.identity(problem, style) for problem in train}
    belongs = countdown._membership(countdown.Config(**config), test, "train")
    reordered = [problem._replace(numbers=problem.numbers[::-1]) for problem in test]
    assert not any(map(belongs, [*test, *reordered]))


@pytest.mark.parametrize("line", ['{"input": "1,x", "output": "3"}', '{"input": "1,2"}', '{"input": "1,2", "output": "y"}'])
def test_malformed_countdown_rows_are_named(jsonl, line):
    path = jsonl('{"input": "1,2", "output": "3"}', line)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: expected"):
        load_task("countdown", {"path": path}, "test", 0)


# Sudoku


def solutions(task, count):
    return {row.columns["solution"] for row in rows(task, count)}


def test_all_288_grids():
    assert len(set(sudoku.grids())) == 288
    for grid in sudoku.grids():
        units = [grid[row : row + 4] for row in (0, 4, 8, 12)] + [grid[column::4] for column in range(4)]
        units += [grid[corner : corner + 2] + grid[corner + 4 : corner + 6] for corner in (0, 2, 8, 10)]
        assert all(set(unit) == set("1234") for unit in units)


@pytest.mark.parametrize("blanks", [4, 8, 11])
def test_generated_sudoku_grids_are_disjoint(blanks):
    config = {"blanks": blanks, "test_size": 200}
    train, test = (load_task("sudoku", config, split, 0) for split in ("train", "test"))
    assert not solutions(train, 1000) & solutions(test, 200)
    for row in rows(test, 50) + rows(train, 50):
        assert row.columns["puzzle"].count("0") == blanks
        assert sudoku.solve(row.columns["puzzle"]) == [row.columns["solution"]]


def test_every_grid_is_on_one_side_and_the_worked_example_is_a_training_grid():
    train, test = sudoku.split_grids(sudoku.Config(), [])
    assert not set(train) & set(test) and len(train) + len(test) == 288 and len(test) > 40
    prompt = load_task("sudoku", {}, "test", 0).example(0).prompt[0]["content"]
    assert not any(grid in prompt for grid in test)
    assert sum(grid in prompt for grid in train) == 1


@pytest.mark.parametrize(("style", "answer"), [("published", "tags"), ("short", "whole")])
@pytest.mark.parametrize("blanks", [1, 8])
def test_sudoku_demonstrations(style, answer, blanks):
    config = {"style": style, "correct_fraction": 0.3, "blanks": blanks}
    task = load_task("sudoku", config, "train", 0)
    assert accuracy(task, {"name": "sudoku", "answer": answer, "grid": True}, 500) == pytest.approx(0.3, abs=0.08)
    assert accuracy(task, {"name": "sudoku", "answer": answer}, 500) == pytest.approx(0.3, abs=0.08)
    assert accuracy(load_task("sudoku", {"style": style}, "train", 0), {"name": "sudoku", "answer": answer}) == 1.0


@needs_data("sudoku")
def test_published_sudoku_puzzles_and_their_leak():
    puzzles = sudoku.read_puzzles(str(SUDOKU))
    assert len(puzzles) == len({row.puzzle for row in puzzles}) == 500
    assert all(row.puzzle.count("0") == 8 for row in puzzles)
    assert len({row.solution for row in puzzles}) == 229  # of 288: why training on all grids has seen the answers
    assert Counter(len(sudoku.solve(row.puzzle)) for row in puzzles) == {1: 376, 2: 115, 3: 8, 4: 1}


@needs_data("sudoku")
@pytest.mark.parametrize(
    ("split", "num_train", "num_test", "size"), [("by_grid", 59, 229, 500), ("by_grid_subset", 233, 45, 96), ("published", 288, 229, 500)]
)
def test_published_sudoku_splits(split, num_train, num_test, size):
    config = {"path": str(SUDOKU), "split": split, "style": "short"}
    train, test = (load_task("sudoku", config, side, 0) for side in ("train", "test"))
    train_grids, test_grids = sudoku.split_grids(sudoku.Config(**config), sudoku.read_puzzles(str(SUDOKU)))
    assert (len(train_grids), len(test_grids), test.size) == (num_train, num_test, size)
    assert solutions(train, 1000) <= set(train_grids) and solutions(test, size) == set(test_grids)
    shared = set(train_grids) & set(test_grids)
    assert ("leaky" in test.description) == bool(shared) == (split == "published")
    assert not {row.columns["puzzle"] for row in rows(train, 1000)} & {row.columns["puzzle"] for row in rows(test, size)}
    prompt = load_task("sudoku", {**config, "style": "published"}, "test", 0).example(0).prompt[0]["content"]
    assert not any(grid in prompt for grid in test_grids)


def test_malformed_sudoku_rows_are_named(tmp_path):
    path = tmp_path / "puzzles.csv"
    path.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n3102200002100320,1142243142131324\n")
    with pytest.raises(DataError, match=r"puzzles\.csv, row 2: expected"):
        load_task("sudoku", {"path": str(path)}, "test", 0)
    with pytest.raises(DataError, match="not found"):
        load_task("sudoku", {"path": str(tmp_path / "none.csv")}, "test", 0)


# Files


def test_jsonl_keeps_the_order_of_a_test_file_and_shuffles_training_epochs(jsonl):
    path = jsonl(*(json.dumps({"prompt": f"p{row}", "answer": row}) for row in range(20)))
    test, train, again = (load_task("jsonl", {"path": path}, split, 0) for split in ("test", "train", "train"))
    assert [row.prompt for row in rows(test, 20)] == [f"p{row}" for row in range(20)]
    assert test.description == "rows.jsonl, 20 rows" and test.example(3).columns == {"prompt": "p3", "answer": 3}
    epochs = [[train.example(epoch * 20 + place).row for place in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert [again.example(index).row for index in range(59, -1, -1)] == [row for epoch in epochs for row in epoch][::-1]
    assert train.size == 20
    with pytest.raises(IndexError):
        test.example(20)


def test_jsonl_fields_templates_chats_and_limits(jsonl):
    path = jsonl(*(json.dumps({"q": f"q{row}", "a": f"a{row}", "prompt": [{"role": "user", "content": "hi"}]}) for row in range(5)), "")
    plain = load_task("jsonl", {"path": path, "prompt": "q", "completion": "a", "limit": 2}, "test", 0)
    assert plain.size == 2 and (plain.example(1).prompt, plain.example(1).demonstration) == ("q1", "a1")
    chat = load_task("jsonl", {"path": path, "template": "{q}\nUse \\boxed{{}}.", "chat": True}, "test", 0)
    assert chat.example(0).prompt == [{"role": "user", "content": "q0\nUse \\boxed{}."}]
    assert load_task("jsonl", {"path": path}, "test", 0).example(4).prompt == [{"role": "user", "content": "hi"}]


def test_parquet(tmp_path):
    from datasets import Dataset

    path = str(tmp_path / "rows.parquet")
    Dataset.from_list([{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 2}]).to_parquet(path)
    task = load_task("jsonl", {"path": path}, "test", 0)
    assert [row.prompt for row in rows(task, task.size)] == ["p", "q"] and task.example(1).columns["answer"] == 2


@pytest.mark.parametrize(
    ("lines", "config", "message"),
    [
        (['{"prompt": "p"}', "{broken"], {}, "row 2: not JSON"),
        (['{"prompt": "p"}', "", "[1]"], {}, "row 3: expected a JSON object, got list"),
        (['{"prompt": "p"}', '{"prompt": "  "}'], {}, "row 2: empty prompt"),
        (['{"prompt": []}'], {}, "row 1: empty prompt"),
        (['{"prompt": null}'], {}, "row 1: empty prompt"),
        (['{"prompt": 7}'], {}, "row 1: the prompt must be text or chat messages, got int"),
        (['{"question": "p", "answer": 1}'], {}, "row 1: no field 'prompt'; the row has: question, answer"),
        (['{"prompt": "p"}'], {"completion": "answer"}, "row 1: no field 'answer'"),
        (['{"prompt": "p"}'], {"template": "{question}"}, "row 1: the template needs a field 'question'"),
        (['{"prompt": "p"}'], {"template": "{prompt"}, "template .* is malformed"),
        ([], {}, "no rows"),
    ],
)
def test_malformed_files_are_named(jsonl, lines, config, message):
    with pytest.raises(DataError, match=message) as caught:
        load_task("jsonl", {"path": jsonl(*lines), **config}, "train", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(DataError, match=rf"data file not found: .*{name}; correct the task's path"):
        load_task("jsonl", {"path": str(tmp_path / name)}, "train", 0)


@needs_data("gsm8k")
def test_gsm8k_as_a_file():
    task = load_task("jsonl", {"path": str(GSM8K), "prompt": "question", "completion": "answer"}, "test", 0)
    assert task.size == 1319 and "####" in task.example(0).demonstration
