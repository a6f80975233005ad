"""Objectives: from log-likelihoods under the compared policies to a scalar to minimise.

A module here has a frozen dataclass `Config` and

    loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor scalar, dict[str, float]]

It sees the whole global batch in uid order in float64, so it may couple a group or the batch. Means run over the valid samples
(`credit.valid`), whether or not their advantage is zero. It may state

    NEEDS: tuple[str, ...]      scores other than `policy` that must be present: `proximal`, `reference`. Default: ()
    ADVANTAGES: bool            False: it learns from pairs, labels or the samples themselves. Default: True, and then it must scale with
                                each sample's advantage, since stale samples are weighed by it (`rlhub.algorithm.off_policy`)
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhub.types import Credit, LogLikelihood, Scores

CONTRACT = ("Config", "loss(scores, credit, config)")


def valid_mean(per_sample: Tensor, credit: Credit) -> Tensor:
    """Mean over valid samples of a `[B]` tensor."""
    return (per_sample * credit.valid).sum() / credit.valid.sum().clamp(min=1)


def by_pair(per_sample: Tensor, scores: Scores, credit: Credit, objective: str) -> tuple[Tensor, Tensor]:
    """Chosen and rejected entries [N] of a `[B]` tensor, by `credit.pairs`.

    Raises:
        ValueError: the credit holds no pairs, or the likelihood is not one of sequences.
    """
    if credit.pairs is None:
        raise ValueError(f"{objective} needs preference pairs: use an advantage that makes them, such as best_worst")
    if scores.policy.granularity != "sequence":
        raise ValueError(f"{objective} needs a sequence likelihood, got one per {scores.policy.granularity}")
    return per_sample[credit.pairs[:, 0]], per_sample[credit.pairs[:, 1]]


def pair_metrics(objective: str, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Number of pairs, share of those that are ranked right, and the mean margin; `chosen` and `rejected` are [N]."""
    metrics = {"pairs": float(len(chosen))}
    if len(chosen):
        metrics |= {
            f"{objective}/accuracy": (chosen > rejected).double().mean().item(),
            f"{objective}/margin": (chosen - rejected).mean().item(),
            f"{objective}/chosen": chosen.mean().item(),
            f"{objective}/rejected": rejected.mean().item(),
        }
    return metrics


def spread(credit: Credit, likelihood: LogLikelihood) -> Tensor:
    """The advantages in the shape of the likelihood's value: one per sample is shared by its tokens or steps.

    Raises:
        ValueError: advantages per token or step meet a likelihood of another granularity.
    """
    advantages, shape = credit.advantages, likelihood.value.shape
    if advantages.shape == shape:
        return advantages
    if advantages.dim() == 1 and len(shape) == 2:
        return advantages[:, None].expand(shape)
    raise ValueError(f"advantages of shape {list(advantages.shape)} do not fit a {likelihood.granularity} likelihood {list(shape)}")


def token_mean(per_token: Tensor, likelihood: LogLikelihood) -> Tensor:
    """[B], mean of `[B, L]` or `[B, S]` over the counted tokens or steps of each sample."""
    return (per_token * likelihood.mask).sum(1) / likelihood.mask.sum(1).clamp(min=1)


def weighted_mean(credit: Credit, likelihood: LogLikelihood) -> Tensor:
    """[B], advantage times log-likelihood per scored token: of the sequence, or averaged over its tokens or steps."""
    weighted = spread(credit, likelihood) * likelihood.value
    return weighted / likelihood.scored_length if likelihood.granularity == "sequence" else token_mean(weighted, likelihood)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A), elementwise (PPO, arXiv 1707.06347, Eq. 7).

    At a tie the two branches share the gradient evenly, so at ratio 1 it is the full one even for clip widths of 0.
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def ratio_metrics(log_ratio: Tensor, advantage: Tensor, counted: Tensor, clip_low: float, clip_high: float) -> dict[str, float]:
    """Statistics of the importance ratio over the counted entries; `clip/fraction` counts those whose gradient is cut."""
    counted = counted.expand_as(log_ratio)
    if not counted.any():
        return {}
    ratio = log_ratio.detach().exp()[counted]
    advantage = advantage.expand_as(log_ratio)[counted]
    low = (advantage < 0) & (ratio < 1 - clip_low)
    high = (advantage > 0) & (ratio > 1 + clip_high)
    return {
        "ratio/mean": ratio.mean().item(),
        "ratio/min": ratio.min().item(),
        "ratio/max": ratio.max().item(),
        "clip/low": low.double().mean().item(),
        "clip/high": high.double().mean().item(),
        "clip/fraction": (low | high).double().mean().item(),
    }
