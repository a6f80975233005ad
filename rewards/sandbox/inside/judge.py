"""What runs inside a sandbox: a script, a program whose functions are called from outside, or the tests that call them.

Tests and program sit in two sandboxes that share two pipes. A call goes over as JSON and its value comes back as JSON, so the tests only
ever compare plain values of exact built-in types that their own process made: the program cannot see the tests, has nothing to patch and
cannot hand over an object with an `__eq__` of its own. What is not plain stays where it is and is named by a number (`Remote`).

Standard library only: the fork server imports this file outside of any package.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import json
import operator
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn

MESSAGE_BYTES = 4 * 2**20
TEXT_CHARACTERS = 200
BIG_INTEGER_BITS = 10_000  # beyond, decimal digits are refused by Python and slow; hexadecimal ones are not

CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "getitem": operator.getitem,
}


class ProgramGone(BaseException):
    """The program ended, or its answer is no answer. Not an Exception, so that tests which expect an error do not take it for one."""


class BrokenTests(BaseException):
    """The tests themselves cannot be used."""


def run_script(payload: dict[str, Any]) -> None:
    """Runs the program as `__main__`, as `python program.py` would."""
    module = _module("__main__")
    exec(compile(payload["sources"][0], "program.py", "exec"), vars(module))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def serve(payload: dict[str, Any], calls: BinaryIO, replies: BinaryIO) -> None:
    """Loads the program, says how that went, then answers one call after another until the tests hang up."""
    module = _module("program")
    try:
        for code in _compiled(payload["sources"]):
            exec(code, vars(module))
    except BaseException as error:  # sys.exit at the top of a program is a failure too
        _send(replies, {"error": _lineage(error), "text": _text(error)})
        return
    _send(replies, {"value": None})
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    for line in calls:
        try:
            operation, target, arguments, named = json.loads(line)
            if operation == "name":
                reply = {"value": encode(vars(module)[target], keep)}
            else:
                arguments = [decode(value, kept.__getitem__) for value in arguments]
                named = {name: decode(value, kept.__getitem__) for name, value in named.items()}
                value = OPERATIONS[operation](kept[target], *arguments, **named)
                reply = {"value": encode(value, keep)}
                if value is None:
                    reply["arguments"] = [encode(argument, keep) for argument in arguments]
        except BaseException as error:
            reply = {"error": _lineage(error), "text": _text(error)}
        _send(replies, reply)


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
        _send(self.stream, fields)


class Program:
    """The tests' end of the line to the program."""

    def __init__(self, calls: BinaryIO, replies: BinaryIO) -> None:
        self.calls, self.replies, self.gone = calls, replies, ""
        try:
            self._receive()
        except Exception as error:  # the program raises what it likes, and what is left of the pipe is not to be trusted either
            raise ProgramGone(f"the program does not load: {type(error).__name__}: {error}") from None

    def name(self, name: str) -> Any:
        """A function, class or value that the program defines."""
        try:
            return self._exchange("name", name, [], {})[1]
        except KeyError:
            raise ProgramGone(f"the program does not define {name}") from None

    def request(self, operation: str, target: int, *arguments: Any, **named: Any) -> Any:
        """The value of one operation on an object of the program; what the program raises is raised here as its built-in ancestor."""
        reply, value = self._exchange(
            operation, target, [encode(argument, _handle) for argument in arguments], {k: encode(v, _handle) for k, v in named.items()}
        )
        # By convention a function that changes its arguments returns None. One that returns a value must not change what the tests
        # compare that value with.
        if value is None and "arguments" in reply:
            for argument, after in zip(arguments, reply["arguments"], strict=False):
                _restore(argument, decode(after, self._remote))
        return value

    def _exchange(self, *message: Any) -> tuple[dict[str, Any], Any]:
        if self.gone:
            raise ProgramGone(self.gone)
        try:
            _send(self.calls, message)
        except BrokenPipeError:
            self._lost("the program ended before it answered")
        try:
            return self._receive()
        except StopIteration:
            if message[0] == "next":
                raise
            raise RuntimeError("the program raised StopIteration") from None  # which would end a `map` of the tests early

    def _receive(self) -> tuple[dict[str, Any], Any]:
        line = self.replies.readline(MESSAGE_BYTES + 1)
        if not line.endswith(b"\n"):
            self._lost("an answer is too long" if len(line) > MESSAGE_BYTES else "the program ended before it answered")
        try:
            reply = json.loads(line)
            if "error" not in reply:
                return reply, decode(reply["value"], self._remote)
            kinds = [vars(builtins).get(name) for name in reply["error"]]
            text = str(reply["text"])[:TEXT_CHARACTERS]
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError):
            self._lost("an answer that cannot be read")
        kind = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseException)), Exception)
        if not issubclass(kind, Exception):
            self._lost(f"{kind.__name__}: {text}")
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and its like cannot be made from a text
            error = ValueError(text)
        raise error

    def _lost(self, why: str) -> NoReturn:
        self.gone = why
        raise ProgramGone(why) from None

    def _remote(self, handle: int) -> Remote:
        return Remote(self, handle)


class Remote:
    """An object of the program. Equal to nothing but itself and without arithmetic: those are the tests' to decide."""

    def __init__(self, program: Program, handle: int) -> None:
        vars(self).update(_program=program, _remote_handle=handle)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.request("call", self._remote_handle, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.request("getattr", self._remote_handle, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.request("setattr", self._remote_handle, name, value)

    def __iter__(self) -> Any:
        return self._program.request("iter", self._remote_handle)

    def __next__(self) -> Any:
        return self._program.request("next", self._remote_handle)

    def __len__(self) -> int:
        return self._program.request("len", self._remote_handle)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._program.request("getitem", self._remote_handle, key)


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """A plain value as JSON can carry it, with subclasses reduced to their built-in type; anything else as the number `keep` gives it.

    Example:
        >>> encode((1, [2.5, None]), id)
        ['tuple', 1, ['list', 2.5, None]]
    """
    if value is None or isinstance(value, (bool, float)):
        return value if type(value) in (bool, float, type(None)) else float.__float__(value)
    if isinstance(value, int):
        value = int.__int__(value)
        return value if value.bit_length() < BIG_INTEGER_BITS else ["int", hex(value)]
    if isinstance(value, str):
        return str.__str__(value)
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, *(encode(item, keep) for item in kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", *([encode(key, keep), encode(item, keep)] for key, item in dict.items(value))]
    if type(value) is complex:
        return ["complex", value.real, value.imag]
    if type(value) in (bytes, bytearray):
        return [type(value).__name__, value.hex()]
    return ["object", keep(value)]


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """The inverse of `encode`; `find` gives the object of a number.

    Raises:
        ValueError, TypeError: not something that `encode` makes.
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("a bare object")
        return data
    match data:
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case [("bytes" | "bytearray") as kind, str(digits)]:
            return bytes.fromhex(digits) if kind == "bytes" else bytearray.fromhex(digits)
        case ["object", int(handle)]:
            return find(handle)
        case ["dict", *pairs]:
            return {decode(key, find): decode(item, find) for key, item in pairs}
        case [str(kind), *items] if kind in CONTAINERS:
            return CONTAINERS[kind](decode(item, find) for item in items)
    raise ValueError("an unknown kind of value")


def _function_tests(payload: dict[str, Any], program: Program, report: Report) -> str:
    """HumanEval: `check(candidate)`, beside the prompt's own helpers, which are not taken from the program."""
    space = vars(_module("tests"))
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
    space = vars(_module("tests"))
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


def _compiled(sources: list[str]) -> list[Any]:
    """A whole program follows its prompt; one that is only the body of the prompt's function continues it."""
    prompt, program = sources
    try:
        return [compile(prompt, "prompt.py", "exec"), compile(program, "program.py", "exec")]
    except SyntaxError as error:
        try:
            return [compile(prompt + program, "program.py", "exec")]
        except SyntaxError:
            raise error from None


def _restore(argument: Any, after: Any) -> None:
    if type(argument) is type(after) is list:
        argument[:] = after
    elif type(argument) is type(after) and isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(after)


def _handle(value: Any) -> int:
    if isinstance(value, Remote):
        return vars(value)["_remote_handle"]
    raise BrokenTests(f"the tests pass a {type(value).__name__}, which cannot be sent to the program")


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


def _lineage(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:TEXT_CHARACTERS]
    except BaseException:
        return ""


def _module(name: str) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    return module


def _send(stream: BinaryIO, message: Any) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
