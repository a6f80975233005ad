"""The fork server: enters the minimal root once, then makes one set of namespaces for each program.

It is a fresh interpreter, so that no program shares memory with the grader. From the outside in:

    grader (rewards.sandbox.client)
      server        user and mount namespace; its root holds the interpreter, its libraries and nothing else
        keeper      one per program: new user, pid, mount, network, ipc and uts namespaces; ends them when told to or when the grader dies
          init      pid 1 of the program's namespace: limits, no capabilities, seccomp; when it ends, the kernel ends all that is left
            program
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import platform
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from .bubblewrap import become_server
from .judge import judge
from .kernel import ARCHITECTURES, SET_PARENT_DEATH_SIGNAL, control_process
from .namespaces import enter_namespaces, enter_root, never_returns
from .privileges import drop_capabilities, forbid_calls, limit_resources
from .program import run_script, serve

READY = b"+"
PRELOADED = ("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "re", "string", "typing")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


def main(control: str, mode: str, root: str, bubblewrap: str) -> None:
    """Enters the root, by bubblewrap where that can make one as good, and serves programs until the grader hangs up.

    Args:
        control: number of the descriptor on which requests arrive.
        root: an empty folder.
        bubblewrap: path of `bwrap`; empty where there is none.
    """
    grader = socket.socket(fileno=int(control))
    if mode == "weak":
        return serve_programs(grader, -1, "")
    if platform.machine() not in ARCHITECTURES:
        return _hello(grader, f"the seccomp filter knows {', '.join(ARCHITECTURES)}, this machine is {platform.machine()}")
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    maker = "rewards.sandbox (bwrap is not on the PATH)"
    if bubblewrap:
        try:
            become_server(bubblewrap, grader.fileno(), proc)
        except OSError as error:
            maker = f"rewards.sandbox ({bubblewrap} cannot do it: {error})"
    try:
        enter_root(root, proc)
    except OSError as error:
        return _hello(grader, str(error))
    serve_programs(grader, proc, maker)


def resume(control: str, proc: str, maker: str) -> None:
    """`main` once more, in the root that bubblewrap has made."""
    control_process(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # its parent is bubblewrap
    serve_programs(socket.socket(fileno=int(control)), int(proc), maker)


def serve_programs(control: socket.socket, proc: int, maker: str) -> None:
    """Makes a keeper for each request; returns when the grader hangs up. `maker` made the root."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # forked children then leave these pages shared
    _hello(control, "", maker)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 65536, 16)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            never_returns(keep, json.loads(message), descriptors, proc)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(request: dict[str, Any], descriptors: list[int], proc: int) -> None:
    """Starts one program and ends it: when its init ends, when the grader says so, and when the grader is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    grader = socket.socket(fileno=descriptors[0])
    work = "/tmp"
    try:
        if request["strong"]:
            enter_namespaces(request, proc)
        else:
            work = tempfile.mkdtemp(prefix="rlhub-program-")
    except OSError as error:
        grader.send(json.dumps({"refused": str(error)}).encode())
        return
    gate, opened = os.pipe()
    answer, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(opened)
        never_returns(init, request, [*descriptors[1:], gate, ready], work)
    for descriptor in [gate, ready, *descriptors[1:]]:
        os.close(descriptor)
    if (said := os.read(answer, 4096)) != READY:
        grader.send(json.dumps({"refused": said.decode() or "init ended before the program began"}).encode())
        return
    init_descriptor = os.pidfd_open(pid)
    grader.send(json.dumps({"pid": pid}).encode())
    if grader.recv(64) == b"go":
        os.write(opened, b"!")
        select.select([grader, init_descriptor], [], [])
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(init_descriptor, signal.SIGKILL)
    if not request["strong"]:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not request["strong"]:
        shutil.rmtree(work, ignore_errors=True)
    with suppress(BrokenPipeError):
        grader.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())


def init(request: dict[str, Any], descriptors: list[int], work: str) -> None:
    """Gives up everything, then as pid 1 starts the program and waits for it to end."""
    os.setsid()
    os.chdir(work)
    os.umask(0o077)
    os.environ.clear()
    os.environ.update({**ENVIRONMENT, "HOME": work, "TMPDIR": work})
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in descriptors]  # a target may be one of the sources
    for position, copy in enumerate(copies):
        os.dup2(copy, position)
    os.closerange(len(descriptors), 1024)
    gate, ready = len(descriptors) - 2, len(descriptors) - 1
    try:
        limit_resources(request)
        if request["strong"]:
            drop_capabilities()
            forbid_calls()
    except OSError as error:
        os.write(ready, str(error).encode())
        return
    os.write(ready, READY)
    if not os.read(gate, 1):
        return
    os.close(gate)
    os.close(ready)
    program = os.fork()
    if program == 0:
        _play(request["role"])
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _play(role: str) -> NoReturn:
    """The program's process: descriptors 0 to 3 are its three streams and the payload, the others pipes to its counterpart."""
    code = 1
    try:
        with open(3, "rb") as file:
            payload = json.load(file)
        random.seed(0)  # of this throw-away process: a program is graded the same every time
        sys.argv = ["program.py"]
        if role == "script":
            run_script(payload)
        elif role == "serve":
            serve(payload, os.fdopen(4, "rb"), os.fdopen(5, "wb"))
        else:
            judge(payload, os.fdopen(4, "wb"), os.fdopen(5, "rb"), os.fdopen(6, "wb"))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


def _hello(control: socket.socket, refused: str, maker: str = "") -> None:
    control.send(json.dumps({"refused": refused, "maker": maker, "pid": os.getpid()}).encode())
