"""The grading process: loads one grader and answers batches of items, until its parent ends it or goes away.

Messages are pickles after their length (8 bytes), on what were standard input and output; whatever a grader prints goes nowhere. While it
works, the process notes in shared memory which item it is at and since when (by the machine's monotonic clock), so that the parent knows
the guilty one of a batch when it has to end the process or finds it dead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

from rewards import load_grader
from rewards._grader import Grader, Item, WrongCount, crashed
from rlhub.types import RewardResult

IDLE, TOGETHER = -2, -1  # in the place of an item's index: between items, and a call for all of them
PROGRESS = struct.Struct("=qd")  # index of the item, seconds
LENGTH = struct.Struct("=Q")
FLUSH_SECONDS = 0.02  # results wait at most this long before they are sent
GRACE_SECONDS = 1.0  # that coroutines get to notice their own deadline

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """The first message is `{"part", "progress": file descriptor, "deadline_seconds"}`, every other one `(items, until, alone)`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    hello = _receive(requests)
    progress = mmap.mmap(hello["progress"], PROGRESS.size)
    try:
        grader = load_grader(hello["part"])
        grader.prepare()
    except (Exception, SystemExit) as error:
        _send(answers, {"error": str(error) if isinstance(error, ValueError) else crashed(error).detail})
        return
    _send(answers, {"version": grader.version, "own_limits": grader.own_limits})
    while True:
        try:
            batch = _receive(requests)
        except Exception as error:  # a column of a type that this process cannot make
            _send(answers, {"error": f"the items cannot be read: {crashed(error).detail}"})
            continue
        if batch is None:
            return
        _grade(grader, *batch, None if grader.own_limits else hello["deadline_seconds"], progress, answers)


def _grade(
    grader: Grader, items: list[Item], until: float, alone: bool, deadline_seconds: float | None, progress: mmap.mmap, answers: BinaryIO
) -> None:
    """Sends `([(index, result), ...], is last)` one or more times, or `{"raised": why}` when the one call for all of them raised.

    Items that have not begun by `until` get no result, except the first.
    """

    def note(index: int, since: float = 0.0) -> None:
        progress[:] = PROGRESS.pack(index, since)

    if grader.batched and not alone:
        note(TOGETHER, time.monotonic() + (GRACE_SECONDS if grader.many is None else 0.0))
        try:
            answer = (list(enumerate(grader.grade_batch(items, deadline_seconds))), True)
        except WrongCount as error:
            answer = ([(index, RewardResult(float("nan"), "crashed", str(error))) for index in range(len(items))], True)
        except (Exception, SystemExit) as error:
            answer = {"raised": crashed(error).detail}
        note(IDLE)
        _send(answers, answer)
        return
    results, flushed = [], time.monotonic()
    for index, item in enumerate(items):
        now = time.monotonic()
        if index and now > until:
            break
        if now - flushed > FLUSH_SECONDS:
            note(IDLE)
            _send(answers, (results, False))
            results, flushed = [], now
        note(index, now)
        results.append((index, grader.grade_alone(item)))
    note(IDLE)
    _send(answers, (results, True))


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(LENGTH.size)
    return pickle.loads(stream.read(*LENGTH.unpack(header))) if len(header) == LENGTH.size else None


def _send(stream: BinaryIO, message: Any) -> None:
    payload = pickle.dumps(message)
    stream.write(LENGTH.pack(len(payload)) + payload)
    stream.flush()
