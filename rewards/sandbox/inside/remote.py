"""The tests' end of the line to the program, and what the program keeps for itself."""

from __future__ import annotations

import builtins
import json
from typing import Any, BinaryIO, NoReturn

from .values import TEXT_CHARACTERS, decode, encode, send

MESSAGE_BYTES = 4 * 2**20


class ProgramGone(BaseException):
    """The program ended, or its answer is no answer. Not an Exception, so that tests which expect an error do not take it for one."""


class BrokenTests(BaseException):
    """The tests themselves cannot be used."""


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
            operation, target, [encode(argument, handle_of) for argument in arguments], {k: encode(v, handle_of) for k, v in named.items()}
        )
        # By convention a function that changes its arguments returns None. One that returns a value must not change what the tests
        # compare that value with.
        if value is None and "arguments" in reply:
            for argument, after in zip(arguments, reply["arguments"], strict=False):
                restore(argument, decode(after, self._remote))
        return value

    def _exchange(self, *message: Any) -> tuple[dict[str, Any], Any]:
        if self.gone:
            raise ProgramGone(self.gone)
        try:
            send(self.calls, message)
        except BrokenPipeError:
            self._lost("the program ended before it answered")
        try:
            return self._receive()
        except StopIteration:
            if message[0] == "next":
                raise
            raise RuntimeError("the program raised StopIteration") from None  # which would end a `map` of the tests early

    def _receive(self) -> tuple[dict[str, Any], Any]:
        """The next answer and its value; what the program raised is raised here, ProgramGone where it is no answer."""
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


def restore(argument: Any, after: Any) -> None:
    if type(argument) is type(after) is list:
        argument[:] = after
    elif type(argument) is type(after) and isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(after)


def handle_of(value: Any) -> int:
    if isinstance(value, Remote):
        return vars(value)["_remote_handle"]
    raise BrokenTests(f"the tests pass a {type(value).__name__}, which cannot be sent to the program")
