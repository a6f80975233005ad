"""`rlhub reward serve`: any reward over HTTP, in killable processes with deadlines. The protocol is in `rewards/http.py`.

The server trusts whoever reaches it, as graders see all that is sent to them; it listens on this machine only unless it is told otherwise.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

from aiohttp import web

from rewards._grader import Item, to_json
from rewards.pool.pool import RewardPool
from rewards.pool.settings import RewardPoolConfig
from rlhub.errors import UserError

MAX_BYTES = 64 * 2**20  # of one request
MAX_WAITING = 20_000  # items in the queue; beyond, clients are told to come back
RETRY_SECONDS = 1  # after which they are


def serve(part: dict[str, Any], host: str, port: int, config: RewardPoolConfig, announce: Callable[[str], None] = print) -> None:
    """Serves the reward `part` until SIGINT or SIGTERM. Port 0 takes a free one; `announce` is called with the URL once it answers.

    Raises:
        UserError: the grader cannot be loaded, or the address cannot be used.
    """

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve_until(stop, part, host, port, config, announce)

    asyncio.run(main())


async def serve_until(
    stop: asyncio.Event, part: dict[str, Any], host: str, port: int, config: RewardPoolConfig, announce: Callable[[str], None]
) -> None:
    """`serve` in a running event loop, until `stop` is set."""
    with await asyncio.to_thread(RewardPool, part, config) as pool:
        runner = web.AppRunner(reward_app(pool, part["name"]), access_log=None)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port") from error
            name = f"[{host}]" if ":" in host else host
            announce(f"http://{name}:{runner.addresses[0][1]}")
            await stop.wait()
        finally:
            await runner.cleanup()


def reward_app(pool: RewardPool, name: str) -> web.Application:
    """The web application. Requests that arrive together are graded together: their items share the pool's batches."""

    async def grade(request: web.Request) -> web.Response:
        try:
            items = _items(json.loads(await request.read()))
        except (ValueError, RecursionError) as error:
            return web.json_response({"error": str(error)}, status=400)
        if pool.num_waiting + len(items) > MAX_WAITING and pool.num_waiting > 0:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            return web.json_response({"error": f"{pool.num_waiting} items are waiting"}, status=503, headers=headers)
        try:
            results = await asyncio.wrap_future(pool.submit(items))
        except Exception as error:
            return web.json_response({"error": str(error)}, status=500)
        return web.json_response({"results": [to_json(result) for result in results]})

    async def health(request: web.Request) -> web.Response:
        facts = {"status": "ok", "grader": name, "version": pool.version}
        return web.json_response(facts | {"num_graded": pool.num_graded, "num_waiting": pool.num_waiting})

    app = web.Application(client_max_size=MAX_BYTES)
    app.add_routes([web.post("/grade", grade), web.get("/health", health)])
    return app


def _items(body: Any) -> list[Item]:
    rows = body.get("items") if isinstance(body, dict) else None
    if not isinstance(rows, list):
        raise ValueError('expected {"items": [{"prompt", "completion", "row"}, ...]}')
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise ValueError(f"items[{index}] has no text as its completion")
        prompt = row.get("prompt", "")
        is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not (isinstance(prompt, str) or is_chat) or not isinstance(row.get("row", {}), dict):
            raise ValueError(f"items[{index}]: prompt must be text or chat messages, row an object with the columns")
    return [(row.get("prompt", ""), row["completion"], row.get("row", {})) for row in rows]
