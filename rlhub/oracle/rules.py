"""For each sampler the rule that says which positions a step writes; sources are named in `rlhub.oracle.generation`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from rlhub.errors import RecipeError
from rlhub.oracle.state import State, Write, entropy, two_best


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
    (first,) = _best(state, lambda position: entropy(state.log_probs(position)), 1)
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
    "entropy": _dream(lambda state, position: -entropy(state.law(position))),
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
    "topk_margin": _dream(lambda state, position: two_best(state.law(position))),
}


def rule_of(name: str) -> Callable[[State, dict[str, Any]], Write]:
    """The rule of a sampler. Raises RecipeError where there is none."""
    if name not in SAMPLERS:
        raise RecipeError(f"the oracle has no rule for the sampler {name}; add it to SAMPLERS in rlhub/oracle/rules.py")
    return SAMPLERS[name]
