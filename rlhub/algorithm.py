"""An algorithm as the composition of its parts: credit, views, likelihood, objective and KL (DESIGN: five orthogonal parts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhub.config import AlgorithmConfig
from rlhub.kl import mean_penalty
from rlhub.noise import Noise
from rlhub.parts import load_part, part_config
from rlhub.types import Batch, Credit, LogLikelihood, Scores, Views


@dataclass(frozen=True)
class LogProbs:
    """Token log-probs `[M]` of the same views under each policy."""

    policy: Tensor
    proximal: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class Algorithm:
    """The parts that a recipe's `algorithm` block names, with their checked options.

    Example:
        >>> algorithm = Algorithm.compose(AlgorithmConfig())
        >>> algorithm.needs_reference
        False
    """

    config: AlgorithmConfig
    advantage: tuple[Any, Any]
    views: tuple[Any, Any]
    likelihood: tuple[Any, Any]
    objective: tuple[Any, Any]

    @classmethod
    def compose(cls, config: AlgorithmConfig) -> Algorithm:
        """Look the parts up by name.

        Raises:
            RecipeError: a name or an option is unknown.
        """

        def part(folder: str, block: dict[str, Any]) -> tuple[Any, Any]:
            module = load_part(folder, block["name"])
            return module, part_config(module, {key: value for key, value in block.items() if key != "name"})

        return cls(
            config,
            advantage=part("advantages", config.advantage),
            views=part("views", config.views),
            likelihood=part("likelihoods", config.likelihood),
            objective=part("objectives", config.objective),
        )

    @property
    def needs_proximal(self) -> bool:
        """Whether the weights that began the batch must be evaluated under the views of later updates."""
        return self.config.behavior == "recompute" and self.config.updates > 1

    @property
    def needs_reference(self) -> bool:
        objective_needs = "reference" in getattr(self.objective[0], "NEEDS", ())
        return objective_needs or (self.config.kl.coefficient > 0 and self.config.kl.against == "reference")

    def credit(self, batch: Batch) -> Credit:
        module, config = self.advantage
        rewards = batch.rewards if batch.step_rewards is None else batch.step_rewards
        return module.assign(rewards, batch, config)

    def make_views(self, batch: Batch, credit: Credit, noise: Noise, update: int) -> Views:
        """The views of one inner update; the same for all of them unless `fresh_views: update`."""
        module, config = self.views
        return module.make(batch, credit, config, noise.stream("views"), update if self.config.fresh_views == "update" else 0)

    def scores(self, log_probs: LogProbs, views: Views, batch: Batch, credit: Credit) -> Scores:
        """Log-likelihoods in float64 under each policy.

        At the first update the proximal policy is the policy itself, so its absent log-probs are the detached ones: the ratio is
        exactly 1.
        """
        policy = self._estimate(log_probs.policy, views, credit)
        proximal = behavior = reference = None
        if self.config.behavior == "rollout":
            recorded = torch.stack([_padded(row, views.canvas_length) for row in batch.logp_model])
            behavior = self._estimate(recorded[views.score_sample, views.score_token], views, credit)
            proximal = behavior
        elif self.config.behavior in ("recompute", "detach"):
            fixed = log_probs.policy.detach() if log_probs.proximal is None else log_probs.proximal
            proximal = behavior = self._estimate(fixed, views, credit)
        if log_probs.reference is not None:
            reference = self._estimate(log_probs.reference, views, credit)
        return Scores(policy, proximal, behavior, reference)

    def loss(self, scores: Scores, credit: Credit) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise over the global batch, and its metrics."""
        module, config = self.objective
        loss, metrics = module.loss(scores, credit, config)
        kl = self.config.kl
        if kl.coefficient > 0:
            other = scores.reference if kl.against == "reference" else scores.behavior
            penalty = mean_penalty(kl.kind, kl.normalize, scores.policy, other, credit)
            metrics["kl"] = penalty.item()
            loss = loss + kl.coefficient * penalty
        metrics["loss"] = loss.item()
        return loss, metrics

    def coefficients(self, log_probs: LogProbs, views: Views, batch: Batch, credit: Credit) -> tuple[Tensor, Scores, dict[str, float]]:
        """Derivative `[M]` of the loss with respect to each policy log-prob, with the scores and metrics at that point.

        With it the gradient of any objective is the sum over micro-batches of `(log_prob * coefficient).sum()`, which is exact at
        constant memory (two passes).
        """
        leaf = log_probs.policy.detach().double().requires_grad_()
        scores = self.scores(LogProbs(leaf, log_probs.proximal, log_probs.reference), views, batch, credit)
        loss, metrics = self.loss(scores, credit)
        (coefficient,) = torch.autograd.grad(loss, leaf)
        return coefficient, scores, metrics

    def _estimate(self, log_prob: Tensor, views: Views, credit: Credit) -> LogLikelihood:
        module, config = self.likelihood
        return module.estimate(log_prob.double(), views, credit, config)


def _padded(row: Any, length: int) -> Tensor:
    padded = torch.zeros(length, dtype=torch.float64)
    padded[: len(row)] = torch.nan_to_num(torch.from_numpy(row).double())
    return padded
