"""What the experiments of `rlhub.studies.labs` share: tiny networks and a supervised loop over views, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhub.algorithm.batching import micro_batches, sequence_batch
from rlhub.algorithm.schedule import learning_rate_factor
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.config.schema import OptimizerConfig, SamplerConfig
from rlhub.models import llada
from rlhub.networks.layout import pack_layout
from rlhub.noise import Noise, sample_uid
from rlhub.types import Batch, Layout, Request, Rollout

Tick = Callable[[], None]  # one unit of an arm's work is done

SFT = OptimizerConfig(learning_rate=2e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=50, schedule="cosine", final_fraction=0.05)


def tiny_llada(vocabulary: int, seed: int, *, width: int = 64, layers: int = 2, heads: int = 4, rope_theta: float = 10000.0) -> llada.LLaDA:
    """A random LLaDA of which the mask is token `vocabulary` and EOS the next one; an MLP of 8/3 of the width, as in LLaMA."""
    config = llada.Config(
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        mlp_hidden_size=(8 * width // 3 + 15) // 16 * 16,
        vocab_size=vocabulary + 2,
        mask_token_id=vocabulary,
        eos_token_id=vocabulary + 1,
        pad_token_id=vocabulary + 1,
        max_sequence_length=1024,
        rope_theta=rope_theta,
    )
    return llada.build(config).initialize(torch.Generator().manual_seed(seed))


def batch_of(prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], step: int = 0) -> Batch:
    """One sample per prompt [Lp] and completion [L], all of it scored; `step` keys the noise."""
    return sequence_batch(prompts, completions, [sample_uid(0, step, row, 0) for row in range(len(completions))])


def train(
    network: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    optimizer: OptimizerConfig = SFT,
    on_step: Callable[[int], None] = lambda step: None,
) -> nn.Module:
    """Minimise `loss(step)`, steps counted from 1, with AdamW as the learner does it; `on_step(step)` follows each update."""
    adam = torch.optim.AdamW(network.parameters(), lr=optimizer.learning_rate, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
    for step in range(1, steps + 1):
        for group in adam.param_groups:
            group["lr"] = optimizer.learning_rate * learning_rate_factor(step - 1, steps, optimizer)
        adam.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optimizer.max_grad_norm)
        adam.step()
        on_step(step)
    return network


def masked_loss(
    network: nn.Module, part: ModuleType, options: Any, make_batch: Callable[[int], Batch], seed: int
) -> Callable[[int], Tensor]:
    """The loss of a views part: minus the weighted log-probs of the batch of a step, per completion token.

    Args:
        part: a module of `rlhub.views`, and `options` its Config.
    """
    stream = Noise(seed).stream("views")

    def loss(step: int) -> Tensor:
        batch = make_batch(step)
        views = part.make(batch, None, options, stream, 0, network.profile)
        (whole,) = micro_batches(views, int(views.layout.row_offsets[-1]))
        log_prob = micro_batch_log_probs(network, views, whole)
        return -(log_prob * views.score_weight).sum() / (int(batch.scored_length.sum()) * views.num_draws)

    return loss


def counted(tick: Tick, every: int) -> Callable[[int], None]:
    """Calls `tick` at every `every`-th step."""
    return lambda step: tick() if step % every == 0 else None


def sample(network: nn.Module, prompts: Sequence[np.ndarray], settings: SamplerConfig, seed: int) -> list[Rollout]:
    """One rollout per prompt from the engine."""
    from rlhub.engines.torch_engine import Engine

    requests = [Request(row, row, np.asarray(prompt, dtype=np.int32)) for row, prompt in enumerate(prompts)]
    return Engine(network.eval()).generate(requests, settings, Noise(seed))


def causal_layout(rows: int, length: int) -> Layout:
    """Rows of equal length in which a token sees itself and what is before it: block-causal attention with blocks of one token."""
    layout = pack_layout([length] * rows, "block_causal")
    return replace(layout, block_ids=layout.position_ids)
