"""`rlhub reward test`: what it counts, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from data_files import DATA, needs_data

from rlhub.commands.main import main

ROWS = [
    {"prompt": "p", "completion": "A: 18", "answer": "18", "label": True},
    {"prompt": "p", "completion": "A: 17", "answer": "18", "label": 0},
    {"prompt": "p", "completion": "A: 17", "answer": "18", "label": "correct"},  # mislabelled: a false negative
    {"prompt": "p", "completion": "A: 18", "answer": "18", "label": "wrong"},  # and a false positive
    {"prompt": [{"role": "user", "content": "p"}], "completion": "", "answer": "18", "label": False},
    {"prompt": "p", "completion": "A: 18", "answer": "", "label": True},  # no gold answer: the grader raises
    {"prompt": "p", "completion": "A: 18", "answer": "18"},
    {"prompt": "p", "completion": "A: 18", "answer": "18", "label": None},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(main, ["reward", "test", *arguments])


def report(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_row_is_counted_once(tmp_path):
    found = report("math_answer", "--data", write(tmp_path / "rows.jsonl", ROWS))
    assert found["rows"] == len(ROWS) == sum(found["statuses"].values())
    assert found["statuses"] == {"ok": 6, "unparsed": 1, "timeout": 0, "crashed": 1, "rejected": 0}
    assert found["confusion"] == {"true_positive": 1, "false_positive": 1, "true_negative": 2, "false_negative": 1, "failed": 1}
    assert found["counts"] == {"right": 4, "graded": 7, "labelled": 6}
    assert found["agreement"] == pytest.approx(3 / 6) and found["mean"] == pytest.approx(4 / 7)
    assert [entry["row"] for entry in found["disagreements"]] == [3, 4, 6]
    assert found["disagreements"][0]["gold"] == "18" and "17" in found["disagreements"][0]["detail"]
    assert found["disagreements"][2]["value"] is None
    assert found["seconds_per_item"] > 0


def test_without_labels_there_is_no_confusion(tmp_path):
    found = report("math_answer", "--data", write(tmp_path / "rows.jsonl", ROWS[-2:]))
    assert found["confusion"] is found["agreement"] is None and found["disagreements"] == []


def test_columns_are_renamed_and_options_reach_the_grader(tmp_path):
    rows = [{"q": "p", "output": "a B", "gold": "b", "is_correct": True}]
    path = write(tmp_path / "rows.jsonl", rows)
    mapping = "prompt=q,completion=output,label=is_correct,answer=gold"
    assert report("contains", "ignore_case=true", "--data", path, "--columns", mapping)["agreement"] == 1.0
    assert report("contains", "--data", path, "--columns", mapping)["agreement"] == 0.0


def test_own_functions(tmp_path):
    (tmp_path / "own.py").write_text(
        "def brevity(prompt, completion, row, limit=10):\n    return float(len(completion) < limit)\n"
        "def trl(completions, answer, **columns):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    path = write(tmp_path / "rows.jsonl", ROWS[:2])
    assert report(f"{tmp_path}/own.py:brevity", "limit=3", "--data", path)["mean"] == 0.0
    assert report(f"{tmp_path}/own.py:trl", "--data", path)["mean"] == 0.5


BROKEN = """
import os, signal, time

def broken(prompt, completion, row):
    if completion == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            time.sleep(0.01)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0 / len(completion)
"""


def test_a_grader_that_hangs_or_crashes_costs_its_row_only(tmp_path):
    (tmp_path / "own.py").write_text(BROKEN)
    texts = ["a", "hang", "die", "", *"bcde"]
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": text, "label": True} for text in texts])
    found = report(f"{tmp_path}/own.py:broken", "--data", path, "--deadline", "0.3", "--processes", "2")
    assert found["statuses"] == {"ok": 5, "unparsed": 0, "timeout": 1, "crashed": 2, "rejected": 0}
    assert found["confusion"]["true_positive"] == 5 and found["confusion"]["failed"] == 3
    assert [entry["row"] for entry in found["disagreements"]] == [2, 3, 4]
    assert "0.3 s" in found["disagreements"][0]["detail"] and "SIGSEGV" in found["disagreements"][1]["detail"]
    assert found["first_failure"] == {key: found["disagreements"][0][key] for key in ("row", "status", "detail")}
    assert found["seconds_per_item"] >= 0.3 / len(texts), "the time lost to the hanging row is in it"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_when_no_row_can_be_graded_the_first_reason_is_shown(tmp_path, arguments):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "A: 18", "gold": "18"}] * 2)
    result = run("math_answer", "--data", path, *arguments)
    assert result.exit_code == 1
    assert "none of 2 rows" in result.stderr and "row 1" in result.stderr and "needs the column 'answer'" in result.stderr
    if arguments:
        assert json.loads(result.stdout)["statuses"]["crashed"] == 2


def test_the_table_has_all_of_it(tmp_path):
    result = CliRunner().invoke(
        main, ["reward", "test", "math_answer", "--data", write(tmp_path / "rows.jsonl", ROWS), "--show", "1"], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0
    for text in ("status crashed", "50.00 %", "label right", "disagreements, 1 of 3", "time per item", "cannot be read"):
        assert text in result.stdout


GOOD = json.dumps(ROWS[0]) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "arguments", "words"),
    [
        ("math_answer", None, [], ["not found"]),
        ("math_anser", GOOD, [], ["rewards has no 'math_anser'", "did you mean math_answer"]),
        ("math_answer", GOOD, ["no=1"], ["no: unknown key of math_answer"]),
        ("math_answer", GOOD, ["loud"], ["KEY=VALUE", "'loud'"]),
        ("nowhere.py:f", GOOD, [], ["nowhere.py"]),
        ("math_answer", GOOD + "{", [], ["row 2", "not JSON"]),
        ("math_answer", GOOD + "[1]", [], ["row 2", "object"]),
        ("math_answer", GOOD + '{"prompt": "p"}', [], ["row 2", "'completion'"]),
        ("math_answer", '{"prompt": "p", "completion": 3}', [], ["row 1", "text"]),
        ("math_answer", '{"prompt": 3, "completion": "3"}', [], ["row 1", "prompt"]),
        ("math_answer", '{"prompt": "p", "completion": "3", "label": "maybe"}', [], ["row 1", "'maybe'"]),
        ("math_answer", GOOD, ["--columns", "completion"], ["--columns", "NAME=FIELD"]),
        ("math_answer", GOOD, ["--columns", "completion=output"], ["row 1", "'output'"]),
        ("math_answer", "\n", [], ["no rows"]),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(tmp_path, name, content, arguments, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    result = run(name, "--data", str(path), *arguments, "--json")
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


@needs_data("gsm8k")
def test_the_official_labels_of_gsm8k():
    found = report("math_answer", "--data", str(DATA / "gsm8k" / "model_solutions_labelled.jsonl"))
    assert found["rows"] == sum(found["statuses"].values()) == sum(found["confusion"].values())
    assert found["agreement"] >= 0.99
    assert len(found["disagreements"]) == round((1 - found["agreement"]) * found["rows"])


def test_help_stays_light():
    code = (
        "import sys; from rlhub.commands.main import main\n"
        "try: main(['reward', 'test', '--help'])\n"
        "finally: print('loaded:', {'torch', 'sympy', 'omegaconf', 'jsonschema', 'rich.table'} & set(sys.modules))"
    )
    assert "loaded: set()" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
