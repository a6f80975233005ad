"""Rewards that fail are loud: before training, in it, in `rlhub eval`, and when the grader is another one after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import rows, silent
from rich.console import Console

from rewards import load_grader
from rlhub.commands.main import main
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import Recipe
from rlhub.errors import RecipeError, UserError
from rlhub.training.run import train

pytestmark = pytest.mark.usefixtures("quick_report")

GRADERS = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def count():
    done = len(CALLS.read_text()) if CALLS.exists() else 0
    CALLS.write_text("x" * (done + 1))
    return done

def broken(prompt, completion, row):
    raise KeyError("no such thing")

def later_broken(prompt, completion, row):
    if count() >= 20:  # the four of the trial, and the evaluation before the first step
        raise ZeroDivisionError("the server is gone")
    return 1.0

def picky(prompt, completion, row):
    if completion[:1] in "56789":
        raise ZeroDivisionError(completion)
    return float(len(set(completion)))

def constant(prompt, completion, row):
    return 0.1
"""


@pytest.fixture
def graders(tmp_path: Path) -> Path:
    file = tmp_path / "graders.py"
    file.write_text(GRADERS)
    return file


def on(tiny: Callable[..., Recipe], file: Path, function: str, *overrides: str) -> Recipe:
    return tiny(
        f"run.output_dir={file.parent / 'runs'}",
        f"task.reward={{name: '{file}:{function}'}}",
        "run.phases=[online]",
        "run.steps=6",
        *overrides,
    )


def test_a_reward_that_grades_no_row_ends_the_run_before_anything_else(tiny, graders: Path) -> None:
    with pytest.raises(UserError, match=r"grades none of the first 4 train rows: crashed, KeyError: 'no such thing'"):
        train(on(tiny, graders, "broken"), silent())
    assert not (graders.parent / "runs" / "tiny" / "metrics.jsonl").exists() or rows(graders.parent / "runs" / "tiny") == []


def test_a_run_stops_after_steps_without_a_valid_grade(tiny, graders: Path) -> None:
    with pytest.raises(UserError, match=r"2 steps in a row without a valid grade .*: crashed, ZeroDivisionError: the server is gone"):
        train(on(tiny, graders, "later_broken", "reward_pool.failed_steps=2", "eval_temperatures=[0.0]"), silent())
    kept = [row for row in rows(graders.parent / "runs" / "tiny") if row["step"] > 0]
    assert [row["reward/status/crashed"] for row in kept] == [16]
    assert kept[0]["reward/first_failure"] == "crashed, ZeroDivisionError: the server is gone"


def test_failed_grades_are_counted_and_the_first_is_told(tiny, graders: Path) -> None:
    folder = train(on(tiny, graders, "picky", "run.steps=2"), silent())
    kept = [row for row in rows(folder) if row["step"] > 0]
    for row in kept:
        failed = row.get("reward/status/crashed", 0)
        assert failed == pytest.approx(16 * row["reward/invalid_share"])
        assert (failed > 0) == row.get("reward/first_failure", "").startswith("crashed, ZeroDivisionError")
    assert any("reward/first_failure" in row for row in kept)


def test_steps_without_any_signal_are_told_once(tiny, graders: Path) -> None:
    console = Console(record=True, force_terminal=False, width=300)
    train(on(tiny, graders, "constant", "run.steps=7", "run.eval_every=7"), console)
    assert console.export_text().count("5 steps in a row taught nothing: all completions of each prompt have the same reward") == 1


def test_another_grader_after_a_stop_is_refused(tiny, graders: Path) -> None:
    recipe = on(tiny, graders, "constant", "run.steps=2")
    folder = train(recipe, silent())
    shutil.rmtree(folder / "checkpoints" / "online_00002", ignore_errors=True)
    assert train(on(tiny, graders, "constant", "run.steps=2"), silent()) == folder
    graders.write_text(GRADERS + "\n# another one\n")
    with pytest.raises(RecipeError, match=r"graders\.py is not what it was since this run began"):
        train(on(tiny, graders, "constant", "run.steps=2"), silent())


def test_eval_has_no_accuracy_where_nothing_was_graded(tiny, graders: Path) -> None:
    folder = train(on(tiny, graders, "constant", "run.steps=1"), silent())
    found = CliRunner().invoke(main, ["eval", str(folder), f"task.reward.name={graders}:broken", "--json"])
    assert found.exit_code == 2 and "grades none of the first 4 test rows: crashed, KeyError" in found.output + (found.stderr or "")


def test_json_has_no_bare_nan(tiny, graders: Path) -> None:
    folder = train(on(tiny, graders, "picky", "run.steps=1"), silent())
    found = CliRunner().invoke(main, ["eval", str(folder), "--json"])
    assert found.exit_code == 0, found.output
    json.loads(found.stdout, parse_constant=pytest.fail)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_columns_that_a_reward_needs_are_checked_against_the_data(tmp_path: Path, command: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "countdown_small.yaml"
    found = CliRunner().invoke(main, [command, str(recipe), "task.reward={name: math_answer}", f"run.output_dir={tmp_path}"])
    assert found.exit_code == 2
    assert "needs the column 'answer', the task's rows have: " in found.output + (found.stderr or "")


def test_paths_in_a_recipe_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    (tmp_path / "mine.yaml").write_text("task: {name: jsonl, train: {path: rows.jsonl}, reward: {name: math_answer}}\n")
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "mine.yaml").task.train["path"] == str(tmp_path / "rows.jsonl")


OTHERS = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str.strip() == ground_truth), "source": data_source}

def batch(data_sources, solution_strs, ground_truths, extra_infos=None):
    return [{"score": float(text.strip() == gold)} for text, gold in zip(solution_strs, ground_truths)]

def short(solution_str, ground_truth):
    return float(solution_str == ground_truth)

def reward_func(queries, prompts, labels):
    return [float(query.removeprefix(prompt) == label) for query, prompt, label in zip(queries, prompts, labels)]

def with_keywords(queries, prompts, labels, **kwargs):
    return {"rewards": reward_func(queries, prompts, labels), "scores": [0.0] * len(queries)}

def trl(completions, answer, **kwargs):
    return [float(text == gold) for text, gold in zip(completions, answer)]

def two(completion, answer):
    return 1.0

def five(a, b, c, d, e):
    return 1.0

def swapped(completion, prompt, row):
    return 1.0

def gold_last(prompt, response, answer):
    return 1.0

def mine(prompt, completion, row):
    return float(completion == row["answer"])
"""


@pytest.mark.parametrize("function", ["compute_score", "batch", "short", "reward_func", "with_keywords", "trl", "mine"])
@pytest.mark.parametrize("gold", [{"answer": "4"}, {"answer": "4", "reward_model": {"ground_truth": "4"}, "data_source": "d"}])
def test_functions_of_other_libraries_are_called_by_their_parameters(tmp_path: Path, function: str, gold: dict) -> None:
    (tmp_path / "theirs.py").write_text(OTHERS)
    grader = load_grader({"name": f"{tmp_path / 'theirs.py'}:{function}"})
    assert [grader("p", completion, gold).value for completion in ("4", "5")] == [1.0, 0.0]


@pytest.mark.parametrize("function", ["two", "five", "swapped", "gold_last"])
def test_other_signatures_are_refused_with_those_that_fit(tmp_path: Path, function: str) -> None:
    (tmp_path / "theirs.py").write_text(OTHERS)
    with pytest.raises(RecipeError, match=r"takes \(.*\); write f\(prompt, completion, row, \*\*options\)"):
        load_grader({"name": f"{tmp_path / 'theirs.py'}:{function}"})


def test_a_part_whose_function_takes_other_arguments_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    pass\ndef loss(scores, credit):\n    return 0\n"
    )
    with pytest.raises(RecipeError, match=r"loss is called with \(scores, credit, config\), and takes \(scores, credit\)"):
        load_recipe(Path(__file__).parents[2] / "recipes" / "sort.yaml", [f"algorithm.objective.name={file}"])
