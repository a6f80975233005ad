"""Grading over HTTP: `rlhub reward serve`'s application and the reward `http`, against each other and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rewards import load_grader
from rewards.pool import RewardPoolConfig
from rewards.pool import server as reward_server
from rewards.pool.server import serve_until
from rlhub.errors import UserError
from rlhub.types import RewardResult

GRADERS = """
import time

def graded(prompt, completion, row):
    if completion == "hang":
        time.sleep(1000)
    if completion == "raise":
        raise ZeroDivisionError("on purpose")
    if completion == "nan":
        return float("nan")
    return row.get("scale", 1) * len(completion) + len(prompt)
"""


@contextmanager
def serving(part: dict, **options: object) -> Iterator[str]:
    loop, stop, ready, urls = asyncio.new_event_loop(), asyncio.Event(), threading.Event(), []

    def announce(url: str) -> None:
        urls.append(url)
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve_until(stop, part, "127.0.0.1", 0, RewardPoolConfig(**options), announce))

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    yield urls[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("graders")
    (folder / "graders.py").write_text(GRADERS)
    with serving({"name": f"{folder}/graders.py:graded"}, processes=2, deadline_seconds=1.0) as url:
        yield url


def client(url: str, **options: object) -> Callable[..., list[RewardResult]]:
    return load_grader({"name": "http", "url": url, **options}).grade_batch


def item(completion: str = "abc", prompt: str | list = "", **row: object) -> tuple[str | list, str, dict]:
    return prompt, completion, row


def counts(results: Sequence[RewardResult], expected: int) -> dict[str, int]:
    statuses = Counter(result.status for result in results)
    assert sum(statuses.values()) == len(results) == expected
    assert all(math.isnan(result.value) for result in results if not result.valid), "a failure is never a number"
    return dict(statuses)


def post(url: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/grade", data=data), timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else {"error": text}


def test_a_round_trip_of_500_items(url: str) -> None:
    chat = [{"role": "user", "content": "question"}]
    items = [item("x" * (number % 7), chat if number % 2 else "p", scale=number) for number in range(500)]
    results = client(url)(items)
    assert counts(results, 500) == {"ok": 500}
    assert [result.value for result in results] == [number * (number % 7) + 1 for number in range(500)]


def test_statuses_travel_and_the_guilty_item_fails_alone(url: str) -> None:
    results = client(url)([item(), item("hang"), item("raise"), item("nan"), item("ab")])
    assert counts(results, 5) == {"ok": 2, "timeout": 1, "crashed": 1, "rejected": 1}
    assert [result.status for result in results] == ["ok", "timeout", "crashed", "rejected", "ok"]
    assert "on purpose" in results[2].detail and results[4].value == 2.0


def test_parts_travel() -> None:
    parts = [{"reward": {"name": "exact_match"}, "label": "answer"}, {"reward": {"name": "format_tags"}, "weight": 0.5}]
    items = [item("1 2", answer="1 2"), item("1", answer="1 2")]
    with serving({"name": "combine", "parts": parts}) as url:
        results = client(url)(items)
    assert counts(results, 2) == {"ok": 2}
    assert results == load_grader({"name": "combine", "parts": parts}).grade_batch(items) and list(results[0].parts) == [
        "answer",
        "format_tags",
    ]


def test_concurrent_clients_get_their_own_answers(url: str) -> None:
    def call(number: int) -> list[RewardResult]:
        return client(url)([item("x" * number)] * 5)

    with ThreadPoolExecutor(8) as threads:
        for number, results in enumerate(threads.map(call, range(16))):
            assert counts(results, 5) == {"ok": 5} and {result.value for result in results} == {float(number)}


def test_the_answer_is_plain_json_and_health_counts(url: str) -> None:
    def num_graded() -> int:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            health = json.loads(answer.read())
        assert health["status"] == "ok" and health["grader"].endswith("graders.py:graded") and health["version"]
        return health["num_graded"]

    before = num_graded()
    status, answer = post(url, {"items": [{"completion": "ab"}, {"completion": "nan", "prompt": "", "row": {}}]})
    assert status == 200 and answer["results"][0] == {"value": 2.0, "status": "ok", "detail": ""}
    assert answer["results"][1]["value"] is None and answer["results"][1]["status"] == "rejected"
    assert post(url, {"items": []}) == (200, {"results": []})
    assert num_graded() == before + 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no json", "Expecting value"),
        (b"[" * 100_000, "recursion"),
        ([], "expected"),
        ({"items": {}}, "expected"),
        ({"items": [{"prompt": "p"}]}, "items[0] has no text as its completion"),
        ({"items": [{"completion": "c"}, {"completion": "c", "row": 3}]}, "items[1]"),
        ({"items": [{"completion": "c", "prompt": ["x"]}]}, "items[0]"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(url: str, body: object, message: str) -> None:
    status, answer = post(url, body)
    assert status == 400 and message in answer["error"]


def test_requests_have_a_largest_size_and_the_queue_has_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reward_server, "MAX_BYTES", 10_000)
    monkeypatch.setattr(reward_server, "MAX_WAITING", 100)
    (tmp_path / "graders.py").write_text("import time\ndef slow(prompt, completion, row):\n    time.sleep(0.2)\n    return 1.0\n")
    with serving({"name": f"{tmp_path}/graders.py:slow"}, batch_size=1) as url:
        assert post(url, {"items": [{"completion": "x" * 20_000}]})[0] == 413
        results = client(url, retries=0)([item("x" * 20_000)])
        assert counts(results, 1) == {"crashed": 1} and "413" in results[0].detail
        with ThreadPoolExecutor(2) as threads:
            waiting = threads.submit(client(url), [item()] * 10)
            while json.loads(urllib.request.urlopen(f"{url}/health", timeout=30).read())["num_waiting"] == 0:
                pass
            refused, answer = post(url, {"items": [{"completion": "x"}] * 100})
            assert refused == 503 and "waiting" in answer["error"]
            assert counts(waiting.result(), 10) == {"ok": 10}


@contextmanager
def answering(*answers: tuple[int, object]) -> Iterator[tuple[str, list[int]]]:
    """A server that gives these answers in turn and the last one for ever; None hangs up. Yields its URL and what it was asked."""
    asked: list[int] = []
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = answers[min(len(asked), len(answers) - 1)]
            asked.append(len(json.loads(body)["items"]))
            if answer is None:
                self.close_connection = True
                return
            if answer is Ellipsis:
                done.wait(30)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode() if answer is not Ellipsis else b"")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        done.set()
        server.shutdown()
        thread.join()


GOOD = {"results": [{"value": 0.5, "status": "ok", "detail": ""}, {"value": None, "status": "timeout", "detail": "slow"}]}


@pytest.mark.parametrize("failure", [(500, {"error": "oh"}), (503, {"error": "full"}), (429, {"error": "slow down"}), (0, None)])
def test_what_may_pass_is_tried_again(failure: tuple[int, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.http.FIRST_PAUSE", 0.01)
    with answering(failure, failure, (200, GOOD)) as (url, asked):
        results = client(url, retries=2)([item()] * 2)
    assert counts(results, 2) == {"ok": 1, "timeout": 1} and results[0].value == 0.5 and asked == [2, 2, 2]
    with answering(failure) as (url, asked):
        results = client(url, retries=1)([item()] * 2)
    assert counts(results, 2) == {"crashed": 2} and url in results[0].detail and "2 attempts" in results[0].detail and asked == [2, 2]


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ((400, {"error": "items[0] has no completion"}), "status 400"),
        ((200, b"<html>"), "not JSON"),
        ((200, []), 'no list "results"'),
        ((200, {"results": GOOD["results"][:1]}), "1 results for 2 items"),
        ((200, {"results": [*GOOD["results"], GOOD["results"][0]]}), "3 results for 2 items"),
        ((200, {"results": [{"value": None, "status": "ok"}] * 2}), "value must be a number"),
        ((200, {"results": [{"value": "1", "status": "ok"}] * 2}), "value must be a number"),
        ((200, {"results": [{"value": 1.0, "status": "fine"}] * 2}), "status must be one of"),
        ((200, {"results": [1.0, 1.0]}), "expected {value, status, detail}"),
    ],
)
def test_a_malformed_answer_is_crashed_and_not_asked_for_again(answer: tuple[int, object], detail: str) -> None:
    with answering(answer) as (url, asked):
        results = client(url)([item()] * 2)
    assert counts(results, 2) == {"crashed": 2} and detail in results[0].detail and url in results[0].detail and asked == [2]


def test_an_answer_that_does_not_come_is_a_timeout() -> None:
    with answering((200, ...)) as (url, asked):
        results = client(url, timeout_seconds=0.3)([item()] * 2)
    assert counts(results, 2) == {"timeout": 2} and "0.3 s" in results[0].detail and asked == [2]


def test_a_server_that_is_not_there_is_named_at_the_start() -> None:
    with answering() as (gone, _):
        pass
    with pytest.raises(ValueError, match=f"no reward server at {gone}.*rlhub reward serve"):
        load_grader({"name": "http", "url": gone, "retries": 0}).prepare()
    with pytest.raises(ValueError, match="url must be"):
        load_grader({"name": "http", "url": "localhost:80"})


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    (tmp_path / "graders.py").write_text(GRADERS)
    command = [sys.executable, "-m", "rlhub", "reward", "serve", "combine", "--port", "0", "--workers", "2"]
    parts = f"parts=[{{reward: {{name: '{tmp_path}/graders.py:graded'}}, label: answer, weight: 0.5}}]"
    with subprocess.Popen([*command, parts], stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("serving combine at http://127.0.0.1:")
            results = client(line.split()[-1])([item("ab"), item("raise")])
            assert counts(results, 2) == {"ok": 1, "crashed": 1} and results[0].value == 1.0
        finally:
            server.terminate()
        assert server.wait(30) == 0


def test_the_command_refuses_what_cannot_be() -> None:
    for arguments, message in ((["exact_mach"], "did you mean exact_match"), (["exact_match", "strict"], "KEY=VALUE")):
        command = [sys.executable, "-m", "rlhub", "reward", "serve", *arguments, "--port", "0"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1


def test_a_server_says_why_it_cannot_start(url: str) -> None:
    port = int(url.rpartition(":")[2])
    stop = asyncio.Event()
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
        asyncio.run(serve_until(stop, {"name": "exact_match"}, "127.0.0.1", port, RewardPoolConfig(), print))
    with pytest.raises(UserError, match="rewards has no 'exact_mach'"):
        asyncio.run(serve_until(stop, {"name": "exact_mach"}, "127.0.0.1", 0, RewardPoolConfig(), print))
