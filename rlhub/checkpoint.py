"""Model folders in the family's Hugging Face layout, and run checkpoints whose manifest is written last."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhub.errors import CheckpointError

MANIFEST = "manifest.json"


def family_of(config: dict[str, Any]) -> Any:
    """The module of `rlhub.models` that serves a config.json, by its `architectures`.

    Raises:
        CheckpointError: no family serves it.
    """
    import rlhub.models

    served = {}
    for info in pkgutil.iter_modules(rlhub.models.__path__):
        module = importlib.import_module(f"rlhub.models.{info.name}")
        for architecture in getattr(module, "ARCHITECTURES", ()):
            served[architecture] = module
    for architecture in config.get("architectures") or []:
        if architecture in served:
            return served[architecture]
    raise CheckpointError(f"no model family serves architectures {config.get('architectures')}; served are {', '.join(sorted(served))}")


def load_network(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network of a model folder, in eval mode.

    Raises:
        CheckpointError: the folder or a file is missing, corrupt, or does not hold the tensors that the config calls for.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no model folder {path}; give a folder with config.json and model.safetensors")
    config = _read_json(path / "config.json", "a model folder has a config.json")
    family = family_of(config)
    with torch.device("meta"):
        network = family.build(family.Config.from_published(config))
    state = load_tensors(path)
    missing = sorted(set(network.state_dict()) - set(state))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}; the download or the export is incomplete")
    try:
        network.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its config.json: {str(error).splitlines()[-1].strip()}") from None
    return network.eval()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, from one file or from shards.

    Raises:
        CheckpointError: a file is missing or corrupt.
    """
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.exists():
        weight_map = _read_json(index, "the weight index is damaged").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"the weight index {index} has no weight_map; download it again")
        files = [path / name for name in sorted(set(weight_map.values()))]
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"no weights {file}; export the checkpoint again or complete the download")
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is corrupt ({error}); delete it and restore the checkpoint from a copy") from None
    return state


def save_network(network: torch.nn.Module, path: Path, tokenizer: Any = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    path.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = network.config.to_published() | {"torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def checkpoint_name(phase: str, step: int) -> str:
    """`step_00010` in the online phase, `sft_step_00800` in SFT, `pairs_step_00010` on preference pairs."""
    return f"step_{step:05d}" if phase == "online" else f"{phase}_step_{step:05d}"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Seal a checkpoint: sizes and hashes of its files, written last and moved into place."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "blake2b": _hash_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    scratch = folder / (MANIFEST + ".partial")
    with scratch.open("w") as handle:
        json.dump(facts | {"files": files}, handle, indent=2)
        handle.flush()
        os.fsync(handle.fileno())
    scratch.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a sealed checkpoint after checking each file.

    Raises:
        CheckpointError: a file is missing or its hash differs.
    """
    manifest = _read_json(folder / MANIFEST, f"an unsealed checkpoint cannot be used; delete {folder} to use an older one")
    if not {"phase", "step", "wall_s", "files"} <= set(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is corrupt; delete {folder} to use an older one")
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.exists() or file.stat().st_size != facts["bytes"] or _hash_file(file) != facts["blake2b"]:
            raise CheckpointError(f"checkpoint {folder} is corrupt: {name} is not as it was saved; delete {folder} to use an older one")
    return manifest


def sealed_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders with a manifest in the order of training; unsealed ones are what a killed run left behind."""
    sealed = [file.parent for file in (run / "checkpoints").glob(f"*step_*/{MANIFEST}")]
    return sorted(sealed, key=lambda folder: (_phase_of(folder) != "sft", int(folder.name.rpartition("_")[2])))


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete unsealed folders and all but the newest `keep` sealed ones; the last of an earlier phase stays."""
    sealed = sealed_checkpoints(run)
    last_of_phase = {_phase_of(folder): folder for folder in sealed}
    kept = set(sealed[-keep:]) | set(last_of_phase.values())
    for folder in (run / "checkpoints").iterdir():
        if folder.is_dir() and folder not in kept:
            shutil.rmtree(folder)


def _phase_of(folder: Path) -> str:
    return folder.name.rpartition("step_")[0].rstrip("_") or "online"


def resolve_model_path(path: Path) -> Path:
    """The model folder that a user means: itself, a checkpoint's `hf` folder, or the newest checkpoint of a run.

    Raises:
        CheckpointError: nothing there can be loaded.
    """
    path = Path(path)
    if (path / "config.json").exists():
        return path
    if (path / "hf" / "config.json").exists():
        read_manifest(path)
        return path / "hf"
    sealed = sealed_checkpoints(path)
    if sealed:
        read_manifest(sealed[-1])
        return sealed[-1] / "hf"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint or a model folder")
    raise CheckpointError(f"{path} holds no checkpoint yet; give a run folder with a finished checkpoint, or a model folder")


def export(run: Path, out: Path) -> Path:
    """Copy the newest model of a run (or a checkpoint's) to `out` in the Hugging Face layout.

    Raises:
        CheckpointError: there is nothing to export, or `out` exists and is not empty.
    """
    source, out = resolve_model_path(run), Path(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another folder, nothing was overwritten")
    shutil.copytree(source, out, dirs_exist_ok=True)
    return out


def _hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_json(path: Path, meaning: str) -> dict[str, Any]:
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
