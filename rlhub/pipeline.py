"""From task examples to graded rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rlhub.config import Recipe, SamplerConfig
from rlhub.data import Task
from rlhub.errors import DataError, WorkerHung, WorkerLost
from rlhub.noise import Noise, sample_uid
from rlhub.tokenizers import decode, encode_prompts
from rlhub.types import NEVER, Batch, Example, Request, RewardResult, Rollout

SFT, ONLINE, EVAL, SAMPLE = range(4)  # the phase field of uids


@dataclass(frozen=True)
class Issued:
    """Requests of one step with the examples that they ask about; `examples[i]` belongs to `requests[i]`."""

    requests: list[Request]
    examples: list[Example]


def issue(task: Task, tokenizer: Any, phase: int, step: int, first_row: int, num_prompts: int, num_completions: int) -> Issued:
    """Ask for `num_completions` of each of `num_prompts` consecutive examples. A pure function of its arguments, so a resumed run
    issues the same uids."""
    examples = [task.example(first_row + row) for row in range(num_prompts)]
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    requests, repeated = [], []
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        group = sample_uid(phase, step, row, 0)
        for member in range(num_completions):
            requests.append(Request(sample_uid(phase, step, row, member), group, prompt))
            repeated.append(example)
    return Issued(requests, repeated)


def generate(crew: Any, issued: Issued, settings: SamplerConfig) -> list[Rollout]:
    """Rollouts of all requests, in their order, shared out over the generators."""
    share = -(-len(issued.requests) // len(crew.generators.handles))
    pieces = [(issued.requests[start : start + share], settings, crew.version) for start in range(0, len(issued.requests), share)]
    return [rollout for part in crew.generators.map("generate", pieces) for rollout in part]


def grade(crew: Any, issued: Issued, rollouts: Sequence[Rollout], tokenizer: Any, batch_size: int) -> tuple[list[Rollout], list[str]]:
    """The rollouts with their grades, and their texts.

    A batch whose reward worker keeps dying or hanging is graded one by one, so that this status stands only at the completions that
    are to blame, and never as a zero.
    """
    texts = [decode(tokenizer, rollout.completion_ids) for rollout in rollouts]
    items = [(prompt_text(example), text, example.columns) for example, text in zip(issued.examples, texts, strict=True)]
    results: dict[int, RewardResult] = {}
    waiting = [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]
    while waiting:
        batches, waiting = waiting, []
        give_up = partial(_give_up, [len(batch) for batch in batches])
        parts = crew.graders.map("grade", [([items[index] for index in batch],) for batch in batches], give_up)
        for batch, part in zip(batches, parts, strict=True):
            if part is None:
                waiting += [range(index, index + 1) for index in batch]
                continue
            results.update(zip(batch, part, strict=False))
            if len(part) < len(batch):  # the worker ran out of time and has graded the first ones
                waiting.append(batch[len(part) :])
    return [rollout.graded(results[index]) for index, rollout in enumerate(rollouts)], texts


def _give_up(sizes: list[int], index: int, error: WorkerLost) -> list[RewardResult] | None:
    if sizes[index] > 1:
        return None
    return [RewardResult(float("nan"), "timeout" if isinstance(error, WorkerHung) else "crashed", str(error))]


def shuffle_grades(rollouts: Sequence[Rollout], noise: Noise, step: int) -> list[Rollout]:
    """The control that must not learn: grades permuted over the batch."""
    order = noise.generator("shuffle_rewards", uid=step).permutation(len(rollouts))
    return [rollout.graded(rollouts[source].reward) for rollout, source in zip(rollouts, order, strict=True)]


def prompt_text(example: Example) -> str:
    """A prompt as one text; chat messages are joined by newlines."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n".join(message["content"] for message in example.prompt)


def demonstration_batch(task: Task, tokenizer: Any, recipe: Recipe, step: int) -> Batch:
    """The supervised batch of one step (1-based): demonstrations followed by EOS up to the canvas length.

    Raises:
        DataError: a demonstration is missing or longer than the canvas.
    """
    size, canvas = recipe.sft.batch_size, recipe.sampler.length
    first = (step - 1) * size
    examples = [task.example(first + row) for row in range(size)]
    missing = [example.row for example in examples if example.demonstration is None]
    if missing:
        raise DataError(f"task {task.name} has no demonstration for row {missing[0]}; supervised training needs one for each")
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    answers = tokenizer([example.demonstration for example in examples], add_special_tokens=False)["input_ids"]
    completions = []
    for example, answer in zip(examples, answers, strict=True):
        if len(answer) > canvas:
            raise DataError(f"demonstration of row {example.row} has {len(answer)} tokens, sampler.length is {canvas}; raise it")
        completions.append(np.array(answer + [tokenizer.eos_token_id] * (canvas - len(answer)), dtype=np.int32))
    length = np.array([min(len(answer) + 1, canvas) for answer in answers])
    span = np.full(size, canvas) if recipe.algorithm.length == "canvas" else length
    return Batch(
        uid=np.array([sample_uid(SFT, step, row, 0) for row in range(size)], dtype=np.uint64),
        group=np.arange(size),
        prompts=prompts,
        completions=completions,
        length=length,
        span=span,
        rewards=np.ones((size, 1)),
        member=np.zeros(size, dtype=np.int64),
        mask_id=tokenizer.mask_token_id,
        unmask_step=[np.full(canvas, NEVER, dtype=np.int16)] * size,
        block_length=recipe.sampler.block_length,
    )


def evaluation_settings(settings: SamplerConfig, temperature: float) -> SamplerConfig:
    """The recipe's sampler at another temperature."""
    return dataclasses.replace(settings, temperature=temperature)
