"""HTTP: grades from a server, such as `rlhub reward serve NAME` on another machine.

POST <url>/grade with {"items": [{"prompt", "completion", "row"}, ...]} answers {"results": [{"value", "status", "detail", "parts"?}, ...]},
one per item in order, with null for a value that is no number. GET <url>/health answers {"status": "ok", "grader", "version", ...}.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewards import Item, Prompt
from rewards._grader import from_json
from rlhub.extras import require
from rlhub.types import RewardResult

FIRST_PAUSE = 0.2  # seconds before the second attempt; each later pause is twice as long


@dataclass(frozen=True)
class Config:
    """`url`: of the server. `timeout_seconds`: for a batch with all its attempts. `retries`: after refused or broken connections, server
    errors (5xx) and 429."""

    url: str = ""
    timeout_seconds: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must be http://HOST:PORT or https://..., got {self.url!r}")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")


async def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """The server's grade of one completion."""
    return (await grade_batch([(prompt, completion, row)], config))[0]


async def grade_batch(items: Sequence[Item], config: Config) -> list[RewardResult]:
    """The server's grades. Without an answer in time all have status `timeout`, without a usable one `crashed`, and the detail says why."""
    body = {"items": [{"prompt": prompt, "completion": completion, "row": row} for prompt, completion, row in items]}
    try:
        return _results(await _ask(config, "POST", "/grade", json.dumps(body, allow_nan=False)), len(items))
    except TimeoutError:
        failure = RewardResult(math.nan, "timeout", f"{config.url} gave no answer within {config.timeout_seconds:g} s")
    except _Unusable as error:
        failure = RewardResult(math.nan, "crashed", f"{config.url}: {error}")
    return [failure] * len(items)


def own_limits(config: Config) -> bool:
    """Yes: `timeout_seconds`."""
    return True


def prepare(config: Config) -> None:
    """Checks that a healthy server answers.

    Raises:
        ValueError: there is none, or aiohttp is not installed.
    """
    require("aiohttp")
    try:
        health = asyncio.run(_ask(config, "GET", "/health"))
    except (_Unusable, TimeoutError) as error:
        reason = str(error) or f"no answer within {config.timeout_seconds:g} s"
        raise ValueError(f"no reward server at {config.url}: {reason}; start one with: rlhub reward serve NAME --port PORT") from None
    if not isinstance(health, dict) or health.get("status") != "ok":
        raise ValueError(f"the reward server at {config.url} is not healthy: {health!r:.200}")


def version(config: Config) -> str:
    """Another one each time: what the server grades with may change at any moment, so grades are cached for one process only."""
    return uuid.uuid4().hex


class _Unusable(Exception):
    """The server cannot be reached, refuses, or answers something else."""


async def _ask(config: Config, method: str, path: str, body: str | None = None) -> Any:
    """The JSON that the server answers.

    Raises:
        TimeoutError, _Unusable: see the names.
    """
    import aiohttp

    until = time.monotonic() + config.timeout_seconds
    url, headers = config.url.rstrip("/") + path, {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session:
        for attempt in range(config.retries + 1):
            limit = aiohttp.ClientTimeout(total=max(until - time.monotonic(), 0.001))
            try:
                async with session.request(method, url, data=body, headers=headers, timeout=limit) as response:
                    if response.status == 200:
                        return json.loads(await response.read())
                    problem = f"status {response.status}: {(await response.text(errors='replace'))[:500]}"
                    if response.status < 500 and response.status != 429:
                        raise _Unusable(problem)
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:
                raise _Unusable(f"the answer is not JSON ({error})") from error
            pause = FIRST_PAUSE * 2**attempt
            if attempt < config.retries:
                if time.monotonic() + pause > until:
                    raise TimeoutError(problem)
                await asyncio.sleep(pause)
    raise _Unusable(f"{problem} ({config.retries + 1} attempts)")


def _results(answer: Any, count: int) -> list[RewardResult]:
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise _Unusable(f'the answer has no list "results": {answer!r:.200}')
    if len(results) != count:
        raise _Unusable(f"{len(results)} results for {count} items")
    try:
        return [from_json(result) for result in results]
    except ValueError as error:
        raise _Unusable(f"the answer holds a malformed result: {error}") from error
