"""What a folder holds: a model of some family or an adapter of one, and the network that its config.json describes."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlhub.errors import CheckpointError, RecipeError
from rlhub.parts import load_part, title

if TYPE_CHECKING:
    from rlhub.networks.decoder import Decoder

CONFIG = "config.json"


FAMILY = "rlhub_family"  # key of a config.json whose family does not ship: its file or dotted path


def family_of(config: dict[str, Any]) -> Any:
    """The module that serves a config.json: the one that it names, else that of `rlhub.models` with its `architectures`.

    Raises:
        CheckpointError: no family serves it.
    """
    import rlhub.models

    if FAMILY in config:
        try:
            return load_part("models", config[FAMILY])
        except RecipeError as error:
            raise CheckpointError(f"the model's family: {error}") from error
    served = {}
    for info in pkgutil.iter_modules(rlhub.models.__path__):
        module = importlib.import_module(f"rlhub.models.{info.name}")
        for architecture in getattr(module, "ARCHITECTURES", ()):
            served[architecture] = module
        if "architectures" not in config and "recognizes" in vars(module) and module.recognizes(config):
            return module
    for architecture in config.get("architectures") or []:
        if architecture in served:
            return served[architecture]
    raise CheckpointError(f"no model family serves architectures {config.get('architectures')}; served are {', '.join(sorted(served))}")


def published_form(config: Any) -> dict[str, Any]:
    """A family's `Config` as its config.json; one that does not ship is named in it, so that whatever loads the model finds it."""
    module = sys.modules[type(config).__module__]
    own = {} if module.__name__.startswith("rlhub.models.") else {FAMILY: title(module)}
    return config.to_published() | own


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a model: weights of its own or an adapter that names its base."""
    return (path / CONFIG).is_file() or is_adapter_folder(path)


def published_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder; of an adapter's folder that of its base.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if is_adapter_folder(path):
        return published_config(base_folder(path))
    return read_json(path / CONFIG, "a model folder has a config.json")


def empty_network(config: dict[str, Any], where: str = CONFIG) -> Decoder:
    """The network that a config.json describes, on torch's meta device, without memory.

    Raises:
        CheckpointError: no family serves it, or the family cannot compute what it asks for.
    """
    family = family_of(config)
    try:
        with torch.device("meta"), _NoDraws():
            network: Decoder = family.build(family.Config.from_published(config))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where} makes no network ({type(error).__name__}: {reason}); restore it from the download") from None
    for name, number in (("mask_token_id", network.mask_id), ("eos_token_id", network.eos_id)):
        if not 0 <= number < network.shape.num_embeddings:
            raise CheckpointError(f"{where} has {name}={number}, outside its vocabulary of {network.shape.num_embeddings} tokens")
    return network


def read_json(path: Path, meaning: str) -> dict[str, Any]:
    """A JSON object from a file; `meaning` ends the message when it cannot be read.

    Raises:
        CheckpointError: it is missing, no JSON or no object.
    """
    if not path.exists():
        raise CheckpointError(f"no {path}; {meaning}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointError(f"{path} is not valid JSON{where}; {meaning}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; {meaning}")
    return content


class _NoDraws(TorchFunctionMode):
    """Skips normal draws, which say nothing on the meta device but import a second's worth of torch there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


ADAPTER_CONFIG = "adapter_config.json"
REFUSED = ("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")  # more than a change of weights


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter and no weights of its own."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def base_folder(path: Path) -> Path:
    """The model folder that an adapter belongs to.

    Raises:
        CheckpointError: the adapter names none, or it is not there.
    """
    base = read_adapter_config(path).get("base_model_name_or_path")
    if base and Path(base).is_dir():
        return Path(base)
    where = f"{path / ADAPTER_CONFIG} has base_model_name_or_path {base!r}"
    raise CheckpointError(f"{where}, which is no folder here; download the base and set model.path to it and model.adapter to {path}")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        CheckpointError: it is missing, damaged, or describes something else than low-rank adapters.
    """

    config = read_json(path / ADAPTER_CONFIG, "an adapter's folder has an adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path / ADAPTER_CONFIG} has peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key in REFUSED:
        if config.get(key):
            raise CheckpointError(
                f"{path / ADAPTER_CONFIG} has {key}={config[key]!r}, which is not supported; merge it into the base with peft"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path / ADAPTER_CONFIG} has bias={config['bias']!r}, which is not supported; merge it into the base with peft"
        )
    return config


TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|role_end|>", "<end_of_turn>", "<|end|>")  # as the published chat templates write them


def turn_end_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids of the tokens that end a turn of the chat, from the tokenizer files of a model folder; those of this vocabulary."""
    found: dict[str, int] = {}
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = folder / name
        settings = read_json(file, "restore it from the download") if file.exists() else {}
        decoder, added = settings.get("added_tokens_decoder") or {}, settings.get("added_tokens") or []
        found |= {token["content"]: int(number) for number, token in decoder.items() if isinstance(token, dict)}
        found |= {token["content"]: int(token["id"]) for token in added if isinstance(token, dict)}
        if set(TURN_ENDS) & found.keys():
            break
    return tuple(found[name] for name in TURN_ENDS if 0 <= found.get(name, -1) < vocab_size)


def with_turn_ends(network: Decoder, folder: Path) -> Decoder:
    """The network, whose answers also end at the ends of turns that the folder's tokenizer has: config.json seldom names them."""
    known = network.profile.stop_ids
    network.profile = replace(network.profile, stop_ids=tuple(dict.fromkeys([*known, *turn_end_ids(folder, network.shape.vocab_size)])))
    return network


def stop_ids_of(path: Path) -> tuple[int, ...]:
    """Tokens that end an answer of a model folder or an adapter on one: EOS and ends of turns."""
    folder = base_folder(path) if is_adapter_folder(path) else path
    return with_turn_ends(empty_network(published_config(folder)), folder).profile.stop_ids
