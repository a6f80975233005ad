"""Generation: the loop over blocks and steps; `rules` says for each sampler which positions a step writes.

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
from collections.abc import Callable

import numpy as np
import torch

from rlhub.config.schema import SamplerConfig
from rlhub.noise import Noise
from rlhub.oracle.network import block_causal_length
from rlhub.oracle.rules import rule_of
from rlhub.oracle.state import State, entropy, steps_of_block
from rlhub.types import NEVER, Request, Rollout


@torch.no_grad()
def generate(
    network: torch.nn.Module, request: Request, settings: SamplerConfig, noise: Noise, margins: list[float] | None = None
) -> tuple[Rollout, float]:
    """One completion, and the smallest margin by which any of its decisions was taken, in nats.

    Decisions are the argmax of the perturbed logits at each position whose token counts, the edge of top-k and top-p, a probability
    against a threshold, and where the model ranks positions, the last one written against the first one left. Another exact fp32
    implementation may differ from the rollout where a margin is about the rounding error of a log-prob. Raises RecipeError without a rule.

    Args:
        margins: receives the margin of each decision.
    """
    rule, options = rule_of(settings.name), settings.options
    margins = [] if margins is None else margins
    prompt = [int(token) for token in request.prompt_ids]
    length, width, mask, stops = settings.length, settings.block_length, network.mask_id, network.profile.stop_ids
    shift = len(prompt) % width if block_causal_length(network) else 0  # blocks of a block-causal model begin with the prompt
    steps = steps_of_block(settings)
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
        if settings.early_stop == "fill_eos" and any(token in stops for token in canvas):
            canvas = [network.eos_id if token == mask else token for token in canvas]
            break

    rollout = Rollout(
        uid=request.uid,
        group_uid=request.group_uid,
        prompt_ids=request.prompt_ids,
        completion_ids=np.array(canvas, dtype=np.int32),
        length=next((place + 1 for place, token in enumerate(canvas) if token in stops), length),
        unmask_step=np.array(unmask_step, dtype=np.int16),
        policy_version=np.zeros(length, dtype=np.int32),
        num_forwards=forwards,
        sampler=dataclasses.asdict(settings),
        edits=tuple(edits),
        fallback=np.array(fallback),
        **_traces(states, length, settings.temperature),
    )
    return rollout, min(margins[first:], default=math.inf)


# -------------------------------------------------------------------------------------------------------- parts of the rules


# -------------------------------------------------------------------------------------------------------------------- the rules


def _traces(states: dict[int, tuple[State, int]], length: int, temperature: float) -> dict[str, np.ndarray]:
    """What holds of the token that stands at each position [L], from the state that wrote it and its rank among those written then."""

    def record(of: Callable[[State, int, int], float]) -> np.ndarray:
        return np.array([of(*states[position], position) if position in states else math.nan for position in range(length)], np.float32)

    return {
        "logp_model": record(lambda state, rank, position: state.log_probs(position)[state.draw(position)]),
        "logp_sample": record(lambda state, rank, position: state.law(position)[state.draw(position)] if temperature > 0 else 0.0),
        "entropy": record(lambda state, rank, position: entropy(state.log_probs(position))),
        "order": np.nan_to_num(record(lambda state, rank, position: rank), nan=NEVER).astype(np.int16),
    }
