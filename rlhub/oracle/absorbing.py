"""Absorbing diffusion in continuous time and RADD's four losses, which are equal (Ou et al. 2024, arXiv 2406.03736, Theorem 2).

A token is masked at time t with probability 1 - exp(-sigma), where sigma is the noise accumulated until t and `rate` its derivative. The
concrete score of a masked position is exp(-sigma) / (1 - exp(-sigma)) times p(token | visible tokens) (Theorem 1). With c the network's
law of the masked tokens, each loss below is what one draw of noise contributes, summed over the masked tokens x:

    t-DSE        t ~ U(0, 1)      rate [sum_v s_v - r log s_x + r (log r - 1)],   s = r c,  r = exp(-sigma) / (1 - exp(-sigma))
    t-DCE        t ~ U(0, 1)      - rate r log c_x
    lambda-DCE   lambda ~ U(0, 1) - log c_x / lambda            each token masked with probability lambda
    any-order    l ~ U{1..L}      - (L / l) log c_x             l tokens masked

t-DSE is t-DCE draw by draw, since c sums to 1; the mean over draws of each is the mean over orders of the chain rule's -log p(x), an upper
bound of -log p(x) of generation in a random order. For training and likelihoods lambda-DCE is the views `time_form` and any-order the views
`elbo`, with the likelihood `elbo`; t-DCE under the log-linear schedule is `time_form` as well, because rate r = 1 / t there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_linear(time: Tensor, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Accumulated noise and its rate at times in (0, 1): a token is masked with probability (1 - epsilon) t (SEDD, arXiv 2310.16834)."""
    visible = 1 - (1 - epsilon) * time
    return -visible.log(), (1 - epsilon) / visible


def score_ratio(sigma: Tensor) -> Tensor:
    """exp(-sigma) / (1 - exp(-sigma)), the time-dependent factor of the concrete score."""
    return 1 / torch.expm1(sigma)


def t_dse(log_probs: Tensor, target: Tensor, sigma: Tensor, rate: Tensor) -> Tensor:
    """Denoising score entropy of masked tokens, nats.

    Args:
        log_probs: [M, V] of the masked tokens, normalised over the tokens without the mask.
        target: int64 [M], what they are.
        sigma, rate: noise of each one's row, [M] or scalars.

    Returns:
        [M]
    """
    ratio = score_ratio(sigma)
    log_score = log_probs.gather(-1, target[:, None]).squeeze(-1) + ratio.log()
    return rate * (ratio * log_probs.exp().sum(-1) - ratio * log_score + ratio * (ratio.log() - 1))


def t_dce(log_prob: Tensor, sigma: Tensor, rate: Tensor) -> Tensor:
    """Denoising cross-entropy of masked tokens, nats, from the log-probs [M] of what they are."""
    return -rate * score_ratio(sigma) * log_prob


def lambda_dce(log_prob: Tensor, level: Tensor) -> Tensor:
    """The same with the probability of being masked as the time."""
    return -log_prob / level


def any_order(log_prob: Tensor, length: int, num_masked: Tensor) -> Tensor:
    """The same for exactly `num_masked` of `length` tokens, which is the any-order autoregressive loss."""
    return -log_prob * length / num_masked
