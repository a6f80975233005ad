"""Which tensor of a network is to blame when what it computes is not finite."""

from __future__ import annotations

import torch
from torch import nn

from rlhub.errors import CheckpointError


def check_finite(found: bool, network: nn.Module, what: str) -> None:
    """Refuse to go on from what a network computed.

    Args:
        found: whether all of it is finite.
        what: what was computed, for the message.

    Raises:
        CheckpointError: it is not; the message names the first tensor of the network that holds NaN or infinity, if one does.
    """
    if not found:
        raise CheckpointError(f"{what} of this model are not finite: {_cause(network)}")


@torch.no_grad()
def _cause(network: nn.Module) -> str:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            return f"{count} of {tensor.numel()} values of its tensor {name} are NaN or infinite; use an undamaged checkpoint"
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return f"all its tensors are, so its activations overflow in {dtype}; use model.dtype=float32 or another checkpoint"
