"""From rollouts to graded rollouts: completions, the states between, and the control that must not learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rewards import Item
from rlhub.algorithm.batching import grade_of
from rlhub.checkpoints.tokenizers import decode
from rlhub.config.schema import Recipe
from rlhub.errors import WorkerHung, WorkerLost
from rlhub.noise import Noise
from rlhub.training.rollouts import Issued
from rlhub.types import NEVER, RewardResult, RewardStatus, Rollout
from workers.crew import Crew

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def grade(
    crew: Crew, issued: Issued, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> tuple[list[Rollout], list[str]]:
    """The rollouts with their grades, and their texts. Graders get prompts as the task has them, text or chat messages."""
    texts = [decode(tokenizer, rollout.completion_ids[: rollout.length]) for rollout in rollouts]
    items = [
        (example.prompt, text, example.columns | {"rollout": rollout_facts(rollout)})
        for example, text, rollout in zip(issued.examples, texts, rollouts, strict=True)
    ]
    results = grade_items(crew, items, batch_size)
    graded = [rollout.graded(result) for rollout, result in zip(rollouts, results, strict=True)]
    return graded, texts


def rollout_facts(rollout: Rollout) -> dict[str, int]:
    """What graders see of the generation, as the column `rollout`: tokens through the first EOS, forwards and canvas tokens."""
    return {"num_tokens": int(rollout.length), "num_forwards": int(rollout.num_forwards), "length": len(rollout.completion_ids)}


def grade_items(crew: Crew, items: Sequence[Item], batch_size: int) -> list[RewardResult]:
    """One result per (prompt, completion, columns), in order.

    Workers give a status to whatever a grader does (`rewards/pool/FAILURES.md`), so what fails here is a worker as a whole. A batch whose
    workers kept dying or hanging is graded one by one: this status stands only at the completions that are to blame.
    """
    results: dict[int, RewardResult] = {}
    waiting = [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]
    while waiting:
        batches, waiting = waiting, []
        pieces = [[items[index] for index in batch] for batch in batches]
        parts = crew.graders.grade(pieces)
        for batch, part in zip(batches, parts, strict=True):
            if isinstance(part, WorkerLost):
                if len(batch) > 1:
                    waiting += [range(index, index + 1) for index in batch]
                else:
                    status: RewardStatus = "timeout" if isinstance(part, WorkerHung) else "crashed"
                    results[batch[0]] = RewardResult(float("nan"), status, str(part))
                continue
            results.update(zip(batch, part, strict=False))
            if len(part) < len(batch):  # the worker ran out of time and has graded the first ones
                waiting.append(batch[len(part) :])
    return [results[index] for index in range(len(items))]


def reason_of(result: RewardResult) -> str:
    """Status and last line of what a grader said of an item that it did not grade."""
    lines = [line.strip() for line in result.detail.splitlines() if line.strip()]
    return f"{result.status}, {lines[-1]}" if lines else result.status


def grade_states(
    crew: Crew, issued: Issued, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> list[Rollout]:
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
        dataclasses.replace(rollout, step_rewards=tuple(grades[place[step]] if step in place else grade_of(rollout) for step in graded_at))
        for rollout, place in zip(rollouts, places, strict=True)
    ]


def state_after(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """int32 [L], the canvas after a denoising step (from 0); an early stop's filling counts as done after the last one."""
    filled = (rollout.unmask_step != NEVER) & (rollout.unmask_step <= step)
    return np.where(filled, rollout.completion_ids, mask_id).astype(np.int32)


def state_text(tokenizer: PreTrainedTokenizerFast, canvas: np.ndarray, mask_text: str | None = None) -> str:
    """The text of a state [L] up to its first EOS, with masks as `mask_text` (None: the mask token) and no other special tokens."""
    ends = np.flatnonzero(canvas == tokenizer.eos_token_id)
    hidden = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}
    shown = [token for token in (canvas[: ends[0]] if len(ends) else canvas).tolist() if token not in hidden]
    text = str(tokenizer.decode(shown, skip_special_tokens=False))
    return text if mask_text is None else text.replace(tokenizer.mask_token, mask_text)


def shuffle_grades(rollouts: Sequence[Rollout], noise: Noise, step: int) -> list[Rollout]:
    """The control that must not learn: grades permuted over the batch."""
    order = noise.generator("shuffle_rewards", step=step).permutation(len(rollouts))
    return [
        dataclasses.replace(rollout, **{name: getattr(rollouts[source], name) for name in ("reward", "step_rewards")})
        for rollout, source in zip(rollouts, order, strict=True)
    ]
