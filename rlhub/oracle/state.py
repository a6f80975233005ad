"""One row while it is denoised: what its network says, what is drawn, and by what margin."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhub.config.schema import SamplerConfig
from rlhub.noise import Noise
from rlhub.oracle.network import row_logits


def draw_token(logits: Tensor, temperature: float, uniforms: np.ndarray | None) -> tuple[int, float]:
    """One exact draw from softmax(logits / temperature) and its margin in nats of the logits; the argmax at temperature 0.

    Exponential race: with E_v = -log(1 - u_v) the smallest E_v / p_v wins with probability p_v, which is the largest logit_v /
    temperature - log E_v. Ties go to the lower token id.
    """
    scores = logits.double().numpy()
    if temperature > 0:
        scores = scores - temperature * np.log(-np.log1p(-uniforms))
    token = int(np.argmax(scores))
    return token, float(scores[token] - np.delete(scores, token).max())


@dataclass(frozen=True)
class Write:
    """Canvas positions to write, the first choice first. `done` ends the block; None: it ends when nothing in it is masked."""

    positions: list[int]
    done: bool | None = None
    fallback: bool = False


@dataclass
class State:
    """A step of a block, before it writes. Nothing is computed before a rule asks for it; `looked` counts its forwards."""

    network: torch.nn.Module
    uid: int
    settings: SamplerConfig
    noise: Noise
    prompt: list[int]
    canvas: list[int]
    positions: range  # of the canvas, the active block
    step: int  # within the block
    number: int  # over the canvas
    idle: int  # steps of this block that began with nothing masked
    margins: list[float]
    looked: int = 0  # forwards
    laws: dict[int, np.ndarray] = field(default_factory=dict)
    drawn: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.canvas = list(self.canvas)
        self.masked = [position for position in self.positions if self.canvas[position] == self.network.mask_id]
        self.steps = steps_of_block(self.settings)

    @cached_property
    def model_logits(self) -> np.ndarray:
        """float64 [L, V] of the canvas, after guidance."""
        self.looked = 1
        settings, mask = self.settings, self.network.mask_id
        logits = row_logits(self.network, self.prompt + self.canvas)[len(self.prompt) :].double()
        low, high = settings.guidance_interval
        if settings.guidance and low < self.canvas.count(mask) / len(self.canvas) <= high:
            self.looked = 2
            hidden = row_logits(self.network, [mask] * len(self.prompt) + self.canvas)[len(self.prompt) :].double()
            logits = hidden + (settings.guidance + 1) * (logits - hidden)
        return logits.numpy()

    @cached_property
    def logits(self) -> np.ndarray:
        """float64 [L, V] of the canvas, after guidance, without what may not be drawn."""
        logits = self.model_logits.copy()
        logits[:, self.network.mask_id] = -math.inf
        if self.settings.eos == "never":
            logits[:, list(self.network.profile.stop_ids)] = -math.inf
        return logits

    def uniform(self, position: int) -> float:
        return float(self.noise.uniform("position", len(self.canvas), uid=self.uid, step=self.number)[position])

    def log_probs(self, position: int) -> np.ndarray:
        """float64 [V], the model's at temperature 1; what may not be drawn has its share."""
        return log_softmax(self.model_logits[position])

    def best(self, position: int) -> float:
        """The model's log-prob of the most likely token that may be drawn."""
        return float(self.log_probs(position)[np.argmax(self.logits[position])])

    def law(self, position: int) -> np.ndarray:
        """float64 [V], log-probs that the token is drawn with: after temperature, top-k and top-p, or at temperature 0 without these."""
        if position not in self.laws:
            self.laws[position] = log_softmax(self.logits[position]) if self.settings.temperature == 0 else self.truncated(position)
        return self.laws[position]

    def truncated(self, position: int) -> np.ndarray:
        """float64 [V], the law after temperature, top-k and top-p; a token is kept while those before it reach less than top-p."""
        settings = self.settings
        scaled = self.logits[position] / settings.temperature
        ranked = sorted(range(len(scaled)), key=lambda token: -scaled[token])
        if settings.top_k and settings.top_k < len(ranked):
            self.decide(scaled[ranked[settings.top_k - 1]] - scaled[ranked[settings.top_k]])
            ranked = ranked[: settings.top_k]
        if settings.top_p < 1:
            probability = np.exp(log_softmax(scaled[ranked]))
            before = np.cumsum(probability) - probability  # the share of the tokens that are more likely
            kept = int((before < settings.top_p).sum())
            self.decide(settings.top_p - before[kept - 1])
            if kept < len(ranked):
                self.decide(before[kept] - settings.top_p)
            ranked = ranked[:kept]
        allowed = np.full(len(scaled), -math.inf)
        allowed[ranked] = scaled[ranked]
        return log_softmax(allowed)

    def draw(self, position: int) -> int:
        """The token that the law and the keyed noise give to a position."""
        if position not in self.drawn:
            temperature, uniforms = self.settings.temperature, None
            logits = self.logits[position]
            if temperature > 0:
                uniforms = self.noise.uniform("token", len(logits), uid=self.uid, step=self.number, position=position)
                logits = np.where(np.isfinite(self.law(position)), logits, -math.inf)
            self.drawn[position], margin = draw_token(torch.from_numpy(logits), temperature, uniforms)
            self.decide(margin)
        return self.drawn[position]

    def certain(self, position: int) -> bool:
        """Does the law allow one token only? Then its probability is 1 without rounding, and so are ties between such positions."""
        return int(np.isfinite(self.law(position)).sum()) == 1

    def deferred(self, position: int) -> bool:
        """May this position's token only be written when nothing else is left?"""
        return self.settings.eos == "last" and self.draw(position) in self.network.profile.stop_ids

    def decide(self, margin: float) -> None:
        if math.isfinite(margin):  # else there was nothing to choose
            self.margins.append(abs(float(margin)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def entropy(log_probs: np.ndarray) -> float:
    possible = log_probs[np.isfinite(log_probs)]
    return float(-(np.exp(possible) * possible).sum())


def two_best(log_probs: np.ndarray) -> float:
    """Probability of the best token minus that of the second."""
    best = np.sort(np.exp(log_probs))[::-1]
    return float(best[0] - best[1])


def steps_of_block(settings: SamplerConfig) -> int:
    if settings.name in ("first_hitting", "fork"):
        return settings.block_length
    steps = settings.steps // (settings.length // settings.block_length)
    return steps + settings.options.get("max_post_steps", 16) if settings.name == "edit" else steps
