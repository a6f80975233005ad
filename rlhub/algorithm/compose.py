"""An algorithm as the composition of its parts: credit, views, likelihood, objective and KL."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from rlhub.algorithm.kl import mean_penalty
from rlhub.algorithm.off_policy import correction_metrics, correction_weights, weighted_credit
from rlhub.config.schema import AlgorithmConfig
from rlhub.errors import RecipeError
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.parts import load_part, part_config, returned, title, type_name
from rlhub.types import Batch, Credit, LogLikelihood, Scores, Views


@dataclass(frozen=True)
class LogProbs:
    """Token log-probs `[M]` of the same views under each policy.

    The reference may be a ready estimate instead, from a cache or through noise of its own.
    """

    policy: Tensor
    proximal: Tensor | None = None
    reference: Tensor | LogLikelihood | None = None


@dataclass(frozen=True)
class CreditedBatch:
    """A batch with what the reward says of its samples, computed once and handed to whoever makes views or losses of it."""

    batch: Batch
    credit: Credit

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class Auxiliary:
    """A term of the loss: `weight` times an objective over the chosen, the rejected or all samples."""

    name: str
    weight: float
    on: str
    objective: tuple[Any, Any]


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
    auxiliary: tuple[Auxiliary, ...] = ()

    @classmethod
    def compose(cls, config: AlgorithmConfig) -> Algorithm:
        """Look the parts up by name.

        Raises:
            RecipeError: a name or an option is unknown.
        """

        def part(folder: str, block: dict[str, Any]) -> tuple[Any, Any]:
            module = load_part(folder, block["name"])
            return module, part_config(module, {key: value for key, value in block.items() if key not in ("name", "weight", "on")})

        return cls(
            config,
            advantage=part("advantages", config.advantage),
            views=part("views", config.views),
            likelihood=part("likelihoods", config.likelihood),
            objective=part("objectives", config.objective),
            auxiliary=tuple(
                Auxiliary(block["name"], float(block["weight"]), block.get("on", "all"), part("objectives", block))
                for block in config.auxiliary
            ),
        )

    @property
    def needs_proximal(self) -> bool:
        """Whether the weights that began the batch must be evaluated under the views of later updates."""
        return self.config.behavior == "recompute" and self.config.updates > 1

    @property
    def corrects(self) -> bool:
        """Whether samples of older weights are weighted. With `behavior: rollout` the ratio itself is against what generated them."""
        return self.config.max_staleness > 0 and self.config.correction == "auto" and self.config.behavior != "rollout"

    @property
    def needs_scorers(self) -> bool:
        """Whether the reference is a network of its own, rather than the policy without its adapter."""
        return self.needs_reference and self.config.reference != "adapter_off"

    @property
    def needs_reference(self) -> bool:
        objectives = [self.objective, *(term.objective for term in self.auxiliary)]
        objective_needs = any("reference" in getattr(module, "NEEDS", ()) for module, _ in objectives)
        return objective_needs or (self.config.kl.coefficient > 0 and self.config.kl.against == "reference")

    def credit(self, batch: Batch) -> Credit:
        module, config = self.advantage
        rewards = batch.rewards if batch.step_rewards is None else batch.step_rewards
        return returned(module.assign(rewards, batch, config), Credit, module, "assign")

    def credited(self, batch: Batch) -> CreditedBatch:
        """A batch with its credit."""
        return CreditedBatch(batch, self.credit(batch))

    def make_views(self, batch: Batch, credit: Credit, noise: Noise, update: int, profile: Profile, purpose: str = "views") -> Views:
        """The views of one inner update; the same for all of them unless `fresh_views: update`."""
        module, config = self.views
        own = update if self.config.fresh_views == "update" else 0
        views = module.make(batch, credit, config, noise.stream(purpose), own, profile)
        return returned(views, Views, module, "make")

    @property
    def num_views(self) -> int:
        """Sets of views of one batch."""
        return self.config.updates if self.config.fresh_views == "update" else 1

    @property
    def reference_noise(self) -> str:
        """The purpose of the reference's noise: the policy's own, unless `shared_noise` is off."""
        return "views" if self.config.shared_noise else "reference_views"

    def scores(self, log_probs: LogProbs, views: Views, batch: Batch, credit: Credit) -> Scores:
        """Log-likelihoods in float64 under each policy.

        At the first update the proximal policy is the policy itself, so its absent log-probs are the detached ones: the ratio is
        exactly 1.
        """
        policy = self.estimate(log_probs.policy, views, credit)
        proximal = behavior = reference = None
        if self.config.behavior == "rollout":
            proximal = behavior = self._recorded(views, batch, credit)
        elif self.config.behavior in ("recompute", "detach"):
            fixed = log_probs.policy.detach() if log_probs.proximal is None else log_probs.proximal
            proximal = behavior = self.estimate(fixed, views, credit)
        if self.corrects:
            behavior = self._recorded(views, batch, credit)
        if isinstance(log_probs.reference, LogLikelihood):
            reference = log_probs.reference
        elif log_probs.reference is not None:
            reference = self.estimate(log_probs.reference, views, credit)
        return Scores(policy, proximal, behavior, reference)

    def loss(self, scores: Scores, credit: Credit) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise over the global batch, and its metrics."""
        module, config = self.objective
        if self.corrects:
            assert scores.behavior is not None, "`scores` recorded it"
            weights = correction_weights((scores.proximal or scores.policy).detach(), scores.behavior, self.config.correction_cap)
            loss, metrics = _loss(module, scores, weighted_credit(credit, weights), config)
            metrics |= correction_metrics(weights[credit.valid], self.config.correction_cap)
        else:
            loss, metrics = _loss(module, scores, credit, config)
        kl = self.config.kl
        if kl.coefficient > 0:
            other = scores.reference if kl.against == "reference" else scores.behavior
            assert other is not None, f"the checks of recipes see to it that there is a {kl.against}"
            penalty = mean_penalty(kl.kind, kl.normalize, scores.policy, other, credit)
            metrics["kl"] = penalty.item()
            loss = loss + kl.coefficient * penalty
        for term in self.auxiliary:
            module, config = term.objective
            value, _ = _loss(module, scores, _restricted(credit, term.on), config)
            metrics[f"auxiliary/{term.name}"] = value.item()
            loss = loss + term.weight * value
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

    def _recorded(self, views: Views, batch: Batch, credit: Credit) -> LogLikelihood:
        """The estimate from the log-probs that the rollouts recorded."""
        assert batch.logp_model is not None, "batches of rollouts hold what the rollouts recorded"
        recorded = torch.stack([_padded(row, views.canvas_length) for row in batch.logp_model])
        return self.estimate(recorded[views.score_sample, views.score_token], views, credit)

    def estimate(self, log_prob: Tensor, views: Views, credit: Credit) -> LogLikelihood:
        """Log-likelihoods in float64 from token log-probs `[M]`."""
        module, config = self.likelihood
        return returned(module.estimate(log_prob.double(), views, credit, config), LogLikelihood, module, "estimate")


def _loss(module: ModuleType, scores: Scores, credit: Credit, config: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss and the metrics of an objective; RecipeError where it returns something else."""
    result = module.loss(scores, credit, config)
    shown = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and isinstance(result[1], dict)
    if not shown or result[0].dim():
        got = f"a tensor of shape {list(result[0].shape)}" if shown else type_name(result)
        raise RecipeError(f"{title(module)}: loss must return (scalar Tensor, dict), got {got}; see rlhub/objectives/__init__.py")
    return cast(tuple[Tensor, dict[str, float]], result)


def _restricted(credit: Credit, on: str) -> Credit:
    """Credit in which only the chosen (label above 0) or the rejected samples (below 0) count, each with advantage 1."""
    counts = credit.valid
    if on != "all":
        if credit.labels is None:
            raise ValueError(f"an auxiliary term on {on} samples needs labels: use an advantage that makes them, such as best_worst")
        counts = counts & (credit.labels > 0 if on == "chosen" else credit.labels < 0)
    return Credit(counts.double(), counts, credit.labels, credit.pairs)


def _padded(row: Any, length: int) -> Tensor:
    padded = torch.zeros(length, dtype=torch.float64)
    padded[: len(row)] = torch.nan_to_num(torch.from_numpy(row).double())
    return padded
