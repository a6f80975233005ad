"""Generation: the loop over blocks and steps, and for each sampler the rule that says which positions a step writes.

Sources: low_confidence and random, LLaDA (arXiv 2502.09992, section 2.4 and appendix A.3); origin, maskgit_plus, topk_margin and entropy,
Dream 7B (arXiv 2508.15487) and its released code; threshold and factor, Fast-dLLM (arXiv 2505.22618); maskgit, Chang et al. 2022 (arXiv
2202.04200); emigm and guidance intervals, eMIGM (arXiv 2503.07197); ancestral, RADD (arXiv 2406.03736); first_hitting, Zheng et al. 2024
(arXiv 2409.02908); block, SDAR (arXiv 2510.06303) and LLaDA2.0 (arXiv 2512.15745); edit, LLaDA2.1 (arXiv 2602.08676); left_to_right,
JustGRPO (arXiv 2601.15165); fork, ForkGRPO; top_probability and entropy_guided, "Low-Confidence Remasking Traps Flexibility"; guidance,
SMDM (arXiv 2410.18514, Eq. 7).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhub.config.schema import SamplerConfig
from rlhub.noise import Noise
from rlhub.oracle.network import block_causal_length, row_logits
from rlhub.types import NEVER, Request, Rollout


@torch.no_grad()
def generate(
    network: torch.nn.Module, request: Request, settings: SamplerConfig, noise: Noise, margins: list[float] | None = None
) -> tuple[Rollout, float]:
    """One completion, and the smallest margin by which any of its decisions was taken, in nats.

    Decisions are the argmax of the perturbed logits at each position whose token counts, the edge of top-k and top-p, a probability
    against a threshold, and where the model ranks positions, the last one written against the first one left. Another exact fp32
    implementation may differ from the rollout where a margin is about the rounding error of a log-prob.

    Args:
        margins: receives the margin of each decision.
    """
    rule, options = SAMPLERS[settings.name], settings.options
    margins = [] if margins is None else margins
    prompt = [int(token) for token in request.prompt_ids]
    length, width, mask, eos = settings.length, settings.block_length, network.mask_id, network.eos_id
    shift = len(prompt) % width if block_causal_length(network) else 0  # blocks of a block-causal model begin with the prompt
    steps = _steps_of_block(settings)
    canvas, states = [mask] * length, {}
    unmask_step, fallback, edits, forwards, first = [NEVER] * length, [False] * length, [], 0, len(margins)
    for block, begin in enumerate(range(-shift, length, width)):
        positions = range(max(begin, 0), min(begin + width, length))
        idle = 0  # steps that began with nothing masked
        for step_of_block in range(steps):
            number = block * steps + step_of_block
            state = State(network, request.uid, settings, noise, prompt, canvas, positions, step_of_block, number, idle, margins)
            write = rule(state, options)
            for rank, position in enumerate(write.positions):
                token = state.draw(position)
                if canvas[position] == mask:
                    unmask_step[position] = number
                else:
                    edits.append((number, position, canvas[position], token))
                states[position], fallback[position] = (state, rank), write.fallback
            for position in write.positions:
                canvas[position] = state.draw(position)
            forwards += state.looked
            idle += not state.masked
            if write.done if write.done is not None else all(canvas[position] != mask for position in positions):
                break
        if settings.early_stop == "fill_eos" and eos in canvas:
            canvas = [eos if token == mask else token for token in canvas]
            break

    def record(of: Callable[[State, int, int], float]) -> np.ndarray:
        """What holds of the token that stands at each position."""
        return np.array([of(*states[position], position) if position in states else math.nan for position in range(length)], np.float32)

    rollout = Rollout(
        uid=request.uid,
        group_uid=request.group_uid,
        prompt_ids=request.prompt_ids,
        completion_ids=np.array(canvas, dtype=np.int32),
        length=canvas.index(eos) + 1 if eos in canvas else length,
        unmask_step=np.array(unmask_step, dtype=np.int16),
        logp_model=record(lambda state, rank, position: state.log_probs(position)[state.draw(position)]),
        logp_sample=record(lambda state, rank, position: state.law(position)[state.draw(position)] if settings.temperature > 0 else 0.0),
        policy_version=np.zeros(length, dtype=np.int32),
        num_forwards=forwards,
        sampler=dataclasses.asdict(settings),
        entropy=record(lambda state, rank, position: _entropy(state.log_probs(position))),
        order=np.nan_to_num(record(lambda state, rank, position: rank), nan=NEVER).astype(np.int16),
        edits=tuple(edits),
        fallback=np.array(fallback),
    )
    return rollout, min(margins[first:], default=math.inf)


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
        self.steps = _steps_of_block(self.settings)

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
            logits[:, self.network.eos_id] = -math.inf
        return logits

    def uniform(self, position: int) -> float:
        return float(self.noise.uniform("position", len(self.canvas), uid=self.uid, step=self.number)[position])

    def log_probs(self, position: int) -> np.ndarray:
        """float64 [V], the model's at temperature 1; what may not be drawn has its share."""
        return _log_softmax(self.model_logits[position])

    def best(self, position: int) -> float:
        """The model's log-prob of the most likely token that may be drawn."""
        return float(self.log_probs(position)[np.argmax(self.logits[position])])

    def law(self, position: int) -> np.ndarray:
        """float64 [V], log-probs that the token is drawn with: after temperature, top-k and top-p, or at temperature 0 without these."""
        if position not in self.laws:
            self.laws[position] = _log_softmax(self.logits[position]) if self.settings.temperature == 0 else self.truncated(position)
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
            probability = np.exp(_log_softmax(scaled[ranked]))
            before = np.cumsum(probability) - probability  # the share of the tokens that are more likely
            kept = int((before < settings.top_p).sum())
            self.decide(settings.top_p - before[kept - 1])
            if kept < len(ranked):
                self.decide(before[kept] - settings.top_p)
            ranked = ranked[:kept]
        allowed = np.full(len(scaled), -math.inf)
        allowed[ranked] = scaled[ranked]
        return _log_softmax(allowed)

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
        return self.settings.eos == "last" and self.draw(position) == self.network.eos_id

    def decide(self, margin: float) -> None:
        if math.isfinite(margin):  # else there was nothing to choose
            self.margins.append(abs(float(margin)))


# -------------------------------------------------------------------------------------------------------- parts of the rules


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def _entropy(log_probs: np.ndarray) -> float:
    possible = log_probs[np.isfinite(log_probs)]
    return float(-(np.exp(possible) * possible).sum())


def _two_best(log_probs: np.ndarray) -> float:
    """Probability of the best token minus that of the second."""
    best = np.sort(np.exp(log_probs))[::-1]
    return float(best[0] - best[1])


def _steps_of_block(settings: SamplerConfig) -> int:
    if settings.name in ("first_hitting", "fork"):
        return settings.block_length
    steps = settings.steps // (settings.length // settings.block_length)
    return steps + settings.options.get("max_post_steps", 16) if settings.name == "edit" else steps


def _even(state: State) -> int:
    """Tokens of a step in LLaDA's schedule: the block over its steps, the remainder to the first ones."""
    width = state.settings.block_length
    steps = width if state.settings.name in ("first_hitting", "fork") else state.settings.steps // (state.settings.length // width)
    return width // steps + (state.step < width % steps) if state.step < steps else 0


def _best(state: State, score: Callable[[int], float], count: int, ranked_by_model: bool = True) -> list[int]:
    """The `count` masked positions with the highest score; deferred ones last and from left to right, ties to the left.

    They come in this order where the model ranks them, else from left to right.
    """
    keys = {position: (1, 0.0) if state.deferred(position) else (0, -score(position)) for position in state.masked}
    ranked = sorted(state.masked, key=lambda position: (keys[position], position))
    if ranked_by_model and 0 < count < len(ranked) and keys[ranked[count]][0] == 0:
        lead = keys[ranked[count]][1] - keys[ranked[count - 1]][1]
        if lead or not all(state.certain(position) for position in ranked[count - 1 : count + 1]):
            state.decide(lead)
    return ranked[:count] if ranked_by_model else sorted(ranked[:count])


def _over(state: State, log_prob: Callable[[int], float], threshold: float, positions: Iterable[int], strictly: bool) -> list[int]:
    """Positions whose probability reaches, or exceeds, a threshold."""
    found = []
    for position in positions:
        if state.deferred(position):
            continue
        margin = log_prob(position) - math.log(threshold)
        state.decide(margin)
        if margin > 0 or (margin == 0 and not strictly):
            found.append(position)
    return found


def _mask_ratio(curve: str, time: float) -> float:
    """Share of masked tokens at a time from 1 to 0 (eMIGM, table 1)."""
    if curve == "linear":
        return time
    if curve == "cosine":
        return math.cos(math.pi / 2 * (1 - time))
    if curve == "exponential":
        return 1 - math.exp(-5 * time)
    if curve == "log_exponential":
        return math.log(1 + (math.exp(5) - 1) * time) / 5
    raise ValueError(f"no such curve {curve!r}")


def _unmask_share(state: State, curve: str = "linear", eps: float = 0.0) -> float:
    """The share of the masked tokens that this step unmasks, 1 - ratio(s) / ratio(t); all of them in the last step."""
    if state.step == state.steps - 1:
        return 1.0
    now, then = (1 - (1 - eps) * step / state.steps for step in (state.step, state.step + 1))
    return 1 - _mask_ratio(curve, then) / _mask_ratio(curve, now)


def _share_of(masked: int, share: float) -> int:
    """Whole tokens; what rounding took from a whole number is given back."""
    return math.floor(masked * share + 1e-9)


def _gumbel(state: State, position: int) -> float:
    return -math.log(-math.log(state.uniform(position)))


# -------------------------------------------------------------------------------------------------------------------- the rules


def _low_confidence(state: State, options: dict[str, Any]) -> Write:
    return Write(_best(state, lambda position: state.log_probs(position)[state.draw(position)], _even(state)))


def _random(state: State, options: dict[str, Any]) -> Write:
    return Write(_best(state, state.uniform, _even(state), ranked_by_model=False))


def _left_to_right(state: State, options: dict[str, Any]) -> Write:
    return Write(_best(state, lambda position: -position, _even(state), ranked_by_model=False))


def _top_probability(state: State, options: dict[str, Any]) -> Write:
    return Write(_best(state, lambda position: state.best(position), _even(state)))


def _entropy_guided(state: State, options: dict[str, Any]) -> Write:
    if state.number > 0:
        return _top_probability(state, options)
    (first,) = _best(state, lambda position: _entropy(state.log_probs(position)), 1)
    return Write(_best(state, lambda position: math.inf if position == first else state.best(position), _even(state)))


def _dream(confidence: Callable[[State, int], float]) -> Callable[[State, dict[str, Any]], Write]:
    """Dream's schedule with a confidence of the law that tokens are drawn from, plus noise where `alg_temp` asks for it."""

    def rule(state: State, options: dict[str, Any]) -> Write:
        noise = options.get("alg_temp", 0.0)
        count = _share_of(len(state.masked), _unmask_share(state, eps=options.get("eps", 1e-3)))

        def score(position: int) -> float:
            return confidence(state, position) + (noise * _gumbel(state, position) if noise > 0 else 0.0)

        return Write(_best(state, score, count))

    return rule


def _bernoulli(state: State, curve: str, eps: float) -> Write:
    """Each masked position on its own. A deferred one is left out while others stay masked."""
    share = _unmask_share(state, curve, eps)
    chosen = [position for position in state.masked if state.uniform(position) < share]
    if not all(state.deferred(position) for position in state.masked) and state.step < state.steps - 1:
        chosen = [position for position in chosen if not state.deferred(position)]
    return Write(chosen)


def _ancestral(state: State, options: dict[str, Any]) -> Write:
    return _bernoulli(state, options.get("curve", "linear"), 0.0)


def _origin(state: State, options: dict[str, Any]) -> Write:
    return _bernoulli(state, "linear", options.get("eps", 1e-3))


def _emigm(state: State, options: dict[str, Any]) -> Write:
    count = max(1, _share_of(len(state.masked), _unmask_share(state, options.get("curve", "exponential"))))
    return Write(_best(state, state.uniform, count, ranked_by_model=False))


def _maskgit(state: State, options: dict[str, Any]) -> Write:
    count = max(1, _share_of(len(state.masked), _unmask_share(state, options.get("curve", "cosine"))))
    noise = options.get("choice_temperature", 0.0) * (1 - (state.step + 1) / state.steps)

    def score(position: int) -> float:
        return state.log_probs(position)[state.draw(position)] + (noise * _gumbel(state, position) if noise > 0 else 0.0)

    return Write(_best(state, score, count))


def _threshold(state: State, options: dict[str, Any]) -> Write:
    def confidence(position: int) -> float:
        return state.log_probs(position)[state.draw(position)]

    passed = len(_over(state, confidence, options.get("threshold", 0.9), state.masked, strictly=False))
    return Write(_best(state, confidence, max(passed, _even(state))), fallback=passed == 0)


def _factor(state: State, options: dict[str, Any]) -> Write:
    def confidence(position: int) -> float:
        return state.log_probs(position)[state.draw(position)]

    ranked = _best(state, confidence, len(state.masked))
    passed = 0
    while passed < len(ranked):
        threshold = 1 - options.get("factor", 1.0) / (passed + 2)
        if threshold > 0 and not _over(state, confidence, threshold, [ranked[passed]], strictly=False):
            break
        if state.deferred(ranked[passed]):
            break
        passed += 1
    return Write(_best(state, confidence, max(passed, _even(state))), fallback=passed == 0)


def _block(state: State, options: dict[str, Any]) -> Write:
    def confidence(position: int) -> float:
        return state.law(position)[state.draw(position)]

    if options.get("mode", "dynamic") == "static":
        return Write(_best(state, confidence, _even(state)))
    passed = len(_over(state, confidence, options.get("threshold", 0.95), state.masked, strictly=True))
    return Write(_best(state, confidence, max(passed, _even(state))), fallback=passed == 0)


def _edit(state: State, options: dict[str, Any]) -> Write:
    """Mask to token as `_block`, and token to token; the block ends with a step that found nothing masked and changed nothing."""
    filled = [position for position in state.positions if position not in state.masked]
    changed = [position for position in filled if state.draw(position) != state.canvas[position] and not state.deferred(position)]
    edited = _over(
        state, lambda position: state.law(position)[state.draw(position)], options.get("editing_threshold", 0.9), changed, strictly=True
    )
    if not state.masked:
        return Write(edited, done=not edited or state.idle + 1 >= options.get("max_post_steps", 16))
    write = _block(state, options)
    left = len(state.masked) - len(write.positions)
    return Write(
        [*write.positions, *edited], done=left == 0 and options.get("max_post_steps", 16) == 0, fallback=write.fallback and not edited
    )


def _fork(state: State, options: dict[str, Any]) -> Write:
    """Positions whose best token is sure enough, whatever is drawn there; where there is none, the leftmost."""
    sure = _over(state, lambda position: state.best(position), options.get("threshold", 0.9), state.masked, strictly=False)
    return Write(sure) if sure else Write(_best(state, lambda position: -position, 1, ranked_by_model=False), fallback=True)


SAMPLERS: dict[str, Callable[[State, dict[str, Any]], Write]] = {
    "ancestral": _ancestral,
    "block": _block,
    "edit": _edit,
    "emigm": _emigm,
    "entropy": _dream(lambda state, position: -_entropy(state.law(position))),
    "entropy_guided": _entropy_guided,
    "factor": _factor,
    "first_hitting": _random,
    "fork": _fork,
    "left_to_right": _left_to_right,
    "low_confidence": _low_confidence,
    "maskgit": _maskgit,
    "maskgit_plus": _dream(lambda state, position: math.exp(state.law(position)[state.draw(position)])),
    "origin": _origin,
    "random": _random,
    "threshold": _threshold,
    "top_probability": _top_probability,
    "topk_margin": _dream(lambda state, position: _two_best(state.law(position))),
}
