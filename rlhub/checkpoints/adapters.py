"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The `peft` library puts the adapters into our networks; the family's profile says where they belong. An adapter's folder is a model
folder: its config names the base, so whatever loads a model loads base and adapter.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhub.checkpoints.folders import ADAPTER_CONFIG, is_adapter_folder, read_adapter_config
from rlhub.errors import CheckpointError, RecipeError
from rlhub.extras import require
from rlhub.networks.lora import check_targets

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's tensor names, before ours
ADAPTER = "default"


def load_adapter(network: nn.Module, path: Path) -> None:
    """Put the adapter of a folder beside the weights of its base, in place; from then on only the adapter takes gradients.

    Raises:
        CheckpointError: the adapter is damaged or belongs to another network.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from rlhub.checkpoints.tensors import read_header

    config, stored = read_adapter_config(path), read_header(path / ADAPTER_WEIGHTS)
    _inject(network, config, path / ADAPTER_CONFIG)
    expected = _adapter_state(network)
    misfit = f"{path / ADAPTER_WEIGHTS} does not fit its base"
    for name in sorted(set(expected) - set(stored)):
        raise CheckpointError(f"{misfit}: it lacks {name}; restore {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} from one download")
    for name in sorted(set(stored) - set(expected)):
        raise CheckpointError(f"{misfit}: the base has no place for {name}; give the base that the adapter was trained on")
    for name, tensor in expected.items():
        if tuple(tensor.shape) != stored[name].shape:
            found = f"{name} has shape {list(stored[name].shape)}, the base calls for {list(tensor.shape)}"
            raise CheckpointError(f"{misfit}: {found}; give the base that the adapter was trained on")
    set_peft_model_state_dict(network, load_file(path / ADAPTER_WEIGHTS), adapter_name=ADAPTER)
    network.eval()


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Write a network's adapter as PEFT does; the base is named, not written."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_state(network).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
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

    from rlhub.checkpoints.folders import empty_network, published_config

    if is_adapter_folder(base):
        raise RecipeError(f"model.lora.rank: {base} is an adapter already; use 0 to train it further, or rlhub export to merge it first")
    network = empty_network(published_config(base), str(base))
    expression = network.profile.lora_targets if targets == "auto" else targets
    check_targets(network, expression)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": expression, "base_model_name_or_path": str(base.resolve())}
    _inject(network, config, folder / ADAPTER_CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in _adapter_state(network).items():
        state[name] = torch.zeros(tensor.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(state[name], a=math.sqrt(5), generator=generator)
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    network.peft_config[ADAPTER].save_pretrained(str(folder))


def rebase_adapter(source: Path, base: Path, folder: Path, tokenizer: Any = None) -> None:
    """Copy an adapter's folder, naming another base.

    Raises:
        CheckpointError: the adapter cannot be read.
    """
    config = read_adapter_config(source) | {"base_model_name_or_path": str(base.resolve())}
    if not (source / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"no weights {source / ADAPTER_WEIGHTS}; complete the download")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_WEIGHTS).write_bytes((source / ADAPTER_WEIGHTS).read_bytes())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _inject(network: nn.Module, config: dict[str, Any], where: Path) -> None:
    require("peft")
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model

    adapter: Any = PeftConfig.from_peft_type(**config) if "peft_type" in config else LoraConfig(**config)
    adapter.inference_mode = False  # which would freeze the adapters
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            inject_adapter_in_model(adapter, network, adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where} does not fit its base: {reason}; give the base that the adapter was trained on") from None


def _adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in state.items()}
