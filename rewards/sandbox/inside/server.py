"""The sandbox's fork server: builds the minimal root once, then makes one set of namespaces for each program.

Run as a script in a fresh interpreter, so that no program shares memory with the grader; standard library only. From the outside in:

    grader (rewards.sandbox.client)
      server        user and mount namespace; its root holds the interpreter, its libraries and nothing else
        keeper      one per program: new user, pid, mount, network, ipc and uts namespaces; ends them when told to or when the grader dies
          init      pid 1 of the program's namespace: limits, no capabilities, seccomp; when it ends, the kernel ends all that is left
            program
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import importlib.util
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import sysconfig
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# By its file: this folder must not come before the standard library.
_spec = importlib.util.spec_from_file_location("roles", Path(__file__).with_name("judge.py"))
roles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(roles)

NOBODY = 65534  # who a program is outside when the grader is root
INSIDE = 1000  # who it is inside
NEW_USER, NEW_MOUNT = 0x10000000, 0x00020000
NAMESPACES = {"user": NEW_USER, "mount": NEW_MOUNT, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
BIND, PRIVATE, RECURSIVE, DETACH, HERE = 0x1000, 0x40000, 0x4000, 2, -100
READY = b"+"
DEVICES = ("null", "zero", "full", "random", "urandom")
PRELOADED = ("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "re", "string", "typing")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

SET_PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, DROP_BOUNDING, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 24, 38

# Numbers on x86_64 and aarch64; -1 where there is none.
USED = {
    "unshare": (272, 97),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "mount_setattr": (442, 442),
    "capset": (126, 91),
    "prctl": (157, 167),
}
FORBIDDEN = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    # mounts, namespaces, names
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "unshare": (272, 97),
    "setns": (308, 268),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # sockets; a socketpair leads nowhere and asyncio needs one
    "socket": (41, 198),
    # memory that no limit of a process counts
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # wide doors into the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "vmsplice": (278, 75),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "personality": (135, 92),
    "modify_ldt": (154, -1),
    "uselib": (134, -1),
    "lookup_dcookie": (212, 18),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "vhangup": (153, 58),
}
CLONE, CLONE3 = (56, 220), (435, 435)
LAST_KNOWN = 462  # a younger call does not exist inside, whatever the kernel offers
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(OSError):
    """The machine does not offer a layer."""


def main(control: socket.socket, strong: bool, root: str) -> None:
    if platform.machine() not in ARCHITECTURES and strong:
        return _hello(control, f"the seccomp filter knows {', '.join(ARCHITECTURES)}, this machine is {platform.machine()}")
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    try:
        if strong:
            enter_root(root, proc)
    except OSError as error:
        return _hello(control, str(error))
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # forked children then leave these pages shared
    _hello(control, "")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 65536, 16)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _never_returns(keep, json.loads(message), descriptors, proc)
        for descriptor in descriptors:
            os.close(descriptor)


def enter_root(root: str, proc: int) -> None:
    """Leaves for a new user and mount namespace whose root is a read-only tree with the interpreter only."""
    outside = (os.getuid(), os.getgid())
    if os.getuid() == 0 and _exists("uid_map", NOBODY) and _exists("gid_map", NOBODY):
        outside = (NOBODY, NOBODY)
    with suppress(PermissionError):  # root in a container of one user may not; its groups are nobody's in there
        os.setgroups([])
    go, told = os.pipe()
    server = os.getpid()
    helper = os.fork()
    if helper == 0:  # only someone outside may map another user than oneself
        os.close(told)
        if os.read(go, 1):
            _never_returns(_map_user, proc, str(server), outside)
        os._exit(1)
    try:
        _call("a user namespace", "unshare", NEW_USER | NEW_MOUNT)
        os.write(told, b"!")
    finally:
        os.close(told)
        os.close(go)
        status = os.waitpid(helper, 0)[1]
    if status:
        raise Refused("a user namespace: its user map cannot be written")
    _call("private mounts", "mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    # While this is still the user who may pass through a home folder on the way to the interpreter.
    sources = {path: os.open(path, os.O_PATH) for path in [*interpreter_paths(), *(f"/dev/{name}" for name in DEVICES)]}
    _mount_tmpfs(root, megabytes=1, files=1024)
    os.chdir(root)
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    _prctl(SET_DUMPABLE, 1)  # else /proc/self belongs to root from here on
    for path, source in sources.items():
        target = Path("." + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir() if stat.S_ISDIR(os.fstat(source).st_mode) else target.touch()
        _call(f"a bind mount of {path}", "mount", f"/proc/self/fd/{source}".encode(), os.fsencode(target), None, BIND, None)
        _set_attributes(target, READ_ONLY | NO_SUID | (NO_EXEC if path.startswith("/dev/") else NO_DEVICES))
        os.close(source)
    for name in ("site-packages", "dist-packages"):  # what is installed is none of a program's business
        packages = Path("." + os.path.realpath(sysconfig.get_path("stdlib")), name)
        if packages.is_dir():
            _mount_tmpfs(str(packages), megabytes=1, files=1)
            _set_attributes(packages, READ_ONLY)
    for name in ("tmp", "proc"):
        Path(name).mkdir()
    Path("dev/shm").symlink_to("/tmp")
    for name in ("bin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            Path(name).symlink_to(os.readlink(f"/{name}"))
    _set_attributes(Path("."), READ_ONLY)
    _call("a root of its own", "pivot_root", b".", b".")
    _call("leaving the old root", "umount2", b".", DETACH)
    os.chdir("/")


def interpreter_paths() -> list[str]:
    """Files and folders outside which the interpreter needs nothing, none inside another."""
    loaded = [line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
    folders = {os.path.dirname(path) for path in loaded if path.startswith("/")}
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    loader = {path for path in ("/usr/lib64", "/lib64") if os.path.isdir(path) and not os.path.islink(path)}
    paths = {os.path.realpath(path) for path in [*folders, *standard, *loader, sys.executable]}
    return sorted(path for path in paths if not any(path.startswith(other + "/") for other in paths))


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
        _never_returns(init, request, [*descriptors[1:], gate, ready], work)
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


def enter_namespaces(request: dict[str, Any], proc: int) -> None:
    """New namespaces for the next child, with nothing writable but a small /tmp."""
    _call("namespaces of its own", "unshare", sum(NAMESPACES.values()))
    _prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _prctl(SET_DUMPABLE, 1)
    _map_user(proc, "self", (INSIDE, INSIDE))
    _mount_tmpfs("/tmp", request["disk_megabytes"], files=1024)
    os.close(proc)
    socket.sethostname("sandbox")


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


def limit_resources(request: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: request["cpu_seconds"],
        resource.RLIMIT_AS: request["memory_megabytes"] * 2**20,
        resource.RLIMIT_FSIZE: request["disk_megabytes"] * 2**20,
        resource.RLIMIT_NOFILE: request["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    # Without a user namespace of its own the limit counts all processes of the grader's user, so there it would say nothing.
    if request["strong"]:
        limits[resource.RLIMIT_NPROC] = request["processes"] + 2  # keeper and init
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_capabilities() -> None:
    for capability in range(64):
        with suppress(Refused):  # beyond the last one that this kernel knows
            _prctl(DROP_BOUNDING, capability)
    nothing = struct.pack("II", 0x20080522, 0), bytes(24)
    _call("dropping capabilities", "capset", *nothing)
    _prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _prctl(SET_NO_NEW_PRIVILEGES, 1)


def forbid_calls() -> None:
    code = filter_code(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _call("a seccomp filter", "prctl", SET_SECCOMP, 2, program)


def filter_code(machine: str) -> bytes:
    """The classic BPF program over `struct seccomp_data` {number, architecture, instruction pointer, arguments[6]}."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, greater, any_bit, answer = 0x20, 0x15, 0x25, 0x45, 0x06
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(greater, 0, 1, LAST_KNOWN), (answer, 0, 0, missing)]  # also every call of the x32 interface
    code += [(equal, 0, 1, CLONE3[column]), (answer, 0, 0, missing)]  # its flags lie in memory; libc falls back to clone
    for numbers in FORBIDDEN.values():
        if numbers[column] >= 0:
            code += [(equal, 0, 1, numbers[column]), (answer, 0, 0, deny)]
    code += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16)]
    code += [(any_bit, 0, 1, sum(NAMESPACES.values()) | 0x02000000), (answer, 0, 0, deny), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _play(role: str) -> NoReturn:
    """The program's process: descriptors 0 to 3 are its three streams and the payload, the others pipes to its counterpart."""
    code = 1
    try:
        with open(3, "rb") as file:
            payload = json.load(file)
        random.seed(0)  # of this throw-away process: a program is graded the same every time
        sys.argv = ["program.py"]
        if role == "script":
            roles.run_script(payload)
        elif role == "serve":
            roles.serve(payload, os.fdopen(4, "rb"), os.fdopen(5, "wb"))
        else:
            roles.judge(payload, os.fdopen(4, "wb"), os.fdopen(5, "rb"), os.fdopen(6, "wb"))
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


def _map_user(proc: int, process: str, outside: tuple[int, int]) -> None:
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE} {outside[0]} 1"),
        ("gid_map", f"{INSIDE} {outside[1]} 1"),
    ):
        descriptor = os.open(f"{process}/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def _exists(name: str, number: int) -> bool:
    """Whether this user namespace has such a user: the root of a rootless container may be its only one."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self", name).read_text().splitlines()]
    return any(first <= number < first + count for first, _, count in ranges)


def _mount_tmpfs(path: str, megabytes: int, files: int) -> None:
    options = f"size={megabytes}m,nr_inodes={files},mode=0755,uid={INSIDE},gid={INSIDE}".encode()
    _call(f"a tmpfs at {path}", "mount", b"tmpfs", os.fsencode(path), b"tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, options)


def _set_attributes(path: Path, attributes: int) -> None:
    _call("read-only mounts (Linux 5.12)", "mount_setattr", HERE, os.fsencode(path), 0, struct.pack("QQQQ", attributes, 0, 0, 0), 32)


def _prctl(option: int, value: int) -> None:
    _call(f"prctl {option}", "prctl", option, value)


def _call(layer: str, name: str, *arguments: Any) -> None:
    number = USED[name][ARCHITECTURES[platform.machine()][0]]
    padded = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    if _libc.syscall(ctypes.c_long(number), *padded, *[ctypes.c_long(0)] * (5 - len(padded))) < 0:
        raise Refused(f"{layer}: {name}: {os.strerror(ctypes.get_errno())}")


def _never_returns(work: Any, *arguments: Any) -> NoReturn:
    """A forked child must not go on in its parent's loop."""
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _hello(control: socket.socket, refused: str) -> None:
    control.send(json.dumps({"refused": refused}).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2] == "strong", sys.argv[3])
