"""The forms in which published data write the tests of a program, read into two: pairs of input and output, and statements.

| column | form |
|---|---|
| `test`, `entry_point` | source of `check(candidate)`: HumanEval |
| `test_list`, `test_cases`, or `tests` with texts | assert statements, as a list or as one source: MBPP, AceCode |
| `tests`, `input_output` | `[{input, output}]`, `[[input, output]]`, `{"inputs", "outputs"}`: contests, APPS, TACO |
| the same, with `fn_name` in the tests or in the row, or `entry_point` in the row | the arguments and the value of calls |

Each may be JSON text, and so may each test. Inputs and outputs that are lists are lines, numbers their digits; arguments and values that
are text are JSON, one argument a line.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from rewards.answers.blocks import parsed
from rewards.answers.programs import called_names

COLUMNS = ("tests", "input_output", "test_list", "test_cases", "test")
_INPUTS = ("input", "stdin", "inputs")
_OUTPUTS = ("output", "expected_output", "expected", "stdout", "expected_stdout", "answer", "outputs")
_SAME = (
    "def _same(got, wanted):\n"
    "    if isinstance(got, tuple):\n"
    "        got = list(got)\n"
    "    if isinstance(got, list) and isinstance(wanted, list):\n"
    "        return len(got) == len(wanted) and all(_same(one, other) for one, other in zip(got, wanted))\n"
    "    if isinstance(got, dict) and isinstance(wanted, dict):\n"
    "        got = {{str(key): value for key, value in got.items()}}\n"
    "        return got.keys() == wanted.keys() and all(_same(got[key], wanted[key]) for key in wanted)\n"
    "    numbers = all(isinstance(one, (int, float)) for one in (got, wanted))\n"
    "    if numbers and (isinstance(got, float) or isinstance(wanted, float)):\n"
    "        return got == wanted or abs(got - wanted) <= {tolerance} * max(1.0, abs(wanted))\n"
    "    return got == wanted\n"
    "def _right(got, wanted):\n"
    "    return _same(got, wanted) or (isinstance(wanted, list) and len(wanted) == 1 and _same(got, wanted[0]))\n"
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])")


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
        ValueError: there are none, or not in a form that is known, or they are no Python.
    """
    name = next((name for name in COLUMNS if row.get(name) is not None), None)
    if name is None:
        given = ", ".join(map(str, row)) or "none"
        raise ValueError(f"code_tests needs a column test, test_list, test_cases, tests or input_output; the task's rows have: {given}")
    if name == "test" and isinstance(row[name], str) and re.search(r"^[ \t]*def check\b", row[name], re.MULTILINE):
        if not row.get("entry_point"):
            raise ValueError("the column 'test' needs a column 'entry_point' with the name of the function")
        _check_source(row[name])
        return Tests(names=[str(row["entry_point"])], check=row[name])
    value = _from_json(row[name], name)
    if isinstance(value, Mapping):
        value = _list_of(value)
    if not isinstance(value, Sequence):
        raise ValueError(f"the column {name!r} must be a list of tests, or {{inputs, outputs}}, got {_shown(value)}")
    tests = [_from_json(test, name) if isinstance(test, str) and test.lstrip()[:1] in ("{", "[") else test for test in value]
    if not tests:
        raise ValueError(f"the row's column {name} is empty")
    if all(isinstance(test, str) for test in tests):
        imports, setup = row.get("test_imports") or (), row.get("test_setup_code") or ""
        source = "\n".join([imports] if isinstance(imports, str) else imports) + "\n" + setup
        for statements in (source, *tests):
            _check_source(statements)
        return Tests(called_names([*tests, source]), statements=tests, setup=source, reference=row.get("code") or "")
    pairs = [_pair(test, name) for test in tests]
    function = _function(tests[0], row[name], row, name)
    return (
        _calls(pairs, function, program, tolerance)
        if function
        else Tests(examples=[(_lines(a, "input"), _lines(b, "output")) for a, b in pairs])
    )


def _check_source(source: str) -> None:
    try:
        parsed(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the tests cannot be run: {type(error).__name__}: {error}") from None


def _from_json(value: Any, name: str) -> Any:
    """A value, or what its text says: JSON, or the assert statements of a source, one a test."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        failure = error
    try:
        body = parsed(value).body
    except (SyntaxError, ValueError):
        body = []
    if any(isinstance(node, ast.Assert) for node in body):
        asserts = all(isinstance(node, ast.Assert) for node in body)
        return [ast.unparse(node) for node in body] if asserts else [value]
    raise ValueError(f"the column {name!r} is text that is neither JSON nor assert statements: {failure}")


def _list_of(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"inputs": [...], "outputs": [...]}` as a list of tests; a test that is alone likewise.

    Raises:
        ValueError: it has neither, or not as many outputs as inputs.
    """
    keys = [next((name for name in names if value.get(name) is not None), None) for names in (("inputs", *_INPUTS), ("outputs", *_OUTPUTS))]
    if None in keys:
        raise ValueError(f"the tests must have 'inputs' and 'outputs', got {_shown(dict(value))}")
    inputs, outputs = (value[key] if isinstance(value[key], list) else [value[key]] for key in keys)
    if len(inputs) != len(outputs):
        raise ValueError(f"'inputs' and 'outputs' must be lists of one length, got {len(inputs)} and {len(outputs)}")
    return [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]


def _pair(test: Any, name: str) -> tuple[Any, Any]:
    if isinstance(test, Mapping):
        keys = [next((key for key in names if test.get(key) is not None), None) for names in (_INPUTS, _OUTPUTS)]
        if None not in keys:
            return test[keys[0]], test[keys[1]]
    elif isinstance(test, list | tuple) and len(test) == 2:
        return test[0], test[1]
    raise ValueError(f"a test of the column {name!r} must be {{input, output}}, [input, output] or an assert statement, got {_shown(test)}")


def _function(first: Any, value: Any, row: Mapping[str, Any], column: str) -> str:
    """The name of the function that pairs are calls of; empty where they are standard input and output.

    Raises:
        ValueError: it is no name.
    """
    value = json.loads(value) if isinstance(value, str) else value
    places = [place.get("fn_name") for place in (value, first, row) if isinstance(place, Mapping)]
    name = next(filter(None, places), None) or row.get("entry_point")
    if name and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"'fn_name' of the column {column!r} must be the name of a function, got {_shown(name)}")
    return name or ""


def _calls(pairs: list[tuple[Any, Any]], function: str, program: str, tolerance: float) -> Tests:
    """Statements that call a function with the arguments of each pair and compare its value."""
    owner = "Solution" if re.search(r"^[ \t>]*class Solution\b", program, re.MULTILINE) else None
    call = f"Solution().{function}" if owner else function
    statements = []
    for given, wanted in pairs:
        arguments, value = _from_lines(given, wanted) if isinstance(given, str) else (given if isinstance(given, list) else [given], wanted)
        statements.append(f"assert _right({call}({', '.join(map(repr, arguments))}), {value!r})")
    return Tests([owner or function], statements=statements, setup=_SAME.format(tolerance=tolerance))


def _from_lines(given: str, wanted: Any) -> tuple[list[Any], Any]:
    """The arguments and the value that text says, one JSON value a line; text that is no JSON is one argument itself."""
    try:
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
        return arguments, json.loads(wanted) if isinstance(wanted, str) else wanted
    except json.JSONDecodeError:
        return [given], wanted


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
    """Whether two outputs are equal up to white space at the ends of lines and between words.

    Numbers that are written differently are equal where they are exactly (2.0 is 2), and within a relative tolerance, absolute below 1,
    where the wanted one is written with a point or an exponent: 3 is not 3.0000001, nor is any other integer.
    """
    left, right = ([line.rstrip() for line in text.strip("\n").rstrip().splitlines()] for text in (got, wanted))
    return len(left) == len(right) and all(map(_same_line, left, right, [tolerance] * len(left)))


def _same_line(got: str, wanted: str, tolerance: float) -> bool:
    if got == wanted:
        return True
    words = [" ".join(_NUMBER.sub("0", line).split()) for line in (got, wanted)]
    return words[0] == words[1] and all(map(_same_number, _NUMBER.findall(got), _NUMBER.findall(wanted), [tolerance] * len(got)))


def _same_number(got: str, wanted: str, tolerance: float) -> bool:
    try:
        if Decimal(got) == Decimal(wanted):
            return True
    except InvalidOperation:  # an exponent beyond all numbers
        return False
    value, gold = float(got), float(wanted)
    written = any(sign in wanted for sign in ".eE")
    return written and math.isfinite(value - gold) and abs(value - gold) <= tolerance * max(1.0, abs(gold))
