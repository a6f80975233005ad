"""The contract of rewards: graders of every kind behind one object, composition, prices, and what a run logs of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rewards import Grader, WrongCount, load_grader
from rewards._grader import from_json, to_json
from rewards.pool import RewardPool
from rlhub.algorithm.health import rollout_metrics
from rlhub.config.schema import Recipe
from rlhub.records.metrics import read_metrics
from rlhub.records.rollout_log import dump_rollouts, read_rollouts
from rlhub.training.grading import grade
from rlhub.training.held_out import evaluate
from rlhub.training.rollouts import Issued
from rlhub.training.run import train
from rlhub.training.session import Session
from rlhub.types import Example, Request, RewardResult, Rollout
from workers.crew import GraderPool
from workers.runtimes.runtime import LocalRuntime, Resources

GRADERS = """
import asyncio
from rlhub.types import RewardResult

CALLS = []
LOOPS = set()

def plain(prompt, completion, row, scale=1.0):
    if completion == "raise":
        raise ZeroDivisionError("on purpose")
    return scale * len(completion)

async def coroutine(prompt, completion, row):
    LOOPS.add(id(asyncio.get_running_loop()))
    await asyncio.sleep(1000 if completion == "hang" else 0)
    return plain(prompt, completion, row)

def trl(prompts, completions, length, **columns):
    CALLS.append(len(completions))
    if "raise" in completions:
        raise ZeroDivisionError("on purpose")
    return [float(given) if given is not None else None for given in length]

async def trl_coroutine(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]

def too_few(completions, **columns):
    return [1.0]

def one_number(completions, **columns):
    return 1.0

def odd_status(prompt, completion, row):
    return RewardResult(1.0, "fine")

def text(prompt, completion, row):
    return "good"
"""
BATCHED = """
from dataclasses import dataclass
from rlhub.types import RewardResult

CALLS = []

@dataclass(frozen=True)
class Config:
    together: bool = True
    missing: int = 0
    data: str = ""

def grade(prompt, completion, row, config):
    CALLS.append(1)
    if completion == "raise":
        raise ZeroDivisionError("on purpose")
    return RewardResult(float(len(completion)))

{async_}def grade_batch(items, config):
    CALLS.append(len(items))
    return [RewardResult(float(len(completion) / (completion != "raise"))) for _, completion, _ in items][config.missing:]

def batched(config):
    return config.together

def version(config):
    return config.data
"""


@pytest.fixture
def graders(tmp_path: Path) -> Callable[..., Grader]:
    """`graders(function, **options)` of the file above."""
    path = tmp_path / "graders.py"
    path.write_text(GRADERS)
    return lambda function, **options: load_grader({"name": f"{path}:{function}", **options})


@pytest.fixture(params=["def", "async def"])
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Dotted name of a module with `grade_batch`, a function or a coroutine."""
    package = f"graders_{tmp_path.name.replace('-', '_')}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "mine.py").write_text(BATCHED.replace("{async_}def", request.param))
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{package}.mine"


def item(completion: str = "abc", **row: object) -> tuple[str, str, dict]:
    return "prompt", completion, row


def counts(results: Sequence[RewardResult], expected: int) -> dict[str, int]:
    statuses = Counter(result.status for result in results)
    assert sum(statuses.values()) == len(results) == expected
    assert all(math.isnan(result.value) for result in results if result.status in ("crashed", "timeout")), "a failure is never a number"
    return dict(statuses)


@pytest.mark.parametrize("function", ["plain", "coroutine"])
def test_functions_and_coroutines_grade_one_and_many(graders: Callable[..., Grader], function: str) -> None:
    grader = graders(function)
    assert grader("p", "abc", {}).value == 3.0
    results = grader.grade_batch([item("a"), item("raise"), item("abcd")])
    assert counts(results, 3) == {"ok": 2, "crashed": 1}
    assert [results[0].value, results[2].value] == [1.0, 4.0] and "on purpose" in results[1].detail
    assert grader.grade_batch([]) == []
    with pytest.raises(ZeroDivisionError):
        grader("p", "raise", {})


def test_coroutines_have_a_deadline_and_keep_one_loop(graders: Callable[..., Grader]) -> None:
    grader = graders("coroutine")
    results = grader.grade_batch([item(), item("hang"), item()], deadline_seconds=0.1)
    assert counts(results, 3) == {"ok": 2, "timeout": 1}
    grader.grade_batch([item()])
    grader("p", "c", {})
    assert len(grader.one.func.__globals__["LOOPS"]) == 1, "clients that belong to a loop can be kept"


def test_a_grader_works_inside_of_a_running_loop(graders: Callable[..., Grader]) -> None:
    import asyncio

    async def notebook() -> float:
        return graders("coroutine")("p", "abc", {}).value

    assert asyncio.run(notebook()) == 3.0


def test_trl_functions_get_whole_batches(graders: Callable[..., Grader]) -> None:
    grader = graders("trl")
    results = grader.grade_batch([item(length=3), item(), item(length=5)])
    assert counts(results, 3) == {"ok": 2, "rejected": 1} and [results[0].value, results[2].value] == [3.0, 5.0]
    with pytest.raises(ZeroDivisionError):  # whose fault it is cannot be said of one call: the pool asks again
        grader.grade_batch([item(length=3), item("raise", length=1)])
    assert [result.value for result in graders("trl_coroutine").grade_batch([item("ab"), item("a")])] == [2.0, 1.0]
    assert graders("trl_coroutine")("p", "ab", {}).value == 2.0


@pytest.mark.parametrize(("function", "message"), [("too_few", "got 1 for 3"), ("one_number", "got float")])
def test_another_number_of_results_raises(graders: Callable[..., Grader], function: str, message: str) -> None:
    with pytest.raises(WrongCount, match=message):
        graders(function).grade_batch([item()] * 3)


def test_results_that_are_none(graders: Callable[..., Grader]) -> None:
    assert counts(graders("odd_status").grade_batch([item()]), 1) == {"crashed": 1}
    assert counts(graders("text").grade_batch([item()]), 1) == {"crashed": 1}


def test_modules_may_grade_batches(module: str) -> None:
    grader = load_grader({"name": module})
    calls = grader.one.args[0].__globals__["CALLS"]
    assert grader.batched
    assert [result.value for result in grader.grade_batch([item("a"), item("ab")])] == [1.0, 2.0] and calls == [2]
    with pytest.raises(ZeroDivisionError):
        grader.grade_batch([item("a"), item("raise"), item("ab")])
    assert calls == [2, 3], "the batch is not asked for again"
    with pytest.raises(WrongCount, match="got 2 for 3"):
        load_grader({"name": module, "missing": 1}).grade_batch([item()] * 3)
    calls.clear()
    alone = load_grader({"name": module, "together": False})
    assert not alone.batched and counts(alone.grade_batch([item()] * 2), 2) == {"ok": 2} and calls == [1, 1]


def test_a_version_changes_with_source_options_and_data(module: str, tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(GRADERS)

    def version(**options: object) -> str:
        return load_grader({"name": f"{path}:plain", **options}).version

    first = version()
    assert version() == first and version(scale=2.0) != first
    path.write_text(GRADERS + "\n")
    assert version() != first
    assert load_grader({"name": module, "data": "a"}).version != load_grader({"name": module, "data": "b"}).version
    combined = {"name": "combine", "parts": [{"reward": {"name": f"{path}:trl"}}]}
    before = load_grader(combined).version
    path.write_text(GRADERS + "\n\n")
    from rewards import combine

    combine._load.cache_clear()  # as in a new process
    assert load_grader(combined).version != before, "the parts' sources count"


VALID = st.builds(RewardResult, st.floats(-5, 5), st.sampled_from(["ok", "unparsed"]), st.text(max_size=9))
FAILED = st.builds(RewardResult, st.just(math.nan), st.sampled_from(["timeout", "crashed", "rejected"]), st.text(max_size=9))
PARTS = st.dictionaries(st.text(max_size=3), VALID | FAILED, max_size=3)


@settings(max_examples=50, deadline=None)
@given(VALID | FAILED, PARTS)
def test_json_keeps_a_result(result: RewardResult, parts: dict[str, RewardResult]) -> None:
    result = replace(result, parts={"nested": replace(result, parts=parts)} if parts else {})
    assert repr(from_json(json.loads(json.dumps(to_json(result), allow_nan=False)))) == repr(result)


# Composition


def combined(parts: list[dict], **options: object) -> Grader:
    return load_grader({"name": "combine", "parts": parts, **options})


def fixed(tmp_path: Path, **values: object) -> list[dict]:
    """Parts with these labels that give these values, or fail with these statuses."""
    path = tmp_path / "fixed.py"
    path.write_text(
        "from rlhub.types import RewardResult\n"
        "def value(prompt, completion, row, is_):\n"
        "    if is_ == 'crashed':\n        raise ZeroDivisionError('inside')\n"
        "    return RewardResult(float('nan'), is_) if isinstance(is_, str) else RewardResult(*is_) if isinstance(is_, list) else is_\n"
    )
    return [{"reward": {"name": f"{path}:value", "is_": value}, "label": label} for label, value in values.items()]


NUMBERS = st.floats(-2, 2)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(NUMBERS, min_size=2, max_size=4), data=st.data())
def test_the_sum_is_weighted_gated_and_clipped(values: list[float], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    parts = fixed(tmp_path_factory.getbasetemp(), **{f"part{index}": value for index, value in enumerate(values)})
    expected = 0.0
    for index, (part, value) in enumerate(zip(parts, values, strict=True)):
        part["weight"] = data.draw(NUMBERS)
        is_open = True
        if data.draw(st.booleans()):
            other, threshold = data.draw(st.sampled_from([i for i in range(len(values)) if i != index])), data.draw(NUMBERS)
            part["gate"] = {"part": f"part{other}", "at_least": threshold}
            is_open = values[other] >= threshold
        expected += part["weight"] * value * is_open
    result = combined(parts)("", "", {})
    assert result.value == pytest.approx(expected) and result.status == "ok"
    assert {label: part.value for label, part in result.parts.items()} == {f"part{index}": value for index, value in enumerate(values)}
    assert combined(parts, clip=[-0.5, 1.0])("", "", {}).value == pytest.approx(np.clip(expected, -0.5, 1.0))


@settings(max_examples=40, deadline=None)
@given(value=NUMBERS, knots=st.lists(NUMBERS, min_size=1, max_size=4, unique=True), data=st.data())
def test_partial_credit_is_numpys_interpolation(
    value: float, knots: list[float], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    credits = data.draw(st.lists(NUMBERS, min_size=len(knots), max_size=len(knots)))
    (part,) = fixed(tmp_path_factory.getbasetemp(), one=value)
    part["curve"] = [[knot, credit] for knot, credit in zip(sorted(knots), credits, strict=True)]
    assert combined([part])("", "", {}).value == pytest.approx(float(np.interp(value, sorted(knots), credits)), abs=1e-9)


@pytest.mark.parametrize("status", ["crashed", "timeout", "rejected"])
def test_a_part_that_fails_makes_the_whole_fail_unless_it_is_optional(status: str, tmp_path: Path) -> None:
    parts = fixed(tmp_path, answer=0.5, other=status, third=0.25)
    (result,) = combined(parts).grade_batch([item()])
    assert result.status == status and math.isnan(result.value) and "part other" in result.detail
    assert [part.status for part in result.parts.values()] == ["ok", status, "ok"], "what the other parts said is kept"
    parts[1]["optional"] = True
    parts[2]["gate"] = {"part": "other", "at_least": -9.0}
    results = combined(parts).grade_batch([item()] * 3)
    assert counts(results, 3) == {"ok": 3} and results[0].value == 0.5, "a gate on a part that failed stays closed"


def test_the_first_part_says_what_the_completion_is(tmp_path: Path) -> None:
    unparsed = combined(fixed(tmp_path, answer=[0.0, "unparsed"], style=1.0))("", "", {})
    assert (unparsed.status, unparsed.value, unparsed.accurate) == ("unparsed", 1.0, False)
    right = combined(fixed(tmp_path, answer=1.0, style=0.5))("", "", {})
    assert right.value == 1.5 and right.accurate
    assert not combined(fixed(tmp_path, style=0.0, answer=1.0))("", "", {}).accurate
    assert RewardResult(1.0).accurate and not RewardResult(0.9).accurate and not RewardResult(1.0, "crashed").accurate


def test_parts_that_are_batched_stay_batched(module: str) -> None:
    parts = [{"reward": {"name": module}, "label": "one"}, {"reward": {"name": "format_tags"}}]
    grader = combined(parts)
    assert grader.batched and not combined(parts[1:]).batched
    assert [result.value for result in grader.grade_batch([item("a"), item("abc")])] == [1.0, 3.0]
    with RewardPool({"name": "combine", "parts": parts}) as pool:
        results = pool.grade([item("a"), item("raise"), item("abc")])
    assert counts(results, 3) == {"ok": 2, "crashed": 1}
    assert list(results[1].parts) == ["one", "format_tags"] and results[1].parts["format_tags"].valid
    assert results[1].status == "crashed" and [results[0].value, results[2].value] == [1.0, 3.0]


FORMAT = {"reward": {"name": "format_tags"}}
BOUNDED = {"reward": {"name": "code_tests", "sandbox": "weak"}}  # it has limits of its own


@pytest.mark.parametrize(("parts", "expected"), [([BOUNDED], True), ([BOUNDED, FORMAT], False), ([FORMAT], False)])
def test_the_pools_limits_hold_unless_every_part_has_its_own(parts: list[dict], expected: bool) -> None:
    assert combined(parts).own_limits is expected


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one"),
        ([{"weight": 1.0}], r"parts\[0\] needs a reward"),
        ([FORMAT | {"wieght": 1.0}], "unknown option 'wieght'"),
        ([{"reward": {"name": "formt_tags"}}], "did you mean format_tags"),
        ([FORMAT, FORMAT], "two of them have the label 'format_tags'"),
        ([FORMAT | {"weight": "much"}], "weight must be a number"),
        ([FORMAT | {"weight": math.inf}], "weight must be a number"),
        ([FORMAT | {"gate": {"part": "answer", "at_least": 1.0}}], "waits for 'answer'"),
        ([FORMAT | {"gate": "answer"}], "gate must be"),
        ([FORMAT | {"curve": [[1, 0], [0, 1]]}], "must rise"),
        ([FORMAT | {"curve": [1, 2]}], "curve must be"),
    ],
)
def test_bad_parts(parts: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combined(parts)


def test_bad_clips() -> None:
    for clip in ([1.0, 0.0], [1.0]):
        with pytest.raises(ValueError, match="clip must be"):
            combined([FORMAT], clip=clip)


# Prices


def test_prices() -> None:
    facts = {"rollout": {"num_tokens": 30, "num_forwards": 16, "length": 64}}

    def price(**options: float) -> float:
        return load_grader({"name": "price", **options})("", "four", facts).value

    assert price(per_token=0.01) == pytest.approx(-0.3)
    assert price(per_token=0.01, free_tokens=20) == pytest.approx(-0.1) and price(per_token=0.01, free_tokens=99) == 0.0
    assert price(per_forward=0.5, per_character=0.25) == pytest.approx(-9.0)
    with pytest.raises(ValueError, match="per_token must be at least 0"):
        price(per_token=-1.0)
    with pytest.raises(ValueError, match="column 'rollout'"):
        load_grader({"name": "price", "per_token": 0.1})("", "", {})


# What a run makes of it


class Worker:
    """Grades in this process, so many of a batch at most."""

    def __init__(self, part: dict, most: int = 10**9) -> None:
        self.grader, self.most = load_grader(part), most

    def grade(self, items: Sequence[tuple]) -> list[RewardResult]:
        return self.grader.grade_batch(items[: self.most])


def rollouts_of(lengths: Sequence[int]) -> tuple[Issued, list[Rollout], SimpleNamespace]:
    """Completions of these numbers of letters on a canvas of 6 tokens, with as many forwards as letters, doubled."""
    rollouts, examples = [], []
    for uid, length in enumerate(lengths):
        tokens = np.array([7] * length + [0] * (6 - length), np.int32)
        nothing = np.zeros(6, np.float32)
        version, step = np.zeros(6, np.int32), np.zeros(6, np.int16)
        rollouts.append(
            Rollout(uid, uid, np.array([1], np.int32), tokens, length, step, nothing, nothing, version, num_forwards=2 * length)
        )
        examples.append(Example(uid, "p", {"answer": "aaa"}))
    requests = [Request(uid, uid, rollout.prompt_ids) for uid, rollout in enumerate(rollouts)]
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, skip_special_tokens: "a" * int((np.asarray(ids) == 7).sum()))
    return Issued(requests, examples), rollouts, tokenizer


def crew_of(part: dict, **options: int) -> SimpleNamespace:
    runtime = LocalRuntime()
    return SimpleNamespace(graders=GraderPool(runtime, [runtime.spawn("reward-0", Worker, Resources(), part=part, **options)]), version=0)


PRICED = {
    "name": "combine",
    "parts": [
        {"reward": {"name": "exact_match"}, "label": "answer"},
        {"reward": {"name": "price", "per_token": 0.1, "per_forward": 0.01}, "label": "cost"},
    ],
}


def test_graders_see_what_a_rollout_cost_and_the_run_logs_every_part(tmp_path: Path) -> None:
    issued, rollouts, tokenizer = rollouts_of([3, 2, 5])
    graded, texts = grade(crew_of(PRICED, most=2), issued, rollouts, tokenizer, batch_size=3)
    assert texts == ["aaa", "aa", "aaaaa"] and counts([rollout.reward for rollout in graded], 3) == {"ok": 3}
    costs = [-0.1 * length - 0.01 * 2 * length for length in (3, 2, 5)]
    assert [rollout.reward.value for rollout in graded] == pytest.approx([1.0 + costs[0], costs[1], costs[2]])
    metrics = rollout_metrics(graded, stop_ids=0)
    assert metrics["reward/part/answer"] == pytest.approx(1 / 3) and metrics["reward/part/cost"] == pytest.approx(np.mean(costs))
    assert metrics["reward/correct_share"] == pytest.approx(1 / 3) and "reward/cache_hits" not in metrics
    dump_rollouts(tmp_path / "step_00001.jsonl", 1, graded, [("p", text) for text in texts], [["a"] * 6] * 3)
    rows = read_rollouts(tmp_path / "step_00001.jsonl")
    assert rows[0]["parts"]["answer"] == {"value": 1.0, "status": "ok", "detail": "right"}
    assert [row["parts"]["cost"]["value"] for row in rows] == pytest.approx(costs)


CHAT = """
def is_chat(prompt):
    return [message["role"] for message in prompt] == ["system", "user"]

def trl(prompts, completions, **columns):
    answers = [len(answer) == 1 and answer[0]["role"] == "assistant" for answer in completions]
    return [float(is_chat(prompt) and good) for prompt, good in zip(prompts, answers)]

def plain(prompt, completion, row):
    return float(is_chat(prompt) and isinstance(completion, str))
"""


@pytest.mark.parametrize("function", ["trl", "plain"])
def test_graders_get_chat_messages_and_logs_their_text(function: str, tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(CHAT)
    issued, rollouts, tokenizer = rollouts_of([3, 2])
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how?"}]
    issued = Issued(issued.requests, [replace(example, prompt=messages) for example in issued.examples])
    graded, texts = grade(crew_of({"name": f"{tmp_path}/chat.py:{function}"}), issued, rollouts, tokenizer, batch_size=2)
    assert [rollout.reward for rollout in graded] == [RewardResult(1.0)] * 2
    run = SimpleNamespace(recipe=Recipe(), folder=tmp_path, tokenizer=SimpleNamespace(decode=lambda ids: "a"))
    Session.keep_rollouts(run, 1, issued, graded, texts)
    (path,) = (tmp_path / "rollouts").iterdir()
    assert [row["prompt"] for row in read_rollouts(path)] == ["be brief\nhow?"] * 2


def test_means_of_parts_leave_failures_out_and_hits_are_counted() -> None:
    _, rollouts, _ = rollouts_of([1, 2, 3])
    failed = RewardResult(math.nan, "timeout", "", {"answer": RewardResult(math.nan, "timeout"), "style": RewardResult(0.5)})
    valid = RewardResult(1.5, "ok", "", {"answer": RewardResult(1.0), "style": RewardResult(0.25)})
    results = [failed, replace(valid, cached=True), replace(valid, cached=True)]
    metrics = rollout_metrics([rollout.graded(result) for rollout, result in zip(rollouts, results, strict=True)], stop_ids=0)
    assert metrics["reward/part/answer"] == 1.0 and metrics["reward/part/style"] == pytest.approx(1 / 3)
    assert metrics["reward/invalid_share"] == pytest.approx(1 / 3) and metrics["reward/cache_hits"] == 2.0


def test_accuracy_is_the_main_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    issued, rollouts, tokenizer = rollouts_of([3, 3, 2, 3])
    monkeypatch.setattr("rlhub.training.held_out.issue", lambda *arguments: issued)
    task = SimpleNamespace(size=4, description="four", fingerprint=lambda: "0" * 16)
    recipe = Recipe()
    recipe.eval_temperatures = [0.0]
    crew = crew_of(PRICED)
    crew.generators = SimpleNamespace(generate=lambda *arguments: rollouts)
    metrics = evaluate(crew, recipe, task, tokenizer)
    assert metrics["eval/accuracy"] == 0.75 and metrics["eval/reward"] < 0.75


def test_a_recipe_with_a_combined_reward_trains_and_logs_its_parts(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(f"run.output_dir={tmp_path}", "run.phases=[online]", "run.steps=2", "algorithm.prompts_per_step=2")
    recipe.task.reward = {
        "name": "combine",
        "parts": [
            {"reward": {"name": f"{tiny.folder}/graders.py:ascending"}, "label": "sorted"},
            {"reward": {"name": "price", "per_forward": 0.01}},
        ],
    }
    run = train(recipe, Console(quiet=True))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > 0]
    assert len(rows) == 2
    for row in rows:
        assert row["reward/invalid_share"] == 0.0 and row["reward/part/price"] == pytest.approx(-0.01 * row["forwards/mean"])
        assert row["reward/mean"] == pytest.approx(row["reward/part/sorted"] + row["reward/part/price"])
    samples = read_rollouts(run / "rollouts" / "step_00002.jsonl")
    assert counts([from_json(sample["parts"]["sorted"]) for sample in samples], 8) == {"ok": 8}
