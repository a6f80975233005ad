"""The network: LLaDA's forward pass from its weights by their published names, and one-row logits of any family.

Source: LLaDA (arXiv 2502.09992) and its published tensor names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhub.models.llada import LLaDA
from rlhub.types import Layout


def row_logits(network: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """Logits [L, V] that predict each token of one row [L]: LLaDA's by `forward`, other families' by their own network, without a cache."""
    if type(network) is LLaDA:
        return forward(network, tokens)
    length = len(tokens)
    position = torch.arange(length, dtype=torch.int32)
    block_length = block_causal_length(network)
    layout = Layout(
        position_ids=position,
        segment_ids=torch.zeros_like(position),
        block_ids=position // (block_length or length),
        row_offsets=torch.tensor([0, length], dtype=torch.int32),
        attention="block_causal" if block_length else "full",
    )
    hidden = network.denoise(torch.as_tensor(np.asarray(tokens), dtype=torch.int64), layout)
    return network.head(hidden, torch.arange(length)).float()


def block_causal_length(network: torch.nn.Module) -> int:
    """Tokens of a block of a block-causal family; 0 under full attention."""
    profile = getattr(network, "profile", None)
    return (profile.block_length or 0) if profile is not None and profile.attention == "block_causal" else 0


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
