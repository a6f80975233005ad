"""The tests' side: runs them, calls the program in the other sandbox, and reports what they said.

Tests and program share two pipes. A call goes over as JSON and its value comes back as JSON, so the tests only ever compare plain values of
exact built-in types that their own process made: the program cannot see the tests, has nothing to patch and cannot hand over an object with
an `__eq__` of its own. What is not plain stays where it is and is named by a number (`remote.Remote`).
"""

from __future__ import annotations

import ast
import builtins
import random
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from .program import new_module
from .remote import BrokenTests, Program, ProgramGone
from .values import TEXT_CHARACTERS, send


def judge(payload: dict[str, Any], calls: BinaryIO, replies: BinaryIO, verdicts: BinaryIO) -> None:
    """Runs the tests and writes a verdict with the token after each one that is met, so that a deadline loses none."""
    report = Report(payload["token"], verdicts)
    broken = ""
    try:
        program = Program(calls, replies)
        tests = _function_tests if payload["kind"] == "function" else _assert_tests
        failure = tests(payload, program, report) or program.gone
    except ProgramGone as error:
        failure = str(error)
    except BrokenTests as error:
        failure = broken = str(error)
    report.send(done=True, failure=failure, broken=broken)


class Report:
    """What is known so far: `passed` of `total` tests."""

    def __init__(self, token: str, stream: BinaryIO) -> None:
        self.token, self.stream, self.passed, self.total = token, stream, 0, 0

    def met(self, passed: int) -> None:
        if passed != self.passed:
            self.passed = passed
            self.send(done=False)

    def send(self, done: bool, failure: str = "", broken: str = "") -> None:
        fields = {"token": self.token, "passed": self.passed, "total": self.total, "done": done, "failure": failure, "broken": broken}
        send(self.stream, fields)


def _function_tests(payload: dict[str, Any], program: Program, report: Report) -> str:
    """HumanEval: `check(candidate)`, beside the prompt's own helpers, which are not taken from the program."""
    space = vars(new_module("tests"))
    failed: dict[int, str] = {}
    met: set[int] = set()

    @contextmanager
    def tally(number: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any exception of the program under test fails the test
            failed.setdefault(number, _failure(f"test {number} of {len(lines)}", error))
        else:
            met.add(number)
            report.met(len(met - failed.keys()))

    try:
        exec(compile(payload["prompt"], "prompt.py", "exec"), space)
        tree = ast.parse(payload["tests"])
        lines = sorted({node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)})
        report.total = max(1, len(lines))
        if payload["partial"]:
            space["__tally__"] = tally
            tree = ast.fix_missing_locations(_Tallied(lines).visit(tree))
        entry_point = payload["entry_point"]
        candidate = space[entry_point] = program.name(entry_point)
        helpers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & space.keys() - {entry_point, "__tally__"}
        helpers = {name for name in helpers if isinstance(space[name], types.FunctionType) and space[name].__module__ == "tests"}
        _define(tree, "tests.py", space, {entry_point})
        check = space["check"]
    except Exception as error:  # tests are code of somebody else's
        raise BrokenTests(f"{type(error).__name__}: {error}") from None

    def failure() -> str:
        random.seed(0)  # of this throw-away process: tests that draw their cases must draw the same ones for every program
        try:
            check(candidate)
        except Exception as error:  # any exception of the program under test fails the test
            at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"][-1]
            return _failure(f"test {lines.index(at) + 1} of {len(lines)}" if at in lines else f"line {at} of the tests", error)
        return failed[min(failed)] if failed else ""

    first = failure()
    if not first and helpers:
        # A whole program may bring its own version of the prompt's helpers; tests that hold with ours must hold with those too.
        space.update((name, program.name(name)) for name in helpers)
        first = failure()
        report.met(len(met - failed.keys()))
    if not first:
        report.passed = report.total
    return first


class _Tallied(ast.NodeTransformer):
    def __init__(self, lines: list[int]) -> None:
        self.lines = lines

    def visit_Assert(self, node: ast.Assert) -> ast.With:
        number = ast.Constant(self.lines.index(node.lineno) + 1)
        entered = ast.Call(ast.Name("__tally__", ast.Load()), [number], [])
        return ast.copy_location(ast.With([ast.withitem(entered)], [node]), node)


def _assert_tests(payload: dict[str, Any], program: Program, report: Report) -> str:
    """MBPP: one statement a test, with the program's names put beside the tests' own imports."""
    space = vars(new_module("tests"))
    random.seed(0)  # of this throw-away process, as above
    try:
        imports, names = _reference(payload["reference"], payload["tests"], payload["setup"])
        exec(compile(imports, "tests.py", "exec"), space)
        for name in names:
            space[name] = program.name(name)
        units = [compile(test, "tests.py", "exec") for test in payload["tests"]]
        _define(ast.parse(payload["setup"]), "setup.py", space, set(names))
    except Exception as error:  # tests are code of somebody else's
        raise BrokenTests(f"{type(error).__name__}: {error}") from None
    report.total = len(units)
    first = ""
    for number, unit in enumerate(units, start=1):
        try:
            exec(unit, space)
        except Exception as error:  # any exception of the program under test fails the test
            first = first or _failure(f"test {number} of {len(units)}", error)
            if not payload["partial"]:
                break
        else:
            report.met(report.passed + 1)
    return first


def _reference(reference: str, tests: list[str], setup: str) -> tuple[str, list[str]]:
    """The reference solution's imports, and the names that the tests use of the program.

    A built-in is taken from the program only where the reference defines it: tests that call `set` mean Python's own.
    """
    tree = ast.parse(reference)
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    nodes = list(ast.walk(ast.parse("\n".join([*imports, setup, *tests]))))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {
        (alias.asname or alias.name).split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    # `math.isclose` in a test means Python's module, though only the reference or the program may import it.
    owners = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    modules = (owners & sys.stdlib_module_names) - bound - defined
    imports += [f"import {module}" for module in sorted(modules)]
    names = sorted(name for name in used - bound - modules if name in defined or name not in vars(builtins))
    if not names:
        raise NameError("the tests call nothing of the program")
    return "\n".join(imports), names


def _failure(where: str, error: BaseException) -> str:
    kind = type(error).__name__
    return f"{where} failed" if kind == "AssertionError" else f"{where}: {kind}: {error}"[:TEXT_CHARACTERS]


def _define(code: ast.Module, source: str, space: dict[str, Any], names: set[str]) -> None:
    """Runs what the tests define before the first of them.

    Raises:
        ProgramGone: it fails and mentions `names` of the program, which may be to blame and must not pass for broken tests.
        BrokenTests: it fails by itself.
    """
    try:
        exec(compile(code, source, "exec"), space)
    except Exception as error:  # code of somebody else's
        mentioned = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
        blamed = ProgramGone if mentioned & names else BrokenTests
        raise blamed(f"before the tests: {type(error).__name__}: {error}") from None
