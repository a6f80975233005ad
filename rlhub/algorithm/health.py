"""Statistics that tell whether the estimates behind a step can be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhub.algorithm.batching import grade_of
from rlhub.algorithm.compose import Algorithm
from rlhub.types import Batch, Credit, LogLikelihood, Rollout, Scores


def health_metrics(algorithm: Algorithm, scores: Scores, credit: Credit, batch: Batch) -> dict[str, float]:
    """Monte-Carlo error, clip stability and effective sample size of one update, and the share of groups without signal.

    Keys (absent where the estimate does not provide them):
        `elbo/per_token`: mean log-likelihood per scored token, nats.
        `elbo/standard_error`: mean over sequences of the Monte-Carlo standard error of the difference between policy and reference
            (proximal where there is no reference), nats; needs two draws.
        `clip/flip_share`: share of (sequence, draw) for which the clip decision by that draw alone differs from the one by all draws.
        `ess`: effective sample size of the ratios as a share of the batch, (sum w)^2 / (B sum w^2).
        `group/no_signal_share`: share of prompt groups whose advantages are all zero.
    """
    policy = scores.policy
    valid = credit.valid
    metrics: dict[str, float] = {"group/no_signal_share": _no_signal_share(credit, batch)}
    if policy.granularity != "sequence" or not valid.any():
        return metrics
    metrics["elbo/per_token"] = (policy.value / policy.scored_length)[valid].mean().item()
    if scores.proximal is not None:
        weight = ((policy.value - scores.proximal.value) / policy.scored_length).detach()[valid].exp()
        metrics["ess"] = (weight.sum() ** 2 / (len(weight) * (weight**2).sum())).item()
    other = scores.reference or scores.proximal
    if other is not None and other.draws is not None and policy.draws is not None and policy.draws.shape[1] > 1:
        difference = (policy.draws - other.draws).detach()[valid]
        error = difference.std(1) / difference.shape[1] ** 0.5
        metrics["elbo/standard_error"] = error.mean().item()
        if scores.proximal is not None:
            metrics["clip/flip_share"] = _flip_share(algorithm, scores, scores.proximal, credit, policy.draws.shape[1])
    return metrics


def _no_signal_share(credit: Credit, batch: Batch) -> float:
    silent = (credit.advantages.reshape(len(batch), -1) == 0).all(1).numpy()
    groups = np.ones(int(batch.group.max()) + 1, dtype=bool)
    np.logical_and.at(groups, batch.group, silent)
    return float(groups.mean())


def _flip_share(algorithm: Algorithm, scores: Scores, proximal: LogLikelihood, credit: Credit, num_draws: int) -> float:
    """A sequence is cut when the objective's gradient with respect to its value is zero although its advantage is not."""
    decided = credit.valid & (credit.advantages.reshape(len(credit.valid), -1) != 0).any(1)
    if not decided.any():
        return 0.0
    whole = _is_cut(algorithm, scores, credit)
    flips = []
    for draw in range(num_draws):
        single = dataclasses.replace(scores, policy=_one_draw(scores.policy, draw), proximal=_one_draw(proximal, draw))
        flips.append((_is_cut(algorithm, single, credit) != whole)[decided].double().mean())
    return torch.stack(flips).mean().item()


def _one_draw(estimate: LogLikelihood, draw: int) -> LogLikelihood:
    assert estimate.draws is not None, "both estimates come from the same draws"
    return dataclasses.replace(estimate, value=estimate.draws[:, draw], draws=estimate.draws[:, draw : draw + 1])


def _is_cut(algorithm: Algorithm, scores: Scores, credit: Credit) -> Tensor:
    leaf = scores.policy.value.detach().requires_grad_()
    module, config = algorithm.objective
    loss, _ = module.loss(dataclasses.replace(scores, policy=dataclasses.replace(scores.policy, value=leaf)), credit, config)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient == 0


def staleness(rollouts: Sequence[Rollout], version: int) -> np.ndarray:
    """int64 [B], how many versions before `version` the weights were that generated the oldest token of each rollout."""
    return np.array([version - int(rollout.policy_version.min()) for rollout in rollouts])


def staleness_metrics(rollouts: list[Rollout], version: int) -> dict[str, float]:
    """How old the weights were that generated a batch, in versions before `version`.

    Keys: `async/staleness_mean`, `async/staleness_max` (of the oldest token of each rollout), `async/mixed_share` (share of rollouts
    whose tokens come from several versions).
    """
    age = staleness(rollouts, version)
    mixed = [rollout.policy_version.min() < rollout.policy_version.max() for rollout in rollouts]
    return {
        "async/staleness_mean": float(age.mean()),
        "async/staleness_max": float(age.max()),
        "async/mixed_share": float(np.mean(mixed)),
    }


def rollout_metrics(rollouts: list[Rollout], stop_ids: int | Sequence[int]) -> dict[str, float]:
    """Grades and lengths of a batch of rollouts, which end at the first of `stop_ids`, EOS or an end of turn.

    Keys: `reward/mean`, `reward/std`, `reward/invalid_share`, `reward/part/<label>`, `reward/cache_hits`, `step_reward/mean` and
    `step_reward/invalid_share` (of the grades of all denoising steps), `length/mean` (tokens through the first EOS),
    `eos/flood_rate` (share of completions that are EOS from the first token), `eos/early_rate` (share that ends in the first quarter
    of the canvas), `eos/missing_rate` (share without EOS), `forwards/mean`.
    """
    rewards = [grade_of(rollout) for rollout in rollouts]
    values = np.array([reward.value if reward.valid else np.nan for reward in rewards])
    canvas = np.array([len(rollout.completion_ids) for rollout in rollouts])
    length = np.array([rollout.length for rollout in rollouts])
    ended = np.array([bool(np.isin(rollout.completion_ids, stop_ids).any()) for rollout in rollouts])
    metrics = {
        "reward/mean": float(np.nanmean(values)) if not np.isnan(values).all() else float("nan"),
        "reward/std": float(np.nanstd(values)) if not np.isnan(values).all() else float("nan"),
        "reward/invalid_share": float(np.isnan(values).mean()),
        "reward/correct_share": float(np.mean([reward.accurate for reward in rewards])),
        "length/mean": float(length.mean()),
        "eos/flood_rate": float((ended & (length == 1)).mean()),
        "eos/early_rate": float((ended & (length <= canvas / 4)).mean()),
        "eos/missing_rate": float((~ended).mean()),
        "forwards/mean": float(np.mean([rollout.num_forwards for rollout in rollouts])),
    }
    grades = [grade for rollout in rollouts for grade in rollout.step_rewards]
    if grades:
        of_steps = [grade.value for grade in grades if grade.valid]
        metrics["step_reward/mean"] = float(np.mean(of_steps)) if of_steps else float("nan")
        metrics["step_reward/invalid_share"] = 1 - len(of_steps) / len(grades)
    for label in dict.fromkeys(label for reward in rewards for label in reward.parts):
        parts = [reward.parts[label] for reward in rewards if label in reward.parts]
        valid = [part.value for part in parts if part.valid]
        metrics[f"reward/part/{label}"] = float(np.mean(valid)) if valid else float("nan")
    if hits := sum(reward.cached for reward in rewards):
        metrics["reward/cache_hits"] = float(hits)
    return metrics
