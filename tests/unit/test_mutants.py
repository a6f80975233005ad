"""The mutation tool: what counts as another program, where a change lies, and samples that repeat themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutation.mutants import ROOT, changed_lines, function_at, functions, guards, is_another_program, sample

SOURCE = """
LIMIT = 3

class Row:
    width: int | None = 4

    @property
    def area(self) -> int | float:
        def inner(x):
            return x + 1

        return sum(inner(one) * other for one, other in zip([self.width], [2], strict=True))
"""


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("int | None", "int & None", False),
        ("int | float", "int ^ float", False),
        ("LIMIT = 3", "LIMIT = 4", True),
        ("x + 1", "x - 1", True),
        ("@property", "", True),
        ("strict=True", "strict=False", False),
        ("return x + 1", "return x +", False),
        ("return x + 1", "return x is 1", False),
    ],
)
def test_types_assertions_and_broken_syntax_are_no_mutants(old: str, new: str, counts: bool) -> None:
    assert is_another_program(SOURCE.replace(old, new), SOURCE) == counts


def test_a_change_is_named_by_its_function_and_lines() -> None:
    spans = functions(SOURCE)
    names = [function_at(spans, number) for number in range(1, SOURCE.count("\n") + 1)]
    assert names == ["", "", "", "", "", "", "Row.area", "Row.area", "Row.area.inner", "Row.area.inner", "Row.area", "Row.area"]
    assert changed_lines(SOURCE, SOURCE.replace("x + 1", "x - 1")) == ("return x + 1", "return x - 1")
    assert changed_lines("a\nb\nb\nc", "a\nb\nc") == ("b", "")


def test_samples_repeat_themselves_and_take_each_place_once() -> None:
    files = [ROOT / "workers/sync.py", ROOT / "rlhub/algorithm/schedule.py"]
    one, again, other = ([mutant.key for mutant in sample(files, 12, seed)] for seed in (0, 0, 1))
    assert one == again and one != other and len(set(one)) == 12
    assert all(mutant.before != mutant.after and ast.parse(mutant.code) for mutant in sample(files, 12, 0))


def test_lines_added_elsewhere_leave_the_sample_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutation.mutants.ROOT", tmp_path)
    file, code = tmp_path / "schedule.py", (ROOT / "rlhub/algorithm/schedule.py").read_text()
    samples = []
    first_function = "def learning_rate_factor"
    assert first_function in code
    for text in (code, code + "\n\ndef later(x):\n    return x + 1\n", code.replace(first_function, f"EARLIER = 3\n\n\n{first_function}")):
        file.write_text(text)
        samples.append({mutant.key for mutant in sample([file], 1000, 0)})
    first, *others = samples
    assert all(first < other and len(other) > len(first) for other in others)


def test_mutants_meet_the_tests_that_run_their_function_cheapest_file_first() -> None:
    (mutant,) = [one for one in sample([ROOT / "rlhub/algorithm/schedule.py"], 400, 0) if one.function][:1]
    own, module = f"{mutant.file}::{mutant.function}", f"{mutant.file}::"
    tests = {
        "slow.py::a": {"seconds": 50.0, "runs": [own, module]},
        "quick.py::b": {"seconds": 2.0, "runs": [own]},
        "quick.py::c": {"seconds": 1.0, "runs": [own]},
        "other.py::d": {"seconds": 0.1, "runs": [module]},
        "late.py::e": {"seconds": 80.0, "runs": [own]},
    }
    assert guards(mutant, tests) == (["quick.py::c", "quick.py::b", "slow.py::a"], 53.0), "within the budget"
    assert guards(mutant, {"other.py::d": tests["other.py::d"]})[0] == ["other.py::d"], "else those of its file"
    assert guards(mutant, {}) == ([], 0.0)
