"""The program's side: a script, or a program whose functions the tests call from another sandbox."""

from __future__ import annotations

import atexit
import builtins
import json
import operator
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, BinaryIO

from .values import TEXT_CHARACTERS, decode, encode, send

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "getitem": operator.getitem,
}


def run_script(payload: dict[str, Any]) -> None:
    """Runs the program as `__main__`, as `python program.py` would."""
    module = new_module("__main__")
    exec(compile(payload["sources"][0], "program.py", "exec"), vars(module))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def serve(payload: dict[str, Any], calls: BinaryIO, replies: BinaryIO) -> None:
    """Loads the program, says how that went, then answers one call after another until the tests hang up."""
    module = new_module("program")
    try:
        for code in _compiled(payload["sources"]):
            exec(code, vars(module))
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):  # what stands before a last `exit()` is defined
            send(replies, {"error": _lineage(error), "text": _text(error)})
            return
    send(replies, {"value": None})
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
        send(replies, reply)


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


def _lineage(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:TEXT_CHARACTERS]
    except BaseException:
        return ""


def new_module(name: str) -> types.ModuleType:
    """An empty module that `import` finds, in an interpreter with the `exit` and `quit` that its site module would bring."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    module = sys.modules[name] = types.ModuleType(name)
    return module
