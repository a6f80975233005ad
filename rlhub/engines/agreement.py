"""How far an approximate mode of the engine is from the exact one: a stale cache, or weights of lower precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhub.config.schema import SamplerConfig
from rlhub.engines.forward import Forward
from rlhub.engines.torch_engine import ActiveBlocks, Engine, RunningRows
from rlhub.noise import Noise
from rlhub.types import Request


@dataclass(frozen=True)
class Agreement:
    """An approximate run against the exact one with the same noise.

    Attributes:
        tokens: share of canvas positions with the same token.
        rollouts: share of completions that are the same throughout.
        kl: nats a position, from the exact law to the approximate one at temperature 1, at every position that the approximate run scored,
            in the state that it was in; this does not grow as tokens drift apart.
        largest_kl: of a single position.
    """

    tokens: float
    rollouts: float
    kl: float
    largest_kl: float


@torch.no_grad()
def agreement(
    model: torch.nn.Module, requests: Sequence[Request], settings: SamplerConfig, noise: Noise, exact_model: torch.nn.Module | None = None
) -> Agreement:
    """Compare rollouts under approximate settings with exact ones.

    Args:
        settings: with `cache: prefix` or `dual`, or any at all with an `exact_model`.
        exact_model: the same network in fp32, when `model` is an approximation of it; None: `model`.

    Example:
        >>> agreement(model.network, requests, SamplerConfig(cache="dual"), Noise(0)).kl      # doctest: +SKIP
        0.013
    """
    exact_model = exact_model or model
    exact_settings = dataclasses.replace(settings, cache="exact")
    expected = Engine(exact_model).generate(requests, exact_settings, noise)
    compared = _Compared(Engine(model, max_rows=len(requests)), requests, settings, noise, (exact_model, exact_settings))
    produced = compared.run()
    same = np.stack([a.completion_ids == b.completion_ids for a, b in zip(expected, produced, strict=True)])
    divergence = torch.cat(compared.divergence)
    return Agreement(float(same.mean()), float(same.all(1).mean()), float(divergence.mean()), float(divergence.max()))


class _Compared(RunningRows):
    """Rollouts that look up the exact law wherever they use the approximate one."""

    def __init__(self, engine: Engine, requests: Sequence[Request], settings: SamplerConfig, noise: Noise, exact: tuple) -> None:
        super().__init__(engine, requests, settings, noise, version=0)
        self.exactly = Forward(exact[0], self.slots, exact[1])
        self.divergence: list[Tensor] = []

    def logits(self, view: ActiveBlocks, row: Tensor, column: Tensor) -> Callable[[slice], Tensor]:
        """The approximate logits; their divergence from the exact law (nats, KL of exact to used) is noted. Costs no counted forward."""
        approximate = super().logits(view, row, column)
        own, self.forward, forwards = self.forward, self.exactly, self.slots.forwards.clone()
        exact = super().logits(view, row, column)
        self.forward, self.slots.forwards = own, forwards

        def logits_of(part: slice) -> Tensor:
            logits = approximate(part)
            laws = [values.clone() for values in (exact(part), logits)]
            for values in laws:
                values[:, list(self.law.banned)] = torch.finfo(values.dtype).min
            known, used = (values.log_softmax(1) for values in laws)
            self.divergence.append((known.exp() * (known - used)).sum(1).double())
            return logits

        return logits_of
