"""StableDRL: log-likelihoods weighted by clipped importance ratios that are divided by their sum (arXiv 2603.06743).

PPO's clip lets a ratio grow without limit where the advantage is negative, and a noisy ELBO makes such ratios common. Here every ratio is
clipped whatever the sign, and their sum instead of the number of samples normalises the step, so no sample's weight exceeds `clip_high`
over that sum. The weights carry no gradient: a clipped sample keeps its share.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import ratio_metrics, weighted_mean
from rlhub.types import Credit, Scores

NEEDS = ("proximal",)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.0  # the ratio is clipped to [clip_low, clip_high]; the released code has no lower end
    clip_high: float = 5.0


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """-sum_i w_i A_i L_i / length_i, w_i = clip(r_i) / sum_j clip(r_j) over valid samples, r_i the length-normalised sequence ratio.

    Raises:
        ValueError: the likelihood is not one of sequences.
    """
    policy = scores.policy
    if policy.granularity != "sequence":
        raise ValueError(f"self_normalized needs a sequence likelihood, got one per {policy.granularity}")
    log_ratio = ((policy.value - scores.proximal.value) / policy.scored_length).detach()
    clipped = log_ratio.exp().clamp(config.clip_low, config.clip_high) * credit.valid
    share = clipped / clipped.sum().clamp(min=1e-12)
    metrics = ratio_metrics(log_ratio, credit.advantages, credit.valid, 1 - config.clip_low, config.clip_high - 1)
    if credit.valid.any():
        metrics["ratio/effective_samples"] = (1 / (share**2).sum().clamp(min=1e-12)).item()
    return -(share * weighted_mean(credit, policy)).sum(), metrics
