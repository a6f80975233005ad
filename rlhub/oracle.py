"""The executable specification: generation, likelihoods and one ESPO update in plain fp32, one row at a time, as the papers write them.

Slow on purpose. It shares the records, the keys of the noise and a network's weights with the rest of rlhub, and no code: packing,
batching, samplers, views, objectives and layers are written a second time here, without cleverness, for tests to compare with.

Sources: generation, LLaDA (arXiv 2502.09992, section 2.4 and appendix A.3); network, the same paper and its published tensor names;
likelihood and update, ESPO (arXiv 2512.03759, Eqs. 3, 8, 10 and appendix D).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhub.config import AlgorithmConfig, SamplerConfig
from rlhub.noise import Noise
from rlhub.types import NEVER, Request, Rollout

LogProb = Callable[[np.ndarray], Tensor]  # masked bool [L] -> [L] log-probs of the true tokens; entries outside the mask are not used

# ------------------------------------------------------------------------------------------------------------------- network


def forward(network: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """Logits [L, V] of a LLaDA network for one row of tokens [L], from its weights by their published names."""
    config, weights = network.config, dict(network.named_parameters())
    num_kv_heads = config.n_kv_heads or config.n_heads
    shared = [head * num_kv_heads // config.n_heads for head in range(config.n_heads)]  # the key-value head of each query head

    def weight(name: str) -> Tensor:
        return weights[f"model.transformer.{name}.weight"].float()

    hidden = weight("wte")[torch.as_tensor(np.asarray(tokens), dtype=torch.int64)]
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        normed = _rms_norm(hidden, weight(f"{block}.attn_norm"), config.rms_norm_eps)
        query = _rope(_heads(normed @ weight(f"{block}.q_proj").T, config.n_heads), config.rope_theta)
        key = _rope(_heads(normed @ weight(f"{block}.k_proj").T, num_kv_heads), config.rope_theta)[shared]
        value = _heads(normed @ weight(f"{block}.v_proj").T, num_kv_heads)[shared]
        attention = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        hidden = hidden + torch.cat(list(attention @ value), -1) @ weight(f"{block}.attn_out").T
        normed = _rms_norm(hidden, weight(f"{block}.ff_norm"), config.rms_norm_eps)
        gate = normed @ weight(f"{block}.ff_proj").T
        hidden = hidden + (gate * gate.sigmoid() * (normed @ weight(f"{block}.up_proj").T)) @ weight(f"{block}.ff_out").T
    head_weight = weight("wte") if config.weight_tying else weight("ff_out")
    return (_rms_norm(hidden, weight("ln_f"), config.rms_norm_eps) @ head_weight.T)[:, : config.vocab_size]


def _heads(rows: Tensor, count: int) -> Tensor:
    """[L, count * width] -> [count, L, width]."""
    return torch.stack(rows.chunk(count, -1))


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(heads: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [H, L, width]: dimensions i and i + width / 2 are a complex number, turned by position * theta^(-2i / width)."""
    _, length, width = heads.shape
    frequency = theta ** (-2 * torch.arange(width // 2, dtype=torch.float32) / width)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    turned = torch.complex(heads[..., : width // 2], heads[..., width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


# ---------------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(network: torch.nn.Module, request: Request, settings: SamplerConfig, noise: Noise) -> tuple[Rollout, float]:
    """One completion, and the smallest margin by which any of its decisions was taken, in nats.

    Decisions are the argmax of the perturbed logits at each masked position and, where the model ranks positions, the last committed
    position against the first one left. Another exact fp32 implementation may differ from the rollout where the margin is about the
    rounding error of a log-prob.
    """
    length, block_length, eos = settings.length, settings.block_length, network.eos_id
    prompt = [int(token) for token in request.prompt_ids]
    canvas = [network.mask_id] * length
    unmask_step, logp_sample, logp_model = [NEVER] * length, [math.nan] * length, [math.nan] * length
    steps_per_block = settings.steps // (length // block_length)
    step, margin = 0, math.inf
    for begin in range(0, length, block_length):
        for step_of_block in range(steps_per_block):
            logits = forward(network, prompt + canvas)[len(prompt) :].double()
            logits[:, network.mask_id] = -math.inf
            if settings.eos == "never":
                logits[:, eos] = -math.inf
            log_probs = logits.log_softmax(-1)
            order = noise.uniform("position", length, uid=request.uid, step=step)
            ranked = []
            for position in range(begin, begin + block_length):
                if canvas[position] != network.mask_id:
                    continue
                uniforms = None
                if settings.temperature > 0:
                    uniforms = noise.uniform("token", logits.shape[1], uid=request.uid, step=step, position=position)
                token, gap = draw_token(logits[position], settings.temperature, uniforms)
                margin = min(margin, gap)
                score = {
                    "low_confidence": log_probs[position, token].item(),
                    "random": order[position],
                    "left_to_right": -position,
                }[settings.name]
                deferred = settings.eos == "last" and token == eos  # all EOS come after everything else, by position
                ranked.append((deferred, 0.0 if deferred else -score, position, token))
            ranked.sort()
            count = block_length // steps_per_block + (step_of_block < block_length % steps_per_block)
            if settings.name == "low_confidence" and 0 < count < len(ranked) and not ranked[count][0]:
                margin = min(margin, ranked[count][1] - ranked[count - 1][1])
            for _, _, position, token in ranked[:count]:
                canvas[position], unmask_step[position] = token, step
                logp_model[position] = log_probs[position, token].item()
                tempered = (logits[position] / (settings.temperature or 1.0)).log_softmax(-1)
                logp_sample[position] = tempered[token].item() if settings.temperature > 0 else 0.0
            step += 1
        if settings.early_stop == "fill_eos" and eos in canvas:
            canvas = [eos if token == network.mask_id else token for token in canvas]
            break
    rollout = Rollout(
        uid=request.uid,
        group_uid=request.group_uid,
        prompt_ids=request.prompt_ids,
        completion_ids=np.array(canvas, dtype=np.int32),
        length=canvas.index(eos) + 1 if eos in canvas else length,
        unmask_step=np.array(unmask_step, dtype=np.int16),
        logp_sample=np.array(logp_sample, dtype=np.float32),
        logp_model=np.array(logp_model, dtype=np.float32),
        policy_version=np.zeros(length, dtype=np.int32),
        num_forwards=step,
        sampler=dataclasses.asdict(settings),
    )
    return rollout, margin


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


# ------------------------------------------------------------------------------------------------------------------ likelihood


def elbo_exact(log_prob: LogProb, length: int) -> Tensor:
    """The evidence lower bound in nats, by all masks: sum over S of (|S| - 1)! (L - |S|)! / L! times the log-probs in S."""
    total = torch.zeros((), dtype=torch.float64)
    for size in range(1, length + 1):
        weight = math.factorial(size - 1) * math.factorial(length - size) / math.factorial(length)
        for chosen in itertools.combinations(range(length), size):
            masked = np.isin(np.arange(length), chosen)
            total = total + weight * log_prob(masked)[list(chosen)].double().sum()
    return total


def coupled_masks(length: int, draws: int, noise: Noise, uid: int, update: int) -> list[np.ndarray]:
    """bool [L] for each draw: l ~ U{0..L}, then l positions without replacement; the second half of the pair is its complement."""
    masks = []
    for draw in range(draws):
        key = {"uid": uid, "update": update, "draw": draw}
        count = int(noise.uniform("views", 1, **key, position=1)[0] * (length + 1))
        order = sorted(range(length), key=noise.uniform("views", length, **key).tolist().__getitem__)
        masks.append(np.isin(np.arange(length), order[:count]))
    return masks


def elbo_coupled(log_prob: LogProb, masks: Sequence[np.ndarray]) -> Tensor:
    """Mean over draws of half the sum of the pair, each half weighted (L + 1) / l over its own l masked positions; 0 where l = 0."""
    total = torch.zeros((), dtype=torch.float64)
    for mask in masks:
        for half in (mask, ~mask):
            if half.any():
                total = total + 0.5 * (len(mask) + 1) / half.sum() * log_prob(half)[torch.from_numpy(half)].double().sum()
    return total / len(masks)


# ---------------------------------------------------------------------------------------------------------------------- update


def espo_loss(
    policy: Sequence[Tensor],
    proximal: Sequence[float],
    reference: Sequence[float] | None,
    lengths: Sequence[int],
    advantages: Sequence[float],
    algorithm: AlgorithmConfig,
) -> Tensor:
    """The loss of a batch from the ELBOs of its valid samples: -mean of min(rho A, clip(rho) A) + coefficient * mean of D^2 / 2.

    rho = exp((L_policy - L_proximal) / length), D = L_policy - L_reference.
    """
    clip_low, clip_high = (algorithm.objective.get(key, 0.2) for key in ("clip_low", "clip_high"))
    total = torch.zeros((), dtype=torch.float64)
    for sample, elbo in enumerate(policy):
        advantage = advantages[sample]
        ratio = ((elbo - proximal[sample]) / lengths[sample]).exp()
        if advantage > 0 and ratio > 1 + clip_high:
            total = total - (1 + clip_high) * advantage
        elif advantage < 0 and ratio < 1 - clip_low:
            total = total - (1 - clip_low) * advantage
        else:
            total = total - ratio * advantage
        if algorithm.kl.coefficient > 0:
            square = 0.5 * (elbo - reference[sample]) ** 2
            total = total + algorithm.kl.coefficient * (square / lengths[sample] if algorithm.kl.normalize == "length" else square)
    return total / len(policy)


def group_mean(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Each reward minus the mean of its group; 0 in a group of one."""
    members = [[other for other, name in zip(rewards, groups, strict=True) if name == group] for group in groups]
    return [reward - sum(others) / len(others) if len(others) > 1 else 0.0 for reward, others in zip(rewards, members, strict=True)]


@dataclass(frozen=True)
class Step:
    """One update: the loss, the gradient before clipping and the weights after the optimizer, by parameter name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def espo_step(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    algorithm: AlgorithmConfig,
    noise: Noise,
    update: int = 0,
    proximal: torch.nn.Module | None = None,
    reference: torch.nn.Module | None = None,
    max_grad_norm: float = 1.0,
) -> Step:
    """One ESPO update of `network` in place: all likelihoods in one graph, one backward pass, one optimizer step.

    Args:
        optimizer: over `network.parameters()`, for example `torch.optim.AdamW` with the learning rate of this step.
        rollouts: graded; samples with an invalid grade are left out.
        update: number of the inner update, the key of its masks.
        proximal: the weights that began the batch; None where they are the network's own, as at the first update.

    Raises:
        ValueError: the algorithm is another one.
    """
    parts = (algorithm.advantage, algorithm.views, algorithm.likelihood, algorithm.objective)
    names = [*(part["name"] for part in parts), algorithm.kl.kind, algorithm.kl.against, algorithm.views.get("levels", "independent")]
    if names != ["group_mean", "coupled", "elbo", "sequence_clip", "k2", "reference", "independent"]:
        raise ValueError(f"the oracle computes ESPO with its paper's parts, got {', '.join(names)}")
    valid = sorted((rollout for rollout in rollouts if rollout.reward.valid), key=lambda rollout: rollout.uid)
    advantages = group_mean([rollout.reward.value for rollout in valid], [rollout.group_uid for rollout in valid])
    lengths = [len(rollout.completion_ids) if algorithm.length == "canvas" else rollout.length for rollout in valid]
    draws = algorithm.views.get("draws", 2)
    masks = [coupled_masks(length, draws, noise, rollout.uid, update) for rollout, length in zip(valid, lengths, strict=True)]

    def elbos(judge: torch.nn.Module) -> list[Tensor]:
        return [elbo_coupled(completion_log_prob(judge, rollout, len(mask[0])), mask) for rollout, mask in zip(valid, masks, strict=True)]

    policy = elbos(network)
    with torch.no_grad():
        before = [elbo.item() for elbo in (policy if proximal is None else elbos(proximal))]
        frozen = [elbo.item() for elbo in elbos(reference)] if algorithm.kl.coefficient > 0 else None
    optimizer.zero_grad()
    loss = espo_loss(policy, before, frozen, lengths, advantages, algorithm)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm).item()
    optimizer.step()
    return Step(loss.item(), grad_norm, gradients, {name: parameter.detach().clone() for name, parameter in network.named_parameters()})


def completion_log_prob(network: torch.nn.Module, rollout: Rollout, length: int) -> LogProb:
    """The log-probs of the first `length` completion tokens, given the prompt and the completion tokens that are not masked."""
    completion = rollout.completion_ids[:length].astype(np.int64)

    def log_prob(masked: np.ndarray) -> Tensor:
        row = np.concatenate([rollout.prompt_ids, np.where(masked, network.mask_id, completion)])
        log_probs = forward(network, row)[len(rollout.prompt_ids) :].log_softmax(-1)
        return log_probs[torch.arange(length), torch.from_numpy(completion)]

    return log_prob
