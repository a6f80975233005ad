"""Correction for samples of older weights: truncated importance sampling between the weights that generated and those that train.

    w = min(c, exp((log p_proximal - log p_behavior) / length))

The proximal policy is the one that began the batch; clipping compares the trained policy with it, and w accounts for what lies before
(decoupled PPO, arXiv 2110.00641; AReaL, arXiv 2505.24298). The cap bounds the variance and biases towards the behavior policy (IMPALA,
arXiv 1802.01561). Divided by the length w is the ratio of a token in geometric mean, the scale of the sequence ratios of ESPO and GSPO: for
completions of one token the corrected gradient is the on-policy one, for longer ones w is closer to 1 than the full ratio, which would be
without bias and of a variance that grows with the length.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rlhub.types import Credit, LogLikelihood


def correction_weights(proximal: LogLikelihood, behavior: LogLikelihood, cap: float) -> Tensor:
    """The weight [B] of each sample, at most `cap`; log-likelihoods of tokens or steps are summed first.

    Example:
        >>> import torch
        >>> def sequence(*values):
        ...     return LogLikelihood(torch.tensor(values), "exact", "sequence", torch.tensor([2] * len(values)))
        >>> correction_weights(sequence(-2.0, -2.0), sequence(-2.0, -9.0), cap=2.0)
        tensor([1., 2.])
    """
    return ((_total(proximal) - _total(behavior)) / proximal.scored_length).exp().clamp(max=cap)


def weighted_credit(credit: Credit, weights: Tensor) -> Credit:
    """Credit whose advantages, per sample, step or token, are multiplied by the weights [B] of their samples."""
    return replace(credit, advantages=credit.advantages * weights.view(-1, *[1] * (credit.advantages.dim() - 1)))


def correction_metrics(weights: Tensor, cap: float) -> dict[str, float]:
    """Mean and maximum of weights [n], and the share that met the cap; nothing of no weights."""
    if not len(weights):
        return {}
    return {
        "async/correction_mean": weights.mean().item(),
        "async/correction_max": weights.max().item(),
        "async/correction_capped_share": (weights >= cap).double().mean().item(),
    }


def _total(estimate: LogLikelihood) -> Tensor:
    """Nats [B] of the whole sample."""
    if estimate.granularity == "sequence":
        return estimate.value
    assert estimate.mask is not None, "estimates by token or step say which entries exist"
    return (estimate.value * estimate.mask).sum(1)
