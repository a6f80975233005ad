"""Memory and process cgroups for programs, where this user may make them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

from rewards.sandbox.programs import Limits

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_PREFIX = "rlhub-program-"
CGROUP_LIMITS = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max",)}

_lock = threading.Lock()


class Cgroups:
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
def cgroups() -> Cgroups:
    """Those of this process."""
    return Cgroups()


os.register_at_fork(after_in_child=cgroups.cache_clear)  # a forked grader has cgroups of its own
