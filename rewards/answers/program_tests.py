"""The forms in which published data write the tests of a program, read into two: pairs of input and output, and statements.

| column | form |
|---|---|
| `test`, `entry_point` | source of `check(candidate)`: HumanEval |
| `test_list`, `test_cases`, or `tests` with texts | assert statements: MBPP, AceCode |
| `tests`, `input_output` | `[{input, output}]`, `[[input, output]]`, `{"inputs", "outputs"}`, with `fn_name` of calls: APPS, TACO |

Each may be JSON text. Inputs and outputs that are lists are lines, numbers their digits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.answers.programs import called_names

COLUMNS = ("tests", "input_output", "test_list", "test_cases", "test")
_SAME = (
    "def _same(got, wanted):\n"
    "    got = list(got) if isinstance(got, tuple) else got\n"
    "    if isinstance(got, float) or isinstance(wanted, float):\n"
    "        return abs(got - wanted) <= {tolerance} * max(1.0, abs(wanted))\n"
    "    return got == wanted or (isinstance(wanted, list) and len(wanted) == 1 and got == wanted[0])\n"
)
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Tests:
    """`names` are what the tests call of the program. Of the three lists one is not empty; `check` is HumanEval's source."""

    names: list[str] = field(default_factory=list)
    check: str = ""
    statements: list[str] = field(default_factory=list)
    setup: str = ""
    reference: str = ""
    examples: list[tuple[str, str]] = field(default_factory=list)


def read_tests(row: Mapping[str, Any], program: str = "", tolerance: float = 1e-6) -> Tests:
    """The tests of a row.

    Args:
        program: decides whether calls by name are those of a class `Solution`.
        tolerance: relative, of numbers that calls by name return.

    Raises:
        ValueError: there are none, or not in a form that is known.
    """
    name = next((name for name in COLUMNS if row.get(name) is not None), None)
    if name is None:
        given = ", ".join(map(str, row)) or "none"
        raise ValueError(f"code_tests needs a column test, test_list, test_cases, tests or input_output; the task's rows have: {given}")
    value = _from_json(row[name], name)
    if name == "test":
        if not row.get("entry_point"):
            raise ValueError("the column 'test' needs a column 'entry_point' with the name of the function")
        return Tests(names=[str(row["entry_point"])], check=str(value))
    if isinstance(value, Mapping) and not {"inputs", "outputs"} - value.keys():
        return _of_inputs(value, row, program, tolerance)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"the column {name!r} must be a list of tests, or {{inputs, outputs}}, got {_shown(value)}")
    if not value:
        raise ValueError(f"the row's column {name} is empty")
    if all(isinstance(test, str) for test in value):
        setup = "\n".join([*(row.get("test_imports") or ()), row.get("test_setup_code") or ""])
        return Tests(called_names([*value, setup]), statements=list(value), setup=setup, reference=row.get("code") or "")
    return Tests(examples=[_pair(test, name) for test in value])


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str) or name == "test":
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"the column {name!r} is text that is no JSON: {error}") from None


def _of_inputs(value: Mapping[str, Any], row: Mapping[str, Any], program: str, tolerance: float) -> Tests:
    """APPS and TACO: standard input and output, or with `fn_name` the arguments and the value of calls."""
    inputs, outputs = value["inputs"], value["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"'inputs' and 'outputs' must be lists of one length, got {_shown(inputs)} and {_shown(outputs)}")
    function = value.get("fn_name") or row.get("fn_name")
    if not function:
        return Tests(examples=[(_lines(one, "input"), _lines(other, "output")) for one, other in zip(inputs, outputs, strict=True)])
    owner = "Solution" if re.search(r"^class Solution\b", program, re.MULTILINE) else None
    call = f"Solution().{function}" if owner else str(function)
    statements = [
        f"assert _same({call}({', '.join(map(repr, one if isinstance(one, list) else [one]))}), {other!r})"
        for one, other in zip(inputs, outputs, strict=True)
    ]
    return Tests([owner or str(function)], statements=statements, setup=_SAME.format(tolerance=tolerance))


def _pair(test: Any, name: str) -> tuple[str, str]:
    if isinstance(test, Mapping):
        keys = next(
            (keys for keys in (("input", "output"), ("stdin", "stdout"), ("input", "expected_output")) if not set(keys) - test.keys()), None
        )
        if keys:
            return _lines(test[keys[0]], "input"), _lines(test[keys[1]], "output")
    elif isinstance(test, list | tuple) and len(test) == 2:
        return _lines(test[0], "input"), _lines(test[1], "output")
    raise ValueError(f"a test of the column {name!r} must be {{input, output}}, [input, output] or an assert statement, got {_shown(test)}")


def _lines(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(line, str | int | float) for line in value):
        return "\n".join(map(str, value))
    raise ValueError(f"the {what} of a test must be text, a number or a list of lines, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


def same_output(got: str, wanted: str, tolerance: float) -> bool:
    """Whether two outputs are equal up to white space at the ends of lines, or word by word with numbers within a relative tolerance.

    A number may differ only where the wanted one is written with a point or an exponent: 3 is not 3.0000001, nor is any other integer.
    """
    left, right = ([line.rstrip() for line in text.strip("\n").rstrip().splitlines()] for text in (got, wanted))
    if left == right:
        return True
    words = [(a.split(), b.split()) for a, b in zip(left, right, strict=False)]
    return len(left) == len(right) and all(len(a) == len(b) and all(map(_same_word, a, b, [tolerance] * len(a))) for a, b in words)


def _same_word(got: str, wanted: str, tolerance: float) -> bool:
    if got == wanted:
        return True
    if not _FLOAT.fullmatch(wanted):
        return False
    try:
        number = float(got)
    except ValueError:
        return False
    return math.isfinite(number) and abs(number - float(wanted)) <= tolerance * max(1.0, abs(float(wanted)))
