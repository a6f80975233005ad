"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The `peft` library puts the adapters into our networks; the family's profile says where they belong. An adapter's folder is a model
folder: its config names the base, so whatever loads a model loads base and adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhub.errors import CheckpointError, RecipeError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's tensor names, before ours
ADAPTER = "default"
REFUSED = ("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")  # more than a change of weights


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter and no weights of its own."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def base_folder(path: Path) -> Path:
    """The model folder that an adapter belongs to.

    Raises:
        CheckpointError: the adapter names none, or it is not there.
    """
    base = read_adapter_config(path).get("base_model_name_or_path")
    if base and Path(base).is_dir():
        return Path(base)
    where = f"{path / CONFIG} has base_model_name_or_path {base!r}"
    raise CheckpointError(f"{where}, which is no folder here; download the base and set model.path to it and model.adapter to {path}")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        CheckpointError: it is missing, damaged, or describes something else than low-rank adapters.
    """
    from rlhub.model_files import read_json

    config = read_json(path / CONFIG, "an adapter's folder has an adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path / CONFIG} has peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key in REFUSED:
        if config.get(key):
            raise CheckpointError(f"{path / CONFIG} has {key}={config[key]!r}, which is not supported; merge it into the base with peft")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path / CONFIG} has bias={config['bias']!r}, which is not supported; merge it into the base with peft")
    return config


def has_adapters(network: nn.Module) -> bool:
    """Whether adapters lie beside the weights of a network."""
    return "peft_config" in vars(network)


def load_adapter(network: nn.Module, path: Path) -> None:
    """Put the adapter of a folder beside the weights of its base, in place; from then on only the adapter takes gradients.

    Raises:
        CheckpointError: the adapter is damaged or belongs to another network.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from rlhub.model_files import read_header

    config, stored = read_adapter_config(path), read_header(path / WEIGHTS)
    _inject(network, config, path / CONFIG)
    expected = _adapter_state(network)
    misfit = f"{path / WEIGHTS} does not fit its base"
    for name in sorted(set(expected) - set(stored)):
        raise CheckpointError(f"{misfit}: it lacks {name}; restore {CONFIG} and {WEIGHTS} from one download")
    for name in sorted(set(stored) - set(expected)):
        raise CheckpointError(f"{misfit}: the base has no place for {name}; give the base that the adapter was trained on")
    for name, tensor in expected.items():
        if tuple(tensor.shape) != stored[name].shape:
            found = f"{name} has shape {list(stored[name].shape)}, the base calls for {list(tensor.shape)}"
            raise CheckpointError(f"{misfit}: {found}; give the base that the adapter was trained on")
    set_peft_model_state_dict(network, load_file(path / WEIGHTS), adapter_name=ADAPTER)
    network.eval()


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Write a network's adapter as PEFT does; the base is named, not written."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_state(network).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    network.peft_config[ADAPTER].save_pretrained(str(folder))


def write_fresh_adapter(
    base: Path, folder: Path, rank: int, alpha: float, targets: str, generator: torch.Generator, tokenizer: Any = None
) -> None:
    """A folder with an adapter that changes nothing yet: A is drawn as PEFT draws it, uniform and Kaiming-scaled, and B is zero.

    The base's weights are not read.

    Args:
        targets: regular expression over names of modules; `auto`: where the family's profile puts adapters.

    Raises:
        RecipeError: the expression matches no linear layer, or the base is an adapter itself.
        CheckpointError: the base cannot be read.
    """
    from safetensors.torch import save_file

    from rlhub.model_files import empty_network, published_config

    if is_adapter_folder(base):
        raise RecipeError(f"model.lora.rank: {base} is an adapter already; use 0 to train it further, or rlhub export to merge it first")
    network = empty_network(published_config(base), str(base))
    expression = network.profile.lora_targets if targets == "auto" else targets
    check_targets(network, expression)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": expression, "base_model_name_or_path": str(base.resolve())}
    _inject(network, config, folder / CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in _adapter_state(network).items():
        state[name] = torch.zeros(tensor.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(state[name], a=math.sqrt(5), generator=generator)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    network.peft_config[ADAPTER].save_pretrained(str(folder))


def rebase_adapter(source: Path, base: Path, folder: Path, tokenizer: Any = None) -> None:
    """Copy an adapter's folder, naming another base.

    Raises:
        CheckpointError: the adapter cannot be read.
    """
    config = read_adapter_config(source) | {"base_model_name_or_path": str(base.resolve())}
    if not (source / WEIGHTS).is_file():
        raise CheckpointError(f"no weights {source / WEIGHTS}; complete the download")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


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


def _inject(network: nn.Module, config: dict[str, Any], where: Path) -> None:
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model

    config = PeftConfig.from_peft_type(**config) if "peft_type" in config else LoraConfig(**config)
    config.inference_mode = False  # which would freeze the adapters
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where} does not fit its base: {reason}; give the base that the adapter was trained on") from None


def _adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in state.items()}
