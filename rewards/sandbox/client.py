"""Runs programs that a model wrote, so that nothing they do reaches the grader, the machine or the verdict.

    python -m rewards.sandbox.client [strong | weak]      which layers are in force on this machine

`strong` is new user, pid, mount, network, ipc and uts namespaces, a read-only root with the interpreter only, no capabilities, a seccomp
filter, resource limits, and a memory and process cgroup where one can be had. Where a layer other than the cgroup is missing it refuses.
`weak` is resource limits and a process group: enough against accidents, not against intent. See docs/sandbox.md.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

MODES = ("strong", "weak")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_PREFIX = "rlhub-program-"
CGROUP_LIMITS = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max",)}
START_SECONDS = 30.0
END_SECONDS = 10.0  # for the kernel to end all processes of a namespace

SERVER = Path(__file__).parent / "inside" / "server.py"
HARNESS = Path(__file__).parent / "inside" / "judge.py"


class SandboxError(RuntimeError):
    """The sandbox itself failed. Says nothing about the program."""


class SandboxUnavailable(SandboxError, ValueError):
    """This machine does not offer what the mode needs. A ValueError too: the message is for users and names the way out."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Memory is the address space of each process, and all memory together where there is a cgroup."""

    deadline_seconds: float = 5.0  # wall clock
    memory_megabytes: int = 512
    disk_megabytes: int = 16
    output_kilobytes: int = 1024  # of stdout and of stderr
    processes: int = 16  # threads included
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `ending` is exit, deadline or output (it wrote more than it may); `code` is 128 + n after signal n.

    Negative codes are signals that ended the program's init with it; `seconds` runs until nothing of it is left.
    """

    ending: str
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What the tests said. `ending` as in Outcome; `failure` describes the first test that failed, empty when all passed."""

    ending: str
    passed: int
    total: int
    failure: str

    @property
    def all_passed(self) -> bool:
        return self.ending == "exit" and not self.failure and self.passed == self.total > 0


def run_script(source: str, stdin: str = "", limits: Limits = Limits(), mode: str = "strong") -> Outcome:
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
    limits: Limits = Limits(),
    mode: str = "strong",
) -> Verdict:
    """Runs tests against a program, each in a sandbox of its own; see `roles` for what passes between them.

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
    _server(mode)
    limited = "resource limits: processor time, address space, file size, open files, no core files"
    if mode == "weak":
        return {"limits": limited, "group": "a process group of its own"}
    return {
        "namespaces": "user, pid, mount, network, ipc, uts",
        "root": "read-only: interpreter and shared libraries; 5 devices; private /tmp; no /proc, no /sys",
        "privileges": "no capabilities, no_new_privs, seccomp filter",
        "limits": f"{limited}, processes",
        "cgroup": _cgroups().description,
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
            _server(mode).start(request, descriptors)
        output.close_write()
        errors.close_write()
        ours.settimeout(START_SECONDS)
        try:
            answer = json.loads(ours.recv(4096) or b'{"refused": "it ended before the program began"}')
        except TimeoutError:
            raise SandboxError(f"the sandbox did not start within {START_SECONDS:g} s") from None
        if "refused" in answer:
            raise _unavailable(mode, answer["refused"])
        if mode == "strong":
            folders = _cgroups().take(limits)
            stack.callback(_cgroups().give_back, folders)
            _cgroups().add(folders, answer["pid"])
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


def _unavailable(mode: str, cause: str) -> SandboxUnavailable:
    if mode == "weak":
        return SandboxUnavailable(f"the weak sandbox cannot run here: {cause}")
    return SandboxUnavailable(
        f"the strong sandbox cannot run here: {cause}. Run on a machine or in a container that allows user namespaces (docs/sandbox.md); "
        "`sandbox: weak` runs model-written programs with resource limits only"
    )


class _Server:
    """The fork server, a process of its own."""

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"sandbox must be one of {', '.join(MODES)}, got {mode!r}")
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the sandbox needs Linux and this is {sys.platform}: run the reward workers on a Linux machine")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = tempfile.mkdtemp(prefix="rlhub-sandbox-")
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(SERVER), str(theirs.fileno()), mode, root]
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    cwd="/",
                )
            self.control.settimeout(START_SECONDS)
            hello = self.control.recv(4096)
        except TimeoutError:
            raise SandboxError(f"the fork server did not start within {START_SECONDS:g} s") from None
        finally:
            os.rmdir(root)
        if not hello:
            raise SandboxError(f"the fork server ended with code {self.process.wait()}: {' '.join(command)}")
        if refused := json.loads(hello)["refused"]:
            raise _unavailable(mode, refused)
        self.control.settimeout(None)

    def start(self, request: dict[str, Any], descriptors: list[int]) -> None:
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], descriptors)
        except BrokenPipeError:
            raise SandboxError("the fork server died; the next program starts another") from None

    def close(self) -> None:
        """Programs that still run end with it."""
        self.control.close()
        self.process.wait()


_servers: dict[str, _Server] = {}
_lock = threading.RLock()


def _server(mode: str) -> _Server:
    with _lock:
        server = _servers.get(mode)
        if server is None or server.process.poll() is not None:
            server = _servers[mode] = _Server(mode)
            Finalize(None, server.close, exitpriority=1)
        return server


class _Cgroups:
    """Cgroups below this process's own, one set for each program that runs, used again and again.

    Only the controllers that this user may really use here are used, which is tried once; `description` names them.
    """

    def __init__(self) -> None:
        self.numbers, self.free = itertools.count(), []
        self.parents: dict[str, Path] = {}
        refused = []
        for controller, parent in _cgroup_parents().items():
            try:
                _sweep(parent)
                self._try(controller, parent)
                self.parents[controller] = parent
            except OSError as error:
                refused.append(f"no {controller} cgroup ({error.strerror}: {error.filename})")
        self.description = ", ".join([*(f"{controller} in {parent}" for controller, parent in self.parents.items()), *refused])
        Finalize(None, self.close, exitpriority=1)  # unlike atexit also in workers of multiprocessing, and not in forked children

    def take(self, limits: Limits) -> dict[str, Path]:
        """A folder for each controller with these limits set."""
        with _lock:
            folders = self.free.pop() if self.free else self._make(self.parents)
        self._limit(folders, limits)
        return folders

    def give_back(self, folders: dict[str, Path]) -> None:
        with _lock:
            self.free.append(folders)

    def add(self, folders: dict[str, Path], pid: int) -> None:
        for folder in set(folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        while self.free:
            for folder in set(self.free.pop().values()):
                with suppress(OSError):
                    folder.rmdir()

    def _make(self, parents: dict[str, Path]) -> dict[str, Path]:
        name = f"{CGROUP_PREFIX}{os.getpid()}-{next(self.numbers)}"
        folders = {controller: parent / name for controller, parent in parents.items()}
        for folder in set(folders.values()):
            folder.mkdir()
        return folders

    def _limit(self, folders: dict[str, Path], limits: Limits) -> None:
        values = {"memory": limits.memory_megabytes * 2**20, "pids": limits.processes + 1}  # init counts as one
        for controller, folder in folders.items():
            files = [folder / name for name in CGROUP_LIMITS[controller]]
            next((file for file in files if file.exists()), files[0]).write_text(str(values[controller]))
            if (swap := folder / "memory.swap.max").exists():
                swap.write_text("0")

    def _try(self, controller: str, parent: Path) -> None:
        folders = self._make({controller: parent})
        waiting = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            self._limit(folders, Limits())
            self.add(folders, waiting.pid)
        finally:
            waiting.communicate()
            folders[controller].rmdir()


def _cgroup_parents() -> dict[str, Path]:
    parents: dict[str, Path] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():  # version 1 first, the line of version 2 last
        _, controllers, own = line.split(":", 2)
        for controller in CGROUP_LIMITS:
            root = CGROUPS / controller if controllers else CGROUPS
            if controller not in parents and controllers in ("", controller):
                folder = root / own.lstrip("/")
                # Version 2 lets no processes live in a group that shares out a controller, so ours has siblings instead of children.
                shares = (folder / "cgroup.subtree_control", controller)
                siblings = not controllers and not (shares[0].exists() and controller in shares[0].read_text().split())
                parents[controller] = folder.parent if siblings and folder != root else folder
    return parents


def _sweep(parent: Path) -> None:
    """Removes what killed graders left."""
    for folder in parent.glob(f"{CGROUP_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(CGROUP_PREFIX).split("-")[0]).exists():
            with suppress(OSError):
                folder.rmdir()


@cache
def _cgroups() -> _Cgroups:
    return _Cgroups()


def _after_fork() -> None:
    """A forked grader starts a server and cgroups of its own."""
    for server in _servers.values():
        server.control.close()
    _servers.clear()
    _cgroups.cache_clear()


os.register_at_fork(after_in_child=_after_fork)


def main(arguments: list[str]) -> int:
    mode = arguments[0] if arguments else "strong"
    try:
        found = layers(mode)
    except (SandboxError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, text in found.items():
        print(f"{name:12} {text}")
    outcome = run_script("import os; print(*sorted(os.listdir('/')), 'as user', os.getuid())", mode=mode)
    print(f"{'inside':12} {(outcome.stdout + outcome.stderr).decode().strip()} ({1000 * outcome.seconds:.0f} ms)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
