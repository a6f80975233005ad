"""What goes into the sandbox and comes out of it: limits, how a program ended, and what its tests said."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("strong", "weak")


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


DEFAULT_LIMITS = Limits()


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
