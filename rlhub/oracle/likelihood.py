"""Likelihoods and one ESPO update, all masks and all samples in plain sight.

Source: ESPO (arXiv 2512.03759, Eqs. 3, 8, 10 and appendix D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhub.config.schema import AlgorithmConfig
from rlhub.noise import Noise, Quantity
from rlhub.oracle.network import row_logits
from rlhub.types import Rollout

LogProb = Callable[[np.ndarray], Tensor]  # masked bool [L] -> [L] log-probs of the true tokens; entries outside the mask are not used


def elbo_exact(log_prob: LogProb, length: int) -> Tensor:
    """The evidence lower bound in nats, by all masks: sum over S of (|S| - 1)! (L - |S|)! / L! times the log-probs in S."""
    total = torch.zeros((), dtype=torch.float64)
    for size in range(1, length + 1):
        weight = math.factorial(size - 1) * math.factorial(length - size) / math.factorial(length)
        for chosen in itertools.combinations(range(length), size):
            masked = np.isin(np.arange(length), chosen)
            total = total + weight * log_prob(masked)[list(chosen)].double().sum()
    return total


def coupled_masks(length: int, draws: int, noise: Noise, uid: int, update: int) -> list[np.ndarray]:
    """bool [L] for each draw: l ~ U{0..L}, then l positions without replacement; the second half of the pair is its complement."""
    masks = []
    for draw in range(draws):
        key = {"uid": uid, "update": update, "draw": draw}
        count = int(noise.uniform("views", 1, **key, quantity=Quantity.LEVEL)[0] * (length + 1))
        order = sorted(range(length), key=noise.uniform("views", length, **key).tolist().__getitem__)
        masks.append(np.isin(np.arange(length), order[:count]))
    return masks


def elbo_coupled(log_prob: LogProb, masks: Sequence[np.ndarray]) -> Tensor:
    """Mean over draws of half the sum of the pair, each half weighted (L + 1) / l over its own l masked positions; 0 where l = 0."""
    total = torch.zeros((), dtype=torch.float64)
    for mask in masks:
        for half in (mask, ~mask):
            if half.any():
                total = total + 0.5 * (len(mask) + 1) / half.sum() * log_prob(half)[torch.from_numpy(half)].double().sum()
    return total / len(masks)


def espo_loss(
    policy: Sequence[Tensor],
    proximal: Sequence[float],
    reference: Sequence[float] | None,
    lengths: Sequence[int],
    advantages: Sequence[float],
    algorithm: AlgorithmConfig,
) -> Tensor:
    """The loss of a batch from the ELBOs of its valid samples: -mean of min(rho A, clip(rho) A) + coefficient * mean of D^2 / 2.

    rho = exp((L_policy - L_proximal) / length), D = L_policy - L_reference.
    """
    clip_low, clip_high = (algorithm.objective.get(key, 0.2) for key in ("clip_low", "clip_high"))
    total = torch.zeros((), dtype=torch.float64)
    for sample, elbo in enumerate(policy):
        advantage = advantages[sample]
        ratio = ((elbo - proximal[sample]) / lengths[sample]).exp()
        if advantage > 0 and ratio > 1 + clip_high:
            total = total - (1 + clip_high) * advantage
        elif advantage < 0 and ratio < 1 - clip_low:
            total = total - (1 - clip_low) * advantage
        else:
            total = total - ratio * advantage
        if algorithm.kl.coefficient > 0:
            square = 0.5 * (elbo - reference[sample]) ** 2
            total = total + algorithm.kl.coefficient * (square / lengths[sample] if algorithm.kl.normalize == "length" else square)
    return total / len(policy)


def group_mean(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Each reward minus the mean of its group; 0 in a group of one."""
    members = [[other for other, name in zip(rewards, groups, strict=True) if name == group] for group in groups]
    return [reward - sum(others) / len(others) if len(others) > 1 else 0.0 for reward, others in zip(rewards, members, strict=True)]


@dataclass(frozen=True)
class Step:
    """One update: the loss, the gradient before clipping and the weights after the optimizer, by parameter name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def espo_step(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    algorithm: AlgorithmConfig,
    noise: Noise,
    update: int = 0,
    proximal: torch.nn.Module | None = None,
    reference: torch.nn.Module | None = None,
    max_grad_norm: float = 1.0,
) -> Step:
    """One ESPO update of `network` in place: all likelihoods in one graph, one backward pass, one optimizer step.

    Args:
        optimizer: over `network.parameters()`, for example `torch.optim.AdamW` with the learning rate of this step.
        rollouts: graded; samples with an invalid grade are left out.
        update: number of the inner update, the key of its masks.
        proximal: the weights that began the batch; None where they are the network's own, as at the first update.

    Raises:
        ValueError: the algorithm is another one.
    """
    parts = (algorithm.advantage, algorithm.views, algorithm.likelihood, algorithm.objective)
    names = [*(part["name"] for part in parts), algorithm.kl.kind, algorithm.kl.against, algorithm.views.get("levels", "independent")]
    if names != ["group_mean", "coupled", "elbo", "sequence_clip", "k2", "reference", "independent"]:
        raise ValueError(f"the oracle computes ESPO with its paper's parts, got {', '.join(names)}")
    valid = sorted((rollout for rollout in rollouts if rollout.reward.valid), key=lambda rollout: rollout.uid)
    advantages = group_mean([rollout.reward.value for rollout in valid], [rollout.group_uid for rollout in valid])
    lengths = [len(rollout.completion_ids) if algorithm.length == "canvas" else rollout.length for rollout in valid]
    draws = algorithm.views.get("draws", 2)
    masks = [coupled_masks(length, draws, noise, rollout.uid, update) for rollout, length in zip(valid, lengths, strict=True)]

    def elbos(judge: torch.nn.Module) -> list[Tensor]:
        return [elbo_coupled(completion_log_prob(judge, rollout, len(mask[0])), mask) for rollout, mask in zip(valid, masks, strict=True)]

    policy = elbos(network)
    with torch.no_grad():
        before = [elbo.item() for elbo in (policy if proximal is None else elbos(proximal))]
        frozen = [elbo.item() for elbo in elbos(reference)] if algorithm.kl.coefficient > 0 else None
    optimizer.zero_grad()
    loss = espo_loss(policy, before, frozen, lengths, advantages, algorithm)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm).item()
    optimizer.step()
    return Step(loss.item(), grad_norm, gradients, {name: parameter.detach().clone() for name, parameter in network.named_parameters()})


def completion_log_prob(network: torch.nn.Module, rollout: Rollout, length: int) -> LogProb:
    """The log-probs of the first `length` completion tokens, given the prompt and the completion tokens that are not masked."""
    completion = rollout.completion_ids[:length].astype(np.int64)

    def log_prob(masked: np.ndarray) -> Tensor:
        row = np.concatenate([rollout.prompt_ids, np.where(masked, network.mask_id, completion)])
        log_probs = row_logits(network, row)[len(rollout.prompt_ids) :].log_softmax(-1)
        return log_probs[torch.arange(length), torch.from_numpy(completion)]

    return log_prob
