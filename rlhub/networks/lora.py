"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) beside the weights of a network: what is trained, switching them off, merging."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rlhub.errors import RecipeError


def has_adapters(network: nn.Module) -> bool:
    """Whether adapters lie beside the weights of a network."""
    return "peft_config" in vars(network)


def check_targets(network: nn.Module, expression: str) -> list[str]:
    """The modules that an expression puts adapters on.

    Raises:
        RecipeError: it is no regular expression, or matches no linear layer.
    """
    try:
        matched = [name for name, part in network.named_modules() if isinstance(part, nn.Linear) and re.fullmatch(expression, name)]
    except re.error as error:
        raise RecipeError(f"model.lora.targets: {expression!r} is no regular expression ({error}); write auto, or correct it") from None
    if not matched:
        example = next(name for name, part in network.named_modules() if isinstance(part, nn.Linear))
        raise RecipeError(f"model.lora.targets: {expression!r} matches no linear layer; names look like {example!r}")
    return matched


def adapter_size(network: nn.Module, rank: int, targets: str = "auto") -> int:
    """Parameters of an adapter of this rank; see `write_fresh_adapter`."""
    expression = network.profile.lora_targets if targets == "auto" else targets
    layers = [network.get_submodule(name) for name in check_targets(network, expression)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def merge_adapters(network: nn.Module) -> nn.Module:
    """Add every adapter's product to the weight beside it and take the adapters out, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, part) for name, part in network.named_modules() if isinstance(part, LoraLayer)]:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config
    return network.requires_grad_(True)


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Compute as the base alone within the block."""
    from peft.tuners.lora import LoraLayer

    layers = [part for part in network.modules() if isinstance(part, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def training_state(network: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: with adapters these and the buffers, else everything."""
    state = network.state_dict()
    if not has_adapters(network):
        return state
    kept = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    kept |= {name for name, _ in network.named_buffers()}
    return {name: tensor for name, tensor in state.items() if name in kept}


def training_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters in `training_state`."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad or not has_adapters(network)]
