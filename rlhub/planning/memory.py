"""Estimated memory of a process that serves or trains a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


if TYPE_CHECKING:
    from torch import nn

MOMENT_BYTES = 8  # two float32 moments of each trained parameter
MASTER_BYTES = 4  # float32 copy of a low-precision parameter that is trained


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process of a role."""

    role: str
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def serving_memory(role: str, network: nn.Module, itemsize: int, tokens: int, scored: int) -> Memory:
    """Of a forward pass over `tokens` tokens of which `scored` get logits, without a cache of keys and values.

    Args:
        itemsize: bytes of a parameter.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Memory(role, parameters * itemsize, 0, 0, _logits(network, scored) + 2 * tokens * max(_widths(network)) * itemsize)


def training_memory(
    role: str, network: nn.Module, itemsize: int, tokens: int, scored: int, zero_stage: int, learners: int, trained: int | None = None
) -> Memory:
    """Of a training step with AdamW on one of `learners` ranks (Rajbhandari et al. 2020, arXiv 1910.02054); activations are a rough upper
    estimate.

    Args:
        trained: number of parameters that take gradients, when they are adapters beside the network; None: all of the network.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    held = parameters + (trained or 0)
    trained = parameters if trained is None else trained
    logits = _logits(network, scored)
    return Memory(
        role,
        weights=held * itemsize // (learners if zero_stage >= 3 else 1),
        gradients=trained * itemsize // (learners if zero_stage >= 2 else 1),
        optimizer=trained * (MOMENT_BYTES + (MASTER_BYTES if itemsize < 4 else 0)) // (learners if zero_stage >= 1 else 1),
        activations=logits + logits // 2 + tokens * sum(_widths(network)) * itemsize,
    )


def _logits(network: nn.Module, scored: int) -> int:
    """Bytes of float32 logits with their log-softmax."""
    return 8 * scored * network.vocab_size


def _widths(network: nn.Module) -> list[int]:
    """Inputs and outputs of the linear layers but the head."""
    from torch import nn

    embeddings = max(module.num_embeddings for module in network.modules() if isinstance(module, nn.Embedding))
    layers = [part for part in network.modules() if isinstance(part, nn.Linear) and part.out_features != embeddings]
    return [layer.in_features + layer.out_features for layer in layers]


def size_text(size: float) -> str:
    """Bytes in a readable unit.

    >>> size_text(15.3 * 2**30), size_text(0)
    ('15.3 GiB', '-')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = next((power for power in range(len(units) - 1) if size < 1024 ** (power + 1)), len(units) - 1)
    return f"{size / 1024**power:.3g} {units[power]}" if size else "-"
