"""One grading process as its parent sees it: started clean, watched, and ended with everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import psutil

from rewards.pool.child import IDLE, LENGTH, PROGRESS, TOGETHER
from rewards.pool.settings import RewardPoolConfig
from rlhub.errors import UserError
from rlhub.siblings import ROOT

START_SECONDS = 120.0  # for a process to load its grader
POLL_SECONDS = 0.05  # between looks at a busy process's clock and memory

# First `rlhub`, which finds its neighbours wherever the path leads: a `rewards.py` of the user's may lie in the current folder.
_MAIN = (
    "import sys; sys.path[0] = sys.argv[1]; import rlhub; sys.path[:] = sys.argv[2:]; sys.argv[1:] = []; "
    "from rewards.pool.child import main; main()"
)


@dataclass(frozen=True)
class Failure:
    """What went wrong: `status` and `detail` for the grade of the item at `index` (or `IDLE`, `TOGETHER`), and whether another process
    is needed."""

    status: str
    detail: str
    index: int
    is_fatal: bool = True


class RewardProcess:
    """A process that grades batches. It is a fresh interpreter, since a fork of a process with threads may hang, and imports neither the
    caller's main module nor PyTorch. All methods belong to one event loop in a thread that lives as long as the process."""

    def __init__(self, part: dict[str, Any], config: RewardPoolConfig) -> None:
        self.deadline_seconds, self.memory_bytes = config.deadline_seconds, config.memory_megabytes * 2**20
        with tempfile.TemporaryFile() as shared:
            shared.write(PROGRESS.pack(IDLE, 0.0))
            shared.flush()
            self.progress = mmap.mmap(shared.fileno(), PROGRESS.size)
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, ROOT, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[shared.fileno()],
                start_new_session=True,  # so that all that it starts can be ended with it, and Ctrl-C is the parent's affair
            )
            self.hello: dict[str, Any] = {"part": part, "progress": shared.fileno(), "deadline_seconds": config.deadline_seconds}
        self.reading: asyncio.Task[Any] | None = None
        self.pipes: list[asyncio.BaseTransport] = []

    async def start(self) -> str:
        """The grader's version, once it is loaded.

        Raises:
            UserError: it cannot be loaded.
        """
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader()
        source, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self.reader), self.process.stdout)
        self.pipes.append(source)
        self.sink, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self.process.stdin)
        self.pipes.append(self.sink)
        self.send(self.hello)
        try:
            async with asyncio.timeout(START_SECONDS):  # wait_for of Python 3.11 loses a cancellation that comes with the answer
                ready = await self._receive()
        except TimeoutError:
            raise UserError(f"the reward {self.hello['part'].get('name')!r} did not load within {START_SECONDS:g} s") from None
        except (asyncio.IncompleteReadError, OSError):
            await self._gone()
            raise UserError(f"the process of reward {self.hello['part'].get('name')!r} {self._end()} while it loaded") from None
        if "error" in ready:
            raise UserError(ready["error"])
        if ready["own_limits"]:
            self.deadline_seconds = self.memory_bytes = math.inf
        return ready["version"]

    @property
    def has_ended(self) -> bool:
        """Without collecting it, so that its number is not given to another process before its session is ended."""
        try:
            return self.process.returncode is not None or psutil.Process(self.process.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def send(self, message: Any) -> None:
        """Hands a message over; the event loop writes it."""
        payload = pickle.dumps(message)
        self.sink.write(LENGTH.pack(len(payload)) + payload)

    async def next(self) -> tuple[list[tuple[int, Any]], bool] | Failure:
        """The next results of a batch, or what failed: a call for all items raised, or the process passed the deadline or the memory
        limit, or is gone."""
        while True:
            self.reading = self.reading or asyncio.ensure_future(self._receive())
            await asyncio.wait({self.reading}, timeout=min(POLL_SECONDS, self.deadline_seconds / 4))
            index, since = PROGRESS.unpack(self.progress[:])
            if self.reading.done():
                reading, self.reading = self.reading, None
                try:
                    message = reading.result()
                    if isinstance(message, tuple):
                        return message
                    if "raised" in message:
                        return Failure("crashed", message["raised"], TOGETHER, is_fatal=False)
                    return Failure("crashed", message["error"], index)
                except (asyncio.IncompleteReadError, OSError):
                    await self._gone()
                    return Failure("crashed", f"the grading process {self._end()}", index)
                except Exception as error:  # a grader that wrote into the channel
                    return Failure("crashed", f"the grading process sent what cannot be read: {error}", index)
            if self.has_ended:  # although something that it started still holds its end of the pipe
                return Failure("crashed", f"the grading process {self._end()}", index)
            if index != IDLE and time.monotonic() - since > self.deadline_seconds:
                return Failure("timeout", f"took longer than {self.deadline_seconds:g} s (reward_pool.deadline_seconds)", index)
            if self._memory() > self.memory_bytes:
                limit = f"{self.memory_bytes / 2**20:g} MB (reward_pool.memory_megabytes)"
                return Failure("crashed", f"the grading process took more memory than {limit}", index)

    async def end(self) -> None:
        """Ends the process, and what it started and has not left its session."""
        if self.reading is not None:
            self.reading.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self._gone(5.0)
        self.process.poll()
        for pipe in self.pipes:
            pipe.close()
        self.progress.close()

    async def _receive(self) -> Any:
        (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
        return pickle.loads(await self.reader.readexactly(length))

    async def _gone(self, seconds: float = 0.5) -> None:
        """Waits a while for the end of a process that was ended or has closed its pipe."""
        until = time.monotonic() + seconds
        while not self.has_ended and time.monotonic() < until:
            await asyncio.sleep(0.002)

    def _end(self) -> str:
        code = self.process.poll()
        if code is None:
            return "closed its channel"
        if code >= 0:
            return f"exited with code {code}"
        return f"was ended by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"

    def _memory(self) -> int:
        try:
            return psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:  # it has just ended
            return 0
