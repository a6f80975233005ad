"""The judge against a real HTTP server on this machine that fails in every way that servers do."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import pytest
from aiohttp import web

from rewards import load_grader
from rewards.judge import Config, verdict
from rlhub.types import RewardResult

GREETING = "ß 你好 🙂 \u2028"


class Server:
    """Answers `/v1/chat/completions` by the first word of the judged completion; the n-th call about it is `behaviour(n)`."""

    def __init__(self) -> None:
        self.requests: dict[str, list[dict]] = defaultdict(list)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.authorization: list[str | None] = []
        self.in_flight = self.most_in_flight = 0
        self.behaviours: dict[str, Callable[[int], object]] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        about = body["messages"][0]["content"].split()[0]
        self.requests[about].append(body)
        self.times[about].append(time.monotonic())
        self.authorization.append(request.headers.get("Authorization"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            does = self.behaviours.get(about, lambda call: "good")(len(self.requests[about]))
            if isinstance(does, float):
                await asyncio.sleep(does)
                does = "good"
            if does is None:  # drop the connection
                request.transport.close()
                return web.Response()
            if isinstance(does, web.Response):
                return does
            return web.json_response(completion(does))
        finally:
            self.in_flight -= 1


def completion(text: object) -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Server, str]]:
    server, ready, shared = Server(), threading.Event(), {}

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        done = asyncio.Event()
        shared.update(port=runner.addresses[0][1], loop=asyncio.get_running_loop(), done=done)
        ready.set()
        await done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=[serve()], daemon=True)
    thread.start()
    assert ready.wait(10)
    yield server, f"http://127.0.0.1:{shared['port']}/v1"
    shared["loop"].call_soon_threadsafe(shared["done"].set)
    thread.join(10)


@pytest.fixture
def server(running) -> Server:
    """A server without memory of the tests before."""
    running[0].__init__()
    return running[0]


@pytest.fixture
def judge(running) -> Callable[..., list[RewardResult]]:
    """`judge([completions], **options)`: the grades, with choices good and bad unless `score` is given."""

    def grade(completions: list[str], row: dict | None = None, prompt: str = "the prompt", **options: object) -> list[RewardResult]:
        options = {"url": running[1], "model": "judge", "template": "{completion} | {prompt}", **options}
        if "score" not in options:
            options.setdefault("choices", {"good": 1.0, "bad": 0.25})
        grader = load_grader({"name": "judge", **options})
        return grader.grade_batch([(prompt, text, row or {}) for text in completions])

    return grade


def fail(status: int, **headers: str) -> web.Response:
    return web.json_response({"error": {"message": f"fault {status}"}}, status=status, headers=headers)


def statuses(results: list[RewardResult]) -> list[str]:
    assert all(math.isnan(result.value) == (result.status != "ok") for result in results)
    return [result.status for result in results]


def test_choices_and_the_request(server: Server, judge) -> None:
    server.behaviours = {"a": lambda call: "good", "b": lambda call: " **Bad**.\n"}
    results = judge(["a x", "b y"], seed=7, max_tokens=5, extra_body={"guided_choice": ["good", "bad"]})
    assert [(result.value, result.status, result.detail) for result in results] == [(1.0, "ok", "good"), (0.25, "ok", " **Bad**.\n")]
    (body,) = server.requests["a"]
    assert body["messages"] == [{"role": "user", "content": "a x | the prompt"}]
    assert {name: body[name] for name in ("model", "temperature", "seed", "max_tokens", "guided_choice")} == {
        "model": "judge",
        "temperature": 0.0,
        "seed": 7,
        "max_tokens": 5,
        "guided_choice": ["good", "bad"],
    }


def test_choices_may_be_forced(server: Server, judge) -> None:
    judge(["a x"], constrain=True, extra_body={"top_k": 3})
    (body,) = server.requests["a"]
    assert body["structured_outputs"] == {"choice": ["good", "bad"]} and body["top_k"] == 3


def test_what_is_filled_in_is_not_filled_in_again(server: Server, judge) -> None:
    """A completion that writes {answer} is not shown the answer; other braces of the template stay."""
    template = '{completion} {prompt} {answer} {verdict} {"json": 1}'
    judge(["c {answer} {prompt}"], row={"answer": 42}, template=template)
    assert server.requests["c"][0]["messages"][0]["content"] == 'c {answer} {prompt} the prompt 42 one of good, bad {"json": 1}'


def test_unicode_survives(server: Server, judge) -> None:
    server.behaviours = {"u": lambda call: "很好"}
    results = judge([f"u {GREETING}", "u \ud800", "u fine"], choices={"很好": 0.5})
    assert statuses(results) == ["ok", "rejected", "ok"] and results[0].value == 0.5
    assert "lone surrogate at character 2" in results[1].detail
    assert {body["messages"][0]["content"] for body in server.requests["u"]} == {f"u {GREETING} | the prompt", "u fine | the prompt"}


def test_faults_that_pass_are_outlasted(server: Server, judge) -> None:
    server.behaviours = {
        "limited": lambda call: fail(429, **{"Retry-After": "1"}) if call == 1 else "good",
        "broken": lambda call: fail(500) if call <= 2 else "bad",
        "dropped": lambda call: None if call == 1 else "good",
        "busy": lambda call: fail(503) if call == 1 else "good",
    }
    results = judge(list(server.behaviours))
    assert statuses(results) == ["ok"] * 4 and [result.value for result in results] == [1.0, 0.25, 1.0, 1.0]
    assert [len(server.requests[name]) for name in server.behaviours] == [2, 3, 2, 2]
    first, second = server.times["limited"]
    assert second - first >= 1.0
    first, second, third = server.times["broken"]
    assert third - second > second - first > 0.3  # the wait doubles


def test_faults_that_stay_are_statuses_and_harm_nobody_else(server: Server, judge) -> None:
    server.behaviours = {
        "down": lambda call: fail(500),
        "forbidden": lambda call: fail(401),
        "hang": lambda call: 30.0,
        "garbage": lambda call: web.Response(body=b"\x00\xff<html>", content_type="text/html"),
        "notjson": lambda call: web.Response(body=b"{", content_type="application/json"),
        "empty": lambda call: web.json_response({"choices": []}),
        "shapeless": lambda call: web.json_response([1, 2]),
        "silent": lambda call: None,
    }
    started = time.monotonic()
    results = judge([*server.behaviours, "fine"], retries=1, timeout_seconds=3.0)
    assert time.monotonic() - started < 6.0
    assert statuses(results) == ["crashed", "crashed", "timeout", *["crashed"] * 5, "ok"]
    assert "fault 500" in results[0].detail and "fault 401" in results[1].detail and "3 s" in results[2].detail
    assert [len(server.requests[name]) for name in ("down", "forbidden", "silent")] == [2, 1, 2]
    assert Counter(statuses(results)) == {"crashed": 7, "timeout": 1, "ok": 1}


def test_an_illegal_label_is_asked_again_and_never_graded(server: Server, judge) -> None:
    server.behaviours = {
        "sorry": lambda call: "excellent" if call == 1 else "good",
        "stubborn": lambda call: "goodish",
        "null": lambda call: web.json_response(completion(None)),
        "both": lambda call: "good or bad",
    }
    results = judge(list(server.behaviours), attempts=2)
    assert statuses(results) == ["ok", "rejected", "rejected", "rejected"]
    assert "goodish" in results[1].detail
    assert [len(server.requests[name]) for name in server.behaviours] == [2, 2, 2, 2]
    assert server.requests["sorry"][1]["messages"][1:] == [
        {"role": "assistant", "content": "excellent"},
        {"role": "user", "content": "That is not a legal answer. Answer with one of good, bad."},
    ]


def test_scores_within_the_range_only(server: Server, judge) -> None:
    replies = {"five": "5", "high": "11", "low": "-1", "half": "7.5", "words": "five", "edge": "10.0", "nan": "nan", "ratio": "7/10"}
    server.behaviours = {name: (lambda call, reply=reply: reply) for name, reply in replies.items()}
    results = dict(zip(replies, judge(list(replies), score=[0, 10], attempts=1), strict=True))
    assert {name: result.value for name, result in results.items() if result.status == "ok"} == {"five": 5.0, "half": 7.5, "edge": 10.0}
    assert {result.status for name, result in results.items() if name not in ("five", "half", "edge")} == {"rejected"}


def test_the_last_match_of_a_pattern_counts(server: Server) -> None:
    config = Config(url="http://x/v1", model="m", score=[0.0, 1.0], pattern=r"Score: (\S+)")
    assert verdict("It says 'Score: 1'. I say\nScore: 0.25", config) == 0.25
    assert [verdict(reply, config) for reply in ("0.5", "Score: nan", "Score: inf", "Score: 2", "Score: 1e-1")] == [None] * 4 + [0.1]


def test_requests_in_flight_are_bounded(server: Server, judge) -> None:
    names = [f"n{number}" for number in range(30)]
    server.behaviours = dict.fromkeys(names, lambda call: 0.05)
    assert statuses(judge(names, concurrency=4)) == ["ok"] * 30
    assert server.most_in_flight == 4


def test_the_key_comes_from_the_environment(server: Server, judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHUB_TEST_KEY", "secret-123")
    assert statuses(judge(["k"], api_key_env="RLHUB_TEST_KEY")) == ["ok"]
    assert server.authorization == ["Bearer secret-123"]
    monkeypatch.delenv("RLHUB_TEST_KEY")
    grader = load_grader({"name": "judge", "url": "http://x/v1", "model": "m", "score": [0, 1], "api_key_env": "RLHUB_TEST_KEY"})
    with pytest.raises(ValueError, match="RLHUB_TEST_KEY is not set"):
        grader.prepare()


def test_nobody_listens(judge) -> None:
    (result,) = judge(["x"], url="http://127.0.0.1:9/v1", retries=1)
    assert result.status == "crashed" and "Connection" in result.detail


def test_a_missing_answer_is_said(server: Server, judge) -> None:
    (result,) = judge(["x"], template="{completion} {answer}")
    assert result.status == "crashed" and "needs the column 'answer'" in result.detail and not server.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "give url"),
        ({"model": ""}, "give url"),
        ({"template": "{prompt}"}, "does not show the judge the {completion}"),
        ({"choices": {}}, "either choices"),
        ({"score": [0.0, 1.0]}, "either choices"),
        ({"choices": {"Good": 1.0, "good": 0.0}}, "differ by more than case"),
        ({"choices": {}, "score": [1.0, 0.0]}, "score must be two numbers"),
        ({"pattern": "x"}, "pattern must be"),
        ({"pattern": "(x"}, "pattern must be"),
        ({"choices": {}, "score": [0.0, 1.0], "constrain": True}, "constrain needs choices"),
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be above 0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grader({"name": "judge", "url": "http://x/v1", "model": "m", "choices": {"good": 1.0, "bad": 0.0}} | options)
