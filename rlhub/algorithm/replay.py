"""The replay check: do the log-probs that a rollout recorded come out again under the weights that are about to be trained on it?

Each state of a rollout is rebuilt from its trace and scored through the views that training uses. A gap means that the learner and the
generator do not compute the same function: weights that were not carried over, states that are not as they were, another number format.
Rollouts that went through stale keys and values (`sampler.cache`) are approximate by choice and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlhub.algorithm.batching import MicroBatch, sequence_batch
from rlhub.algorithm.scoring import guided_logits, without_prompt
from rlhub.networks.decoder import Decoder
from rlhub.networks.layout import slice_layout, to_device
from rlhub.noise import Noise
from rlhub.types import NEVER, Rollout, Views
from rlhub.views._rows import NoisyRow, build_views

STATES = 8  # of a rollout that are replayed, so that the cost does not grow with the number of denoising steps
TOLERANCE = 1e-3  # nats; fp32 on the same device stays below 1e-5

State = tuple[Rollout, int]  # a rollout and the step whose tokens are scored


def choose_rollouts(rollouts: Sequence[Rollout], count: int, step: int) -> list[Rollout]:
    """`count` of the rollouts that can be replayed, others at each step."""
    exact = [rollout for rollout in rollouts if replayable(rollout)]
    return [exact[(step * count + number) % len(exact)] for number in range(min(count, len(exact)))]


def replayable(rollout: Rollout) -> bool:
    """Whether its trace says what the model saw at each step, and it did see it: something was filled, and no stale cache was read."""
    return rollout.sampler.get("cache", "exact") == "exact" and bool((rollout.unmask_step != NEVER).any())


def choose_states(rollouts: Sequence[Rollout], noise: Noise) -> list[State]:
    """Up to `STATES` steps of each rollout that wrote tokens which stand, drawn by its uid."""
    states = []
    for rollout in rollouts:
        steps = np.unique(write_steps(rollout))
        steps = steps[steps != NEVER]
        drawn = noise.generator("replay", uid=rollout.uid).permutation(len(steps))[:STATES]
        states += [(rollout, int(step)) for step in steps[np.sort(drawn)]]
    return states


def write_steps(rollout: Rollout) -> np.ndarray:
    """int64 [L], the step that wrote the token which stands: the last edit, or the step that filled the position; NEVER where masked."""
    steps = rollout.unmask_step.astype(np.int64)
    for at, position, _, _ in rollout.edits or ():
        steps[position] = at
    return steps


def canvas_before(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """int32 [L], what the model saw at a step: masks where nothing was filled yet, the tokens before later edits elsewhere."""
    canvas = rollout.completion_ids.copy()
    for at, position, old, _ in reversed(rollout.edits or ()):
        if at >= step:
            canvas[position] = old
    return np.where((rollout.unmask_step == NEVER) | (rollout.unmask_step >= step), mask_id, canvas).astype(np.int32)


def replay_views(states: Sequence[State], network: Decoder) -> Views:
    """One row per state, scored at the tokens that its step wrote."""
    canvases = [canvas_before(rollout, step, network.mask_id) for rollout, step in states]
    written = [write_steps(rollout) == step for rollout, step in states]
    batch = sequence_batch([rollout.prompt_ids for rollout, _ in states], canvases, [rollout.uid for rollout, _ in states])
    rows = [
        NoisyRow(sample, 0, masked=canvas == network.mask_id, scored=scored, step=step)
        for sample, (canvas, scored, (_, step)) in enumerate(zip(canvases, written, states, strict=True))
    ]
    views = build_views(batch, rows, 1, network.profile)
    targets = np.concatenate([rollout.completion_ids[scored] for (rollout, _), scored in zip(states, written, strict=True)])
    return replace(views, score_target=torch.from_numpy(targets.astype(np.int64)))


def recorded(states: Sequence[State]) -> Tensor:
    """float64 [M], the recorded log-probs at temperature 1, in the order of `replay_views`' scores."""
    parts = [rollout.logp_model[write_steps(rollout) == step] for rollout, step in states]
    return torch.from_numpy(np.concatenate(parts).astype(np.float64))


def replayed_log_probs(
    network: Decoder, views: Views, run: MicroBatch, states: Sequence[State], device: torch.device | str = "cpu"
) -> Tensor:
    """fp32 [m], the log-probs of one micro-batch under the network as the sampler takes them: every position goes through all layers, and
    rollouts are guided where their sampler was. Those of one recipe have one weight."""
    begin, end = (int(views.layout.row_offsets[row]) for row in (run.first_row, run.last_row))
    layout = to_device(slice_layout(views.layout, run.first_row, run.last_row), device)
    scores = slice(run.first_score, run.last_score)
    places = (views.target_rows[scores] - begin).to(device)
    tokens = views.tokens[begin:end]
    logits = network.head(network.denoise(tokens.to(device), layout), places).float()
    weights = torch.tensor([guidance_at(*state, network.mask_id) for state in states])[views.score_sample[scores]]
    if weights.any():
        blind = network.head(network.denoise(without_prompt(views, run, tokens, network.mask_id).to(device), layout), places).float()
        logits = guided_logits(logits, blind, float(weights.max()), (weights > 0).to(device))
    return logits.log_softmax(-1).gather(1, views.score_target[scores].to(device)[:, None]).squeeze(1)


def guidance_at(rollout: Rollout, step: int, mask_id: int) -> float:
    """The weight of guidance at a step, 0 outside of its interval of the masked share of the canvas."""
    weight = float(rollout.sampler.get("guidance", 0.0))
    if not weight:
        return 0.0
    low, high = rollout.sampler["guidance_interval"]
    return weight if low < float((canvas_before(rollout, step, mask_id) == mask_id).mean()) <= high else 0.0


def gap_metrics(replayed: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference of log-probs [M] in nats, and how many tokens were compared."""
    gap = (replayed.double() - expected).abs()
    return {"replay/max_gap": gap.max().item(), "replay/mean_gap": gap.mean().item(), "replay/num_tokens": len(gap)}


def gap_warning(step: int, gap: float) -> str:
    """What a gap in exact fp32 may come from."""
    return (
        f"step {step}: replay check, a recorded log-prob and the learner's differ by {gap:.2g} nats (exact fp32 stays below 1e-5): the "
        "generator holds other weights than the learner (weights.transport), computes in another format or on another device "
        "(model.dtype, roles.gpus_per_*), or its trace does not say what the model saw (a sampler or engine of your own)"
    )
