"""A root with the interpreter only, and namespaces for each program, by this package's own calls."""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import sys
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from .kernel import (
    BIND,
    DETACH,
    HERE,
    NAMESPACES,
    NEW_MOUNT,
    NEW_USER,
    NO_DEVICES,
    NO_EXEC,
    NO_SUID,
    PRIVATE,
    READ_ONLY,
    RECURSIVE,
    SET_DUMPABLE,
    SET_PARENT_DEATH_SIGNAL,
    Refused,
    call,
    control_process,
)

NOBODY = 65534  # who a program is outside when the grader is root
INSIDE = 1000  # who it is inside
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def enter_root(root: str, proc: int) -> None:
    """Leaves for a new user and mount namespace whose root, mounted at the empty folder `root`, holds the interpreter only, read-only.

    Args:
        proc: a descriptor of /proc, which the new root does not have.

    Raises:
        Refused, OSError: this machine does not allow it.
    """
    enter_user_namespace(proc)
    call("private mounts", "mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    # While this is still the user who may pass through a home folder on the way to the interpreter.
    sources = {path: os.open(path, os.O_PATH) for path in [*interpreter_paths(), *DEVICES]}
    packages = package_folders()
    mount_tmpfs(root, megabytes=1, files=1024)
    os.chdir(root)
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    control_process(SET_DUMPABLE, 1)  # else /proc/self belongs to root from here on
    for path, source in sources.items():
        target = Path("." + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir() if stat.S_ISDIR(os.fstat(source).st_mode) else target.touch()
        call(f"a bind mount of {path}", "mount", f"/proc/self/fd/{source}".encode(), os.fsencode(target), None, BIND, None)
        set_attributes(target, READ_ONLY | NO_SUID | (NO_EXEC if path in DEVICES else NO_DEVICES))
        os.close(source)
    for folder in packages:
        mount_tmpfs("." + folder, megabytes=1, files=1)
        set_attributes(Path("." + folder), READ_ONLY)
    for name in ("tmp", "proc"):
        Path(name).mkdir()
    for link, target in links().items():
        Path("." + link).symlink_to(target)
    set_attributes(Path("."), READ_ONLY)
    call("a root of its own", "pivot_root", b".", b".")
    call("leaving the old root", "umount2", b".", DETACH)
    os.chdir("/")


def enter_user_namespace(proc: int) -> None:
    """Leaves for a new user and mount namespace in which this user is `INSIDE`; root becomes nobody outside, where there is a nobody."""
    outside = (os.getuid(), os.getgid())
    if os.getuid() == 0 and has_nobody():
        outside = (NOBODY, NOBODY)
    with suppress(PermissionError):  # root in a container of one user may not; its groups are nobody's in there
        os.setgroups([])
    go, told = os.pipe()
    server = os.getpid()
    helper = os.fork()
    if helper == 0:  # only someone outside may map another user than oneself
        os.close(told)
        if os.read(go, 1):
            never_returns(map_user, proc, str(server), outside)
        os._exit(1)
    try:
        call("a user namespace", "unshare", NEW_USER | NEW_MOUNT)
        os.write(told, b"!")
    finally:
        os.close(told)
        os.close(go)
        status = os.waitpid(helper, 0)[1]
    if status:
        raise Refused("a user namespace: its user map cannot be written")


def interpreter_paths() -> list[str]:
    """Files and folders outside which the interpreter needs nothing, none inside another."""
    folders = library_folders()
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    loader = {path for path in ("/usr/lib64", "/lib64") if os.path.isdir(path) and not os.path.islink(path)}
    paths = {os.path.realpath(path) for path in [*folders, *standard, *loader, sys.executable]}
    return sorted(path for path in paths if not any(path.startswith(other + "/") for other in paths))


def library_folders() -> set[str]:
    """Of the shared libraries that this process has loaded."""
    loaded = [line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
    return {os.path.dirname(path) for path in loaded if path.startswith("/")}


def package_folders() -> list[str]:
    """Where packages are installed inside the standard library's folder: they are none of a program's business."""
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    return [folder for name in ("site-packages", "dist-packages") if os.path.isdir(folder := os.path.join(library, name))]


def links() -> dict[str, str]:
    """Symbolic links of the root: the machine's own, and shared memory in the private /tmp."""
    return {f"/{name}": os.readlink(f"/{name}") for name in ("bin", "lib", "lib64") if os.path.islink(f"/{name}")} | {"/dev/shm": "/tmp"}


def enter_namespaces(request: dict[str, Any], proc: int) -> None:
    """New namespaces for the next child, with nothing writable but a small /tmp."""
    call("namespaces of its own", "unshare", sum(NAMESPACES.values()))
    control_process(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    control_process(SET_DUMPABLE, 1)
    map_user(proc, "self", (INSIDE, INSIDE))
    mount_tmpfs("/tmp", request["disk_megabytes"], files=1024)
    os.close(proc)
    socket.sethostname("sandbox")


def map_user(proc: int, process: str, outside: tuple[int, int]) -> None:
    """Makes the user `INSIDE` of a process's new user namespace the user and group `outside` of its parent."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE} {outside[0]} 1"),
        ("gid_map", f"{INSIDE} {outside[1]} 1"),
    ):
        descriptor = os.open(f"{process}/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def has_nobody() -> bool:
    """Whether this user namespace has a nobody: the root of a rootless container may be its only user."""
    return all(
        any(first <= NOBODY < first + count for first, _, count in (map(int, line.split()) for line in Path(ids).read_text().splitlines()))
        for ids in ("/proc/self/uid_map", "/proc/self/gid_map")
    )


def mount_tmpfs(path: str, megabytes: int, files: int) -> None:
    options = f"size={megabytes}m,nr_inodes={files},mode=0755,uid={INSIDE},gid={INSIDE}".encode()
    call(f"a tmpfs at {path}", "mount", b"tmpfs", os.fsencode(path), b"tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, options)


def set_attributes(path: Path, attributes: int) -> None:
    call("read-only mounts (Linux 5.12)", "mount_setattr", HERE, os.fsencode(path), 0, struct.pack("QQQQ", attributes, 0, 0, 0), 32)


def never_returns(work: Any, *arguments: Any) -> NoReturn:
    """A forked child must not go on in its parent's loop."""
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
