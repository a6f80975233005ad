"""The grader's fork servers, one for each mode: started when a program first needs it, replaced when it died."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from rewards.sandbox.programs import MODES, SandboxError, SandboxUnavailable

START_SECONDS = 30.0

_FOLDER = str(Path(__file__).parent)
# The folder comes after the standard library, and the program does not get it.
_MAIN = "import sys; sys.path.append(sys.argv[1]); from inside.server import main; sys.path.pop(); main(*sys.argv[2:])"

_servers: dict[str, Server] = {}
_lock = threading.RLock()


class Server:
    """The fork server, a process of its own, started with this object.

    Args:
        mode: strong or weak.

    Attributes:
        process: what was started; the server itself, or bubblewrap around it.
        pid: of the server itself.
        maker: what made its root, in words.

    Raises:
        ValueError: no such mode.
        SandboxUnavailable: the machine lacks a layer of the mode.
        SandboxError: it did not start.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"sandbox must be one of {', '.join(MODES)}, got {mode!r}")
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the sandbox needs Linux and this is {sys.platform}: run the reward workers on a Linux machine")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = tempfile.mkdtemp(prefix="rlhub-sandbox-")
        bwrap = shutil.which("bwrap") or ""
        arguments = [str(theirs.fileno()), mode, root, bwrap and os.path.abspath(bwrap)]
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _MAIN, _FOLDER, *arguments]
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
        said = json.loads(hello)
        if said["refused"]:
            raise unavailable(mode, said["refused"])
        self.pid, self.maker = said["pid"], said["maker"]
        self.control.settimeout(None)

    def start(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Begins a program; the first descriptor is the socket on which its keeper answers."""
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], descriptors)
        except BrokenPipeError:
            raise SandboxError("the fork server died; the next program starts another") from None

    def close(self) -> None:
        """Programs that still run end with it."""
        self.control.close()
        self.process.wait()


def server(mode: str) -> Server:
    """The fork server of a mode.

    Raises:
        SandboxUnavailable: the machine lacks a layer of the mode.
        SandboxError: it did not start.
    """
    with _lock:
        running = _servers.get(mode)
        if running is not None and running.process.poll() is None:
            return running
        if running is not None:
            running.control.close()
        started = _servers[mode] = Server(mode)
        Finalize(None, started.close, exitpriority=1)
        return started


def close() -> None:
    """Ends the fork servers and what runs in them; the next program starts another."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()


def unavailable(mode: str, cause: str) -> SandboxUnavailable:
    """The error that names the layer that is missing and the way out."""
    if mode == "weak":
        return SandboxUnavailable(f"the weak sandbox cannot run here: {cause}")
    return SandboxUnavailable(
        f"the strong sandbox cannot run here: {cause}. Run on a machine or in a container that allows user namespaces (docs/sandbox.md); "
        "`sandbox: weak` runs model-written programs with resource limits only"
    )


def _after_fork() -> None:
    """A forked grader starts servers of its own."""
    for server in _servers.values():
        server.control.close()
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork)
