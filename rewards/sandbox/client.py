"""The grader's side: hands programs and tests to the sandbox and reads what they write until they end or have to be ended."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from rewards.sandbox.cgroups import cgroups
from rewards.sandbox.programs import DEFAULT_LIMITS, Limits, Outcome, SandboxError, Verdict
from rewards.sandbox.servers import START_SECONDS, server, unavailable

END_SECONDS = 10.0  # for the kernel to end all processes of a namespace


def run_script(source: str, stdin: str = "", limits: Limits = DEFAULT_LIMITS, mode: str = "strong") -> Outcome:
    """Runs a program as `__main__`.

    Example:
        >>> run_script("print(int(input()) + 1)", "41").stdout
        b'42\\n'

    Raises:
        SandboxUnavailable: the machine lacks a layer of the mode.
        SandboxError: the sandbox failed.
    """
    with _running(mode, "script", {"sources": [source]}, limits, stdin.encode("utf-8", "surrogatepass")) as run:
        ending = _watch([run], limits)
    return Outcome(ending, run.code, bytes(run.streams[0].data), bytes(run.streams[1].data), run.seconds)


def run_tests(
    prompt: str,
    program: str,
    tests: dict[str, Any],
    limits: Limits = DEFAULT_LIMITS,
    mode: str = "strong",
) -> Verdict:
    """Runs tests against a program, each in a sandbox of its own; see `inside.judge` for what passes between them.

    Args:
        program: a whole program, or the body of the function that `prompt` begins.
        tests: `{"kind": "function", "tests": source of check(candidate), "entry_point": name, "partial": bool}` or
            `{"kind": "asserts", "tests": [statement], "setup": source, "reference": source, "partial": bool}`.

    Raises:
        ValueError: the tests cannot be run.
        SandboxUnavailable, SandboxError: as in `run_script`.
    """
    token = secrets.token_hex(16)
    with ExitStack() as stack:
        calls, replies, verdicts = (_Pipe(stack) for _ in range(3))
        solution = stack.enter_context(_running(mode, "serve", {"sources": [prompt, program]}, limits, b"", (calls.read, replies.write)))
        payload = {**tests, "prompt": prompt, "token": token}
        ends = (calls.write, replies.read, verdicts.write)
        judge = stack.enter_context(_running(mode, "judge", payload, Limits(limits.deadline_seconds), b"", ends))
        for pipe in (calls, replies):
            pipe.close()
        verdicts.close_write()
        judge.streams.append(_Stream(verdicts.read))
        ending = _watch([judge, solution], limits)
        judge.stop()
        solution.stop()
        said = [json.loads(line) for line in bytes(judge.streams[2].data).splitlines(keepends=True) if line.endswith(b"\n")]
    last = said[-1] if said else {"token": token, "passed": 0, "total": 0, "done": False, "failure": "", "broken": ""}
    if any(line["token"] != token for line in said):
        raise SandboxError("a verdict without the token of this run")
    if last["broken"]:
        raise ValueError(f"the tests cannot be run: {last['broken']}")
    if ending == "exit" and not last["done"]:
        raise SandboxError(f"the tests ended without a verdict: {bytes(judge.streams[1].data)[-500:].decode(errors='replace')}")
    failure = {"deadline": f"time limit of {limits.deadline_seconds:g} s", "output": "too much output"}.get(ending, last["failure"])
    return Verdict(ending, last["passed"], last["total"], failure)


def layers(mode: str = "strong") -> dict[str, str]:
    """What is in force on this machine, by starting a sandbox.

    Raises:
        SandboxUnavailable: as in `run_script`.
    """
    maker = server(mode).maker
    limited = "resource limits: processor time, address space, file size, open files, no core files"
    if mode == "weak":
        return {"limits": limited, "group": "a process group of its own"}
    return {
        "namespaces": "user, pid, mount, network, ipc, uts",
        "root": f"read-only: interpreter and shared libraries; 5 devices; private /tmp; no /proc, no /sys; made by {maker}",
        "privileges": "no capabilities, no_new_privs, seccomp filter",
        "limits": f"{limited}, processes",
        "cgroup": cgroups().description,
    }


class _Pipe:
    """Both ends of a pipe, closed at the end of a block or before."""

    def __init__(self, stack: ExitStack) -> None:
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}
        stack.callback(self.close)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def close_write(self) -> None:
        self._open.remove(self.write)
        os.close(self.write)


@dataclass
class _Stream:
    descriptor: int
    data: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        os.set_blocking(self.descriptor, False)

    def pull(self) -> bool:
        """Reads what is there; False at the end."""
        try:
            chunk = os.read(self.descriptor, 65536)
        except BlockingIOError:
            return False
        self.data += chunk
        return bool(chunk)


class _Run:
    """One program that is running."""

    def __init__(self, mode: str, keeper: socket.socket, streams: list[_Stream]) -> None:
        self.mode, self.keeper, self.streams = mode, keeper, streams
        self.code: int | None = None
        self.started = time.monotonic()
        self.seconds = 0.0

    def stop(self) -> None:
        with suppress(OSError):  # the keeper may have ended just now
            self.keeper.shutdown(socket.SHUT_WR)

    def ended(self) -> None:
        """Takes the keeper's last word."""
        said = b""
        with suppress(ConnectionResetError):
            said = self.keeper.recv(4096)
        if not said and self.mode == "strong":
            raise SandboxError("the keeper of a program died; is the machine out of memory?")
        self.code = json.loads(said)["code"] if said else 128 + signal.SIGKILL  # a weak one can be killed by its program
        self.seconds = time.monotonic() - self.started


@contextmanager
def _running(mode: str, role: str, payload: dict[str, Any], limits: Limits, stdin: bytes, pipes: Sequence[int] = ()) -> Iterator[_Run]:
    """A program in its sandbox; when the block ends so does everything that the program started."""
    request = {
        **asdict(limits),
        "role": role,
        "strong": mode == "strong",
        "cpu_seconds": int(limits.deadline_seconds) + 2,
    }
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        with ExitStack() as sent:
            sent.enter_context(theirs)
            output, errors = _Pipe(stack), _Pipe(stack)
            files = [_sealed(sent, data) for data in (stdin, json.dumps(payload).encode())]
            descriptors = [theirs.fileno(), files[0], output.write, errors.write, files[1], *pipes]
            server(mode).start(request, descriptors)
        output.close_write()
        errors.close_write()
        ours.settimeout(START_SECONDS)
        try:
            answer = json.loads(ours.recv(4096) or b'{"refused": "it ended before the program began"}')
        except TimeoutError:
            raise SandboxError(f"the sandbox did not start within {START_SECONDS:g} s") from None
        if "refused" in answer:
            raise unavailable(mode, answer["refused"])
        if mode == "strong":
            folders = cgroups().take(limits)
            stack.callback(cgroups().give_back, folders)
            cgroups().add(folders, answer["pid"])
        run = _Run(mode, ours, [_Stream(output.read), _Stream(errors.read)])
        stack.callback(_end, run)
        ours.settimeout(END_SECONDS)
        ours.send(b"go")
        yield run


def _end(run: _Run) -> None:
    if run.code is None:
        run.stop()
        try:
            run.ended()
        except TimeoutError:
            raise SandboxError(f"a program could not be ended within {END_SECONDS:g} s") from None


def _watch(runs: list[_Run], limits: Limits) -> str:
    """Reads what the programs write until the first one ends: "exit", "deadline", or "output" for more output than is allowed."""
    until = runs[0].started + limits.deadline_seconds
    most = limits.output_kilobytes * 1024
    with selectors.DefaultSelector() as selector:
        for run in runs:
            selector.register(run.keeper, selectors.EVENT_READ, (run, None))
            for stream in run.streams:
                selector.register(stream.descriptor, selectors.EVENT_READ, (run, stream))
        while (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                run, stream = key.data
                if stream is None:
                    run.ended()
                    selector.unregister(key.fileobj)
                elif not stream.pull():
                    selector.unregister(key.fileobj)
                elif len(stream.data) > most:
                    return "output"
            if runs[0].code is not None:
                for stream in runs[0].streams:
                    while stream.pull():
                        if len(stream.data) > most:
                            return "output"
                return "exit"
    return "deadline"


def _sealed(stack: ExitStack, data: bytes) -> int:
    """A file in memory that can only be read: not even its size can be changed from inside."""
    descriptor = os.memfd_create("rlhub", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return descriptor
