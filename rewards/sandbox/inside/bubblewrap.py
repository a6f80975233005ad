"""The same root by bubblewrap (`bwrap`), where it is installed: its namespaces, mounts and pivot instead of `namespaces.enter_root`.

bubblewrap executes a command in the root that it has made, so the fork server begins anew in there. It reads its own source from copies
in /tmp, which each program's own /tmp then hides. What is done for each program is `namespaces.enter_namespaces`, in this root as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from .kernel import Refused
from .namespaces import DEVICES, INSIDE, NOBODY, enter_namespaces, has_nobody, interpreter_paths, library_folders, links, package_folders

TRY_SECONDS = 5.0

_RESUME = "import sys; sys.path.append('/tmp'); from inside.server import resume; sys.path.pop(); resume(*sys.argv[1:])"
_TRY = "import sys; sys.path.append('/tmp'); from inside.bubblewrap import attempt; attempt(sys.argv[1])"


def become_server(bwrap: str, control: int, proc: int) -> NoReturn:
    """Replaces this process by bubblewrap with a fork server in it, after it was tried that this works.

    Args:
        control: the socket to the grader.
        proc: a descriptor of /proc, which the new root does not have.

    Raises:
        Refused, OSError: bubblewrap cannot make a root in which a program has what it has in ours, and no more.
    """
    user = {}
    if os.getuid() == 0:
        # Not even in a user namespace: no process limit holds root, and what is root's outside would be the program's.
        if not has_nobody():
            raise Refused("it has to run as nobody, and this container has no such user")
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    for descriptor in (control, proc):
        os.set_inheritable(descriptor, True)
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(sorted(library_folders()))}  # there is no /etc/ld.so.cache in there
    files = _files()
    settings = {"capture_output": True, "text": True, "timeout": TRY_SECONDS, "env": environment, **user}
    try:
        tried = subprocess.run([*_command(bwrap, files), "-c", _TRY, str(proc)], pass_fds=[proc, *files], **settings)
        version = subprocess.run([bwrap, "--version"], **settings).stdout.strip()
    except subprocess.TimeoutExpired:
        raise Refused(f"it did not end within {TRY_SECONDS:g} s") from None
    finally:
        for descriptor in files:
            os.close(descriptor)
    if tried.returncode:
        raise Refused((tried.stderr.strip().splitlines() or [f"it ended with code {tried.returncode}"])[-1])
    command = [*_command(bwrap, _files()), "-c", _RESUME, str(control), str(proc), version]
    if user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execve(bwrap, command, environment)


def attempt(proc: str) -> None:
    """In bubblewrap's root: ends with code 0 where namespaces for programs can be made, else with a line that says why not."""
    try:
        enter_namespaces({"disk_megabytes": 1}, int(proc))
    except OSError as error:
        sys.exit(str(error))


def _files() -> dict[int, str]:
    """Our own source: inheritable descriptors of copies in memory, which a user can read who cannot reach the files."""
    files = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        descriptor = os.memfd_create(path.name, 0)
        os.write(descriptor, path.read_bytes())
        os.lseek(descriptor, 0, os.SEEK_SET)
        files[descriptor] = path.name
    return files


def _command(bwrap: str, files: dict[int, str]) -> list[str]:
    """bubblewrap's command line up to the interpreter's options; the order is that in which it mounts."""
    command = [bwrap, "--unshare-user", "--uid", str(INSIDE), "--gid", str(INSIDE)]
    for path in interpreter_paths():
        command += ["--ro-bind", path, path]
    for device in DEVICES:
        command += ["--dev-bind", device, device, "--remount-ro", device]
    for folder in package_folders():
        command += ["--tmpfs", folder, "--remount-ro", folder]
    for link, target in links().items():
        command += ["--symlink", target, link]
    command += ["--dir", "/proc", "--dir", "/tmp"]
    for descriptor, name in files.items():
        command += ["--ro-bind-data", str(descriptor), f"/tmp/inside/{name}"]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--", os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-X", "utf8"]
