"""System calls that Python has no function for, by number."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Numbers on x86_64 and aarch64; -1 where there is none.
# Of the calls that are made by number, on x86_64 and aarch64.
USED = {
    "unshare": (272, 97),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "mount_setattr": (442, 442),
    "capset": (126, 91),
    "prctl": (157, 167),
}

# Linux's numbers for what Python has no name for.
NEW_USER, NEW_MOUNT = 0x10000000, 0x00020000
NAMESPACES = {"user": NEW_USER, "mount": NEW_MOUNT, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
BIND, PRIVATE, RECURSIVE, DETACH, HERE = 0x1000, 0x40000, 0x4000, 2, -100
SET_PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, DROP_BOUNDING, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(OSError):
    """The machine does not offer a layer."""


def call(layer: str, name: str, *arguments: Any) -> None:
    """Makes the system call `name`; raises Refused, which says that `layer` is not to be had here and why."""
    number = USED[name][ARCHITECTURES[platform.machine()][0]]
    padded = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    if _libc.syscall(ctypes.c_long(number), *padded, *[ctypes.c_long(0)] * (5 - len(padded))) < 0:
        raise Refused(f"{layer}: {name}: {os.strerror(ctypes.get_errno())}")


def control_process(option: int, value: int) -> None:
    """`prctl`; raises Refused."""
    call(f"prctl {option}", "prctl", option, value)
