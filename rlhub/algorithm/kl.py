"""Estimates of the divergence from another policy, as penalties with a useful gradient (Schulman 2020, "Approximating KL divergence").

With D = log policy - log other on samples of the policy:

- `k1`: value D. Its gradient is (1 + D) grad log p, as in ESPO's released code; the bare D would have a gradient of mean zero, and with an
  ELBO in place of log p the extra grad log p is no longer of mean zero either.
- `k2`: D^2 / 2, whose expected gradient is that of KL(policy || other): ESPO's choice.
- `k3`: exp(-D) - 1 + D, whose expected gradient is that of KL(other || policy).
"""

from __future__ import annotations

from torch import Tensor

from rlhub.objectives import token_mean, valid_mean
from rlhub.types import Credit, LogLikelihood

KINDS = ("k1", "k2", "k3")


def penalty(kind: str, difference: Tensor) -> Tensor:
    """The estimate of each entry of `difference` (any shape).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "k1":
        return difference + (difference - difference.detach()) * difference.detach()
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"kl.kind must be one of {', '.join(KINDS)}, got {kind!r}")


def mean_penalty(kind: str, normalize: str, policy: LogLikelihood, other: LogLikelihood, credit: Credit) -> Tensor:
    """Mean over valid samples; token estimates are averaged over tokens first.

    `normalize: length` divides a sequence estimate by its scored length, as ESPO's released code does and its paper does not.
    """
    estimate = penalty(kind, policy.value - other.value.detach())
    if policy.granularity != "sequence":
        estimate = token_mean(estimate, policy)
    elif normalize == "length":
        estimate = estimate / policy.scored_length
    return valid_mean(estimate, credit)
