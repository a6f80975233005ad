"""What pid 1 of a program's namespaces gives up before the program begins: resources, capabilities, system calls."""

from __future__ import annotations

import ctypes
import errno
import platform
import resource
import signal
import struct
from contextlib import suppress
from typing import Any

from .kernel import (
    ARCHITECTURES,
    DROP_BOUNDING,
    NAMESPACES,
    SET_NO_NEW_PRIVILEGES,
    SET_PARENT_DEATH_SIGNAL,
    SET_SECCOMP,
    Refused,
    call,
    control_process,
)

# Numbers on x86_64 and aarch64; -1 where there is none.
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


def limit_resources(request: dict[str, Any]) -> None:
    """The limits of one process, of those that the grader asks for; never more than this process has."""
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
            control_process(DROP_BOUNDING, capability)
    nothing = struct.pack("II", 0x20080522, 0), bytes(24)
    call("dropping capabilities", "capset", *nothing)
    control_process(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    control_process(SET_NO_NEW_PRIVILEGES, 1)


def forbid_calls() -> None:
    code = filter_code(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    call("a seccomp filter", "prctl", SET_SECCOMP, 2, program)


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
