"""A language model as a judge, behind any server that speaks OpenAI's chat completions: the vendor's, vLLM's, SGLang's, llama.cpp's.

The judge gets `template` with the prompt, the completion and the row's column `answer` filled in, and has to reply with one of
`choices`, each worth a value, or with a number within `score: [low, high]`. `pattern` finds that verdict in a longer reply: its first
group, in its last match. A reply without a legal verdict is shown to the judge with the rule, `attempts` times in all; then the item is
`rejected`. Nothing but a legal verdict becomes a grade.

Requests that fail by 429, a server error or the connection are made again, `retries` times with exponential back-off or after the time that
the server's Retry-After asks for; then the item is `crashed`, as it is at once where the server refuses it. `timeout_seconds` bounds an
item with all of this; beyond it its status is `timeout`.

Example:
    reward:
      name: judge
      url: http://localhost:8000/v1
      model: Qwen/Qwen3-8B
      template: "Question: {prompt}\\nReply: {completion}\\nReference: {answer}\\nIs the reply right? Answer yes or no."
      choices: { "yes": 1.0, "no": 0.0 }
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards import Item, Prompt, column
from rewards.answers.text import Unusable, check_text, plain
from rlhub.extras import require
from rlhub.types import RewardResult

TEMPLATE = """Judge the reply to the question below.

Question:
{prompt}

Reply:
{completion}

Answer with {verdict} and nothing else."""
NUMBER = r"^\s*([-+]?\d+(?:\.\d+)?)\s*$"
KEPT_CHARACTERS = 200  # of a reply, in a result's detail


@dataclass(frozen=True)
class Config:
    url: str = ""  # up to and with /v1
    model: str = ""  # as the server names it
    api_key_env: str | None = None  # environment variable that holds the key; None: the server wants none
    template: str = TEMPLATE  # {prompt}, {completion}, {answer} and {verdict} (what is asked for, in words); other braces stay
    choices: dict[str, float] = field(default_factory=dict)  # label: value; either this or score
    score: list[float] = field(default_factory=list)  # [low, high], both legal
    pattern: str | None = None  # regular expression with one group, the verdict; None: the whole reply
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 256  # of a reply
    constrain: bool = False  # to choices; for vLLM's servers: the judge can then write nothing but one of them
    extra_body: dict[str, Any] = field(default_factory=dict)  # more fields of the request
    attempts: int = 3  # replies that are read before an item is rejected
    retries: int = 5  # of one request that fails
    timeout_seconds: float = 60.0  # of one item, all replies and retries together
    concurrency: int = 16  # items in flight

    def __post_init__(self) -> None:
        if not (self.url.startswith(("http://", "https://")) and self.model):
            raise ValueError(f"give url, such as http://localhost:8000/v1, and model; got {self.url!r} and {self.model!r}")
        if "{completion}" not in self.template:
            raise ValueError("template does not show the judge the {completion}")
        if bool(self.choices) == bool(self.score):
            raise ValueError("give either choices: {label: value} or score: [low, high]")
        if self.constrain and not self.choices:
            raise ValueError("constrain needs choices: a number within a range cannot be forced")
        if len({label.strip().casefold() for label in self.choices}) < len(self.choices):
            raise ValueError(f"choices must differ by more than case and white space, got {', '.join(self.choices)}")
        if self.score and not (len(self.score) == 2 and -math.inf < self.score[0] < self.score[1] < math.inf):
            raise ValueError(f"score must be two numbers [low, high], got {self.score}")
        if self.pattern is not None and _groups(self.pattern) != 1:
            raise ValueError(f"pattern must be a regular expression with one group, got {self.pattern!r}")
        for name in ("attempts", "concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.timeout_seconds > 0 and self.retries >= 0):
            raise ValueError(f"timeout_seconds must be above 0 and retries 0 or more, got {self.timeout_seconds} and {self.retries}")


async def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """The verdict on one completion, see `grade_batch`."""
    return (await grade_batch([(prompt, completion, row)], config))[0]


async def grade_batch(items: Sequence[Item], config: Config) -> list[RewardResult]:
    """One result per item, in order; the detail is the judge's reply.

    Raises:
        ValueError: the environment variable of the key is not set.
    """
    from openai import AsyncOpenAI

    free = asyncio.Semaphore(config.concurrency)
    async with AsyncOpenAI(base_url=config.url, api_key=_key(config), max_retries=config.retries, timeout=None) as client:

        async def judged(item: Item) -> RewardResult:
            async with free:
                return await _judge(client, item, config)

        return list(await asyncio.gather(*map(judged, items)))


def prepare(config: Config) -> None:
    """Raises ValueError when openai is not installed or the environment variable of the key is not set."""
    require("openai")
    _key(config)


def own_limits(config: Config) -> bool:
    """`timeout_seconds` bounds each item."""
    return True


async def _judge(client: Any, item: Item, config: Config) -> RewardResult:
    from openai import OpenAIError

    try:
        async with asyncio.timeout(config.timeout_seconds):
            return await _converse(client, _question(item, config), config)
    except Unusable as error:
        return RewardResult(math.nan, "rejected", str(error))
    except TimeoutError:
        return RewardResult(math.nan, "timeout", f"no verdict within {config.timeout_seconds:g} s")
    except (OpenAIError, ValueError) as error:  # ValueError: a reply that is no JSON
        return RewardResult(math.nan, "crashed", f"{type(error).__name__}: {error}"[:KEPT_CHARACTERS])


async def _converse(client: Any, question: str, config: Config) -> RewardResult:
    """Ask, and ask again with the rule, until there is a legal verdict or `attempts` are used up."""
    conversation = [{"role": "user", "content": question}]
    forced = {"structured_outputs": {"choice": list(config.choices)}} if config.constrain else {}
    for _ in range(config.attempts):
        answer = await client.chat.completions.create(
            model=config.model,
            messages=conversation,
            temperature=config.temperature,
            seed=config.seed,
            max_tokens=config.max_tokens,
            extra_body=config.extra_body | forced or None,
        )
        reply = _text(answer)
        value = verdict(reply, config)
        if value is not None:
            return RewardResult(value, detail=reply[:KEPT_CHARACTERS])
        complaint = f"That is not a legal answer. Answer with {_wanted(config)}."
        conversation += [{"role": "assistant", "content": reply}, {"role": "user", "content": complaint}]
    return RewardResult(math.nan, "rejected", f"no legal verdict in {config.attempts} replies, the last: {reply[:KEPT_CHARACTERS]!r}")


def verdict(reply: str, config: Config) -> float | None:
    """The value of a reply; None where it holds no legal verdict.

    Example:
        >>> verdict("Yes.", Config(url="http://judge/v1", model="m", choices={"yes": 1.0, "no": 0.0}))
        1.0
    """
    pattern = config.pattern or (NUMBER if config.score else r"^([\s\S]*)$")
    found = list(re.finditer(pattern, reply))
    if not found or found[-1][1] is None:
        return None
    word = found[-1][1].strip()
    if config.choices:
        legal = {label.strip().casefold(): value for label, value in config.choices.items()}
        return legal.get(word.casefold(), legal.get(word.strip(".\"'*`").casefold()))
    try:
        value = float(word)
    except ValueError:
        return None
    return value if config.score[0] <= value <= config.score[1] else None


def _question(item: Item, config: Config) -> str:
    prompt, completion, row = item
    check_text(prompt, completion)
    texts = {"prompt": plain(prompt), "completion": completion, "verdict": _wanted(config)}
    if "{answer}" in config.template:
        texts["answer"] = str(column(row, "answer"))
    # One pass: braces in what is filled in stay as they are, so that a completion cannot ask for the answer.
    return re.sub(r"\{(prompt|completion|answer|verdict)\}", lambda match: texts[match[1]], config.template)


def _wanted(config: Config) -> str:
    if config.choices:
        return "one of " + ", ".join(config.choices)
    return f"a number from {config.score[0]:g} to {config.score[1]:g}"


def _text(answer: Any) -> str:
    choices = getattr(answer, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError("the server's answer is no chat completion")
    return choices[0].message.content or ""


def _key(config: Config) -> str:
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ValueError(f"api_key_env: the environment variable {config.api_key_env} is not set")
    return key


def _groups(pattern: str) -> int | None:
    try:
        return re.compile(pattern).groups
    except re.error:
        return None
