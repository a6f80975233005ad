"""From task examples to graded rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rewards import Item
from rlhub.config import Recipe, SamplerConfig
from rlhub.data import Task
from rlhub.errors import DataError, WorkerHung, WorkerLost
from rlhub.noise import Noise, sample_uid
from rlhub.tokenizers import decode, encode_prompts
from rlhub.types import NEVER, Batch, Example, Request, RewardResult, Rollout

SFT, ONLINE, EVAL, SAMPLE, PAIRS = range(5)  # the phase field of uids


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
    """The rollouts with their grades, and their texts. Graders get prompts as the task has them, text or chat messages."""
    texts = [decode(tokenizer, rollout.completion_ids) for rollout in rollouts]
    items = [
        (example.prompt, text, example.columns | {"rollout": rollout_facts(rollout)})
        for example, text, rollout in zip(issued.examples, texts, rollouts, strict=True)
    ]
    results = grade_items(crew, items, batch_size)
    graded = [rollout.graded(result, result.parts) for rollout, result in zip(rollouts, results, strict=True)]
    return graded, texts


def rollout_facts(rollout: Rollout) -> dict[str, int]:
    """What graders see of the generation, as the column `rollout`: tokens through the first EOS, forwards and canvas tokens."""
    return {"num_tokens": int(rollout.length), "num_forwards": int(rollout.num_forwards), "length": len(rollout.completion_ids)}


def grade_items(crew: Any, items: Sequence[Item], batch_size: int) -> list[RewardResult]:
    """One result per (prompt, completion, columns), in order.

    A batch whose reward worker keeps dying or hanging is graded one by one, so that this status stands only at the completions that
    are to blame, and never as a zero.
    """
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
    return [results[index] for index in range(len(items))]


def _give_up(sizes: list[int], index: int, error: WorkerLost) -> list[RewardResult] | None:
    if sizes[index] > 1:
        return None
    return [RewardResult(float("nan"), "timeout" if isinstance(error, WorkerHung) else "crashed", str(error))]


def grade_states(crew: Any, issued: Issued, rollouts: Sequence[Rollout], tokenizer: Any, recipe: Recipe) -> list[Rollout]:
    """Graded rollouts with `step_rewards`, a grade for each of the sampler's steps, as `task.state_rewards` asks; as they are without.

    With `every: k` the states after the k-th, 2k-th, ... and the last step are graded, and a step carries the grade of the first graded
    state that is not before it. The last state is the completion, which has its grade; equal states of a rollout are graded once.
    """
    settings, num_steps = recipe.task.state_rewards, recipe.sampler.steps
    if settings.every == 0:
        return list(rollouts)
    graded_at = [min(step - step % settings.every + settings.every, num_steps) - 1 for step in range(num_steps)]
    items: list[Item] = []
    places: list[dict[int, int]] = []  # of each rollout: graded step -> item, for steps before the rollout's last commit
    for example, rollout in zip(issued.examples, rollouts, strict=True):
        commits = np.unique(rollout.unmask_step[rollout.unmask_step != NEVER])
        place: dict[int, int] = {}
        seen: dict[int, int] = {}
        for step in graded_at:
            done = int(np.searchsorted(commits, step, side="right"))
            if done == len(commits):
                break
            if done not in seen:
                seen[done] = len(items)
                text = state_text(tokenizer, state_after(rollout, step, tokenizer.mask_token_id), settings.mask_text)
                items.append((example.prompt, text, example.columns | {"rollout": rollout_facts(rollout)}))
            place[step] = seen[done]
        places.append(place)
    grades = grade_items(crew, items, recipe.reward_pool.batch_size)
    return [
        dataclasses.replace(rollout, step_rewards=tuple(grades[place[step]] if step in place else rollout.reward for step in graded_at))
        for rollout, place in zip(rollouts, places, strict=True)
    ]


def state_after(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """int32 [L], the canvas after a denoising step (from 0); an early stop's filling counts as done after the last one."""
    filled = (rollout.unmask_step != NEVER) & (rollout.unmask_step <= step)
    return np.where(filled, rollout.completion_ids, mask_id).astype(np.int32)


def state_text(tokenizer: Any, canvas: np.ndarray, mask_text: str | None = None) -> str:
    """The text of a state [L] up to its first EOS, with masks as `mask_text` (None: the mask token) and no other special tokens."""
    ends = np.flatnonzero(canvas == tokenizer.eos_token_id)
    hidden = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}
    shown = [token for token in (canvas[: ends[0]] if len(ends) else canvas).tolist() if token not in hidden]
    text = tokenizer.decode(shown, skip_special_tokens=False)
    return text if mask_text is None else text.replace(tokenizer.mask_token, mask_text)


def shuffle_grades(rollouts: Sequence[Rollout], noise: Noise, step: int) -> list[Rollout]:
    """The control that must not learn: grades permuted over the batch."""
    order = noise.generator("shuffle_rewards", uid=step).permutation(len(rollouts))
    return [
        dataclasses.replace(rollout, **{name: getattr(rollouts[source], name) for name in ("reward", "reward_parts", "step_rewards")})
        for rollout, source in zip(rollouts, order, strict=True)
    ]


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
