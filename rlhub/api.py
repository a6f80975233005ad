"""rlhub from Python, for notebooks, tests and training loops of your own; exported by `rlhub`, explained in docs/python_api.md.

Two levels: whole commands (`train`, `generate`, `log_likelihood`), and the steps of a training loop, which are pure functions but for the
networks that they run: rollouts -> `make_batch` -> `Algorithm.credit` -> `make_views` -> `token_log_probs` -> `Algorithm.scores` ->
`Algorithm.loss`. No function here touches a global seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhub.algorithm import batching
from rlhub.algorithm.batching import micro_batches
from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.checkpoints.tokenizers import answer_end
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import AlgorithmConfig, KLConfig
from rlhub.errors import RecipeError, UserError
from rlhub.inference import (
    TOKENS_AT_ONCE,
    Estimate,
    Model,
    Prompt,
    completion_token_ids,
    generate,
    load_model,
    log_likelihood,
    prompt_token_ids,
)
from rlhub.noise import Noise
from rlhub.parts import did_you_mean, load_part
from rlhub.tasks import load_task, task_tokenizer
from rlhub.types import Batch, Credit, LogLikelihood, RewardResult, Rollout, Scores, Views

__all__ = [
    "Algorithm",
    "Batch",
    "Credit",
    "Estimate",
    "LogLikelihood",
    "LogProbs",
    "Model",
    "RewardResult",
    "Rollout",
    "Scores",
    "Views",
    "compose",
    "demonstrations",
    "generate",
    "load_model",
    "load_task",
    "log_likelihood",
    "make_batch",
    "make_views",
    "new_model",
    "task_tokenizer",
    "token_log_probs",
    "train",
]


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train as `rlhub train` does; returns the run folder.

    Raises:
        RecipeError: the recipe cannot be used as written.

    Example:
        >>> train("recipes/sort.yaml", overrides=["run.steps=10"])                # doctest: +SKIP
    """
    from rlhub.training.run import train as run_recipe

    return run_recipe(load_recipe(recipe_path, overrides))


def new_model(family: str = "llada", tokenizer: Any = None, seed: int = 0, **config: Any) -> Model:
    """A model of random weights.

    Args:
        family: a module of `rlhub/models`, or your own by its dotted path.
        tokenizer: decides vocabulary, mask and EOS; without one the family's small defaults hold and token ids are all that it takes.
        config: fields of the family's config, such as `d_model=64`; the others are those of its `TINY`.

    Raises:
        RecipeError: the family or a field is unknown.

    Example:
        >>> model = new_model(tokenizer=task_tokenizer("sort", {}), d_model=16, n_layers=1)
        >>> model.logits([[5, 3, model.mask_id]]).shape
        torch.Size([1, 3, 14])
    """
    module = load_part("models", family)
    known = {field.name for field in fields(module.Config)} | set(module.TINY)
    for key in config:
        if key not in known:
            raise RecipeError(f"unknown field {key!r} of {family}'s config{did_you_mean(key, known)}")
    published = dict(module.TINY) | config
    if tokenizer is not None:
        special = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        published |= {"vocab_size": len(tokenizer), **special}
    network = module.build(module.Config.from_published(published)).initialize(torch.Generator().manual_seed(seed))
    return Model(network.eval(), tokenizer=tokenizer)


def compose(**keys: Any) -> Algorithm:
    """An algorithm from the keys of a recipe's block `algorithm`; a part is its name, or a mapping with its name and options.

    Raises:
        RecipeError: a key, a name or an option is unknown.

    Example:
        >>> compose(views={"name": "elbo", "draws": 4}, objective="policy_gradient", kl={"coefficient": 0.01}).needs_reference
        True
    """
    parts = ("advantage", "views", "likelihood", "objective")
    named = {key: {"name": value} if key in parts and isinstance(value, str) else value for key, value in keys.items()}
    if "kl" in named:
        named["kl"] = _section(KLConfig, named["kl"], "kl")
    return Algorithm.compose(_section(AlgorithmConfig, named, "algorithm"))


def demonstrations(model: Model, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]]) -> list[Rollout]:
    """Written completions in the form of rollouts, for supervised steps; an EOS follows each.

    Raises:
        UserError: a prompt or completion cannot be used, or there are not as many of one as of the other.
    """
    if len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts and {len(completions)} completions; give one completion to each prompt")
    made = []
    for row, (prompt, completion) in enumerate(zip(prompt_token_ids(model, prompts), completions, strict=True)):
        end = answer_end(model.tokenizer, prompts[row]) if isinstance(completion, str) else [model.eos_id]
        ids = np.append(completion_token_ids(model, completion), end).astype(np.int32)
        nothing = np.full(len(ids), np.nan, dtype=np.float32)
        step, version = np.zeros(len(ids), dtype=np.int16), np.zeros(len(ids), dtype=np.int32)
        made.append(Rollout(row, row, prompt, ids, len(ids), step, nothing, nothing, version, num_forwards=0))
    return made


def make_batch(
    model: Model, algorithm: Algorithm, rollouts: Sequence[Rollout], rewards: Sequence[float | RewardResult], group_size: int = 1
) -> Batch:
    """Graded rollouts as a batch.

    Args:
        rewards: one for each rollout; a `RewardResult` may say that grading failed, which `algorithm.on_invalid` then deals with.
        group_size: consecutive rollouts that answer the same prompt, among which credit is shared.

    Raises:
        UserError: the numbers do not fit together.
    """
    if len(rewards) != len(rollouts) or not rollouts or len(rollouts) % group_size:
        raise UserError(f"{len(rollouts)} rollouts and {len(rewards)} rewards in groups of {group_size}; give one reward to each rollout")
    graded = [
        replace(rollout, uid=row, group_uid=row // group_size, reward=reward if isinstance(reward, RewardResult) else RewardResult(reward))
        for row, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True))
    ]
    config = algorithm.config
    return batching.make_batch(graded, scored_length=config.length, on_invalid=config.on_invalid)


def make_views(model: Model, algorithm: Algorithm, batch: Batch, credit: Credit, seed: int, update: int = 0) -> Views:
    """The noisy rows through which a batch is scored: the same for every model that is given them.

    Args:
        seed: give each step its own.
        update: inner update on the same batch, counted from 0; it matters with `fresh_views: update`.
    """
    return algorithm.make_views(batch, credit, Noise(seed), update, model.network.profile)


def token_log_probs(model: Model, views: Views, max_tokens: int = TOKENS_AT_ONCE) -> Tensor:
    """Log-probs fp32 [M] of every score of the views, with gradient unless it is switched off (`torch.no_grad`).

    All activations are kept for `backward`. Where they do not fit, take `Algorithm.coefficients` without gradient first and
    back-propagate `(log_prob * coefficient).sum()` for one part of the views at a time, as `workers/learner.py` does.

    Args:
        max_tokens: rows of about this many tokens go through the network together.
    """
    parts = [micro_batch_log_probs(model.network, views, run, model.device) for run in micro_batches(views, max_tokens)]
    return torch.cat(parts).cpu() if parts else torch.zeros(0)


def _section(schema: type, values: Mapping[str, Any], owner: str) -> Any:
    """A section of a recipe from a mapping of its keys."""
    known = [field.name for field in fields(schema)]
    for key in values:
        if key not in known:
            raise RecipeError(f"unknown key {key!r} of {owner}{did_you_mean(key, known)}")
    return schema(**values)
