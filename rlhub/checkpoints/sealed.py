"""Run checkpoints, whose manifest is written last, and the model folders that users mean by a path."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rlhub.checkpoints.folders import is_model_folder, read_json
from rlhub.errors import CheckpointError, RecipeError
from rlhub.files import replace_file
from rlhub.phases import Phase

MANIFEST = "manifest.json"
RECIPE = "config.yaml"  # what makes a folder a run


def checkpoint_name(phase: Phase, step: int) -> str:
    """`step_00010` in the online phase, `sft_step_00800` in SFT, `pairs_step_00010` on preference pairs."""
    return f"step_{step:05d}" if phase == Phase.ONLINE else f"{phase}_step_{step:05d}"


def checkpoint_folder(run: Path, phase: Phase, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / checkpoint_name(phase, step)


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Seal a checkpoint: sizes and hashes of its files, written last and moved into place."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "blake2b": _hash_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    replace_file(folder / MANIFEST, json.dumps(facts | {"files": files}, indent=2))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a sealed checkpoint after checking each file.

    Raises:
        CheckpointError: a file is missing or its hash differs.
    """
    manifest = read_json(folder / MANIFEST, f"an unsealed checkpoint cannot be used; delete {folder} to use an older one")
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
    return sorted(sealed, key=lambda folder: (_phase_of(folder) != Phase.SFT, int(folder.name.rpartition("_")[2])))


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete unsealed folders and all but the newest `keep` sealed ones; the last of an earlier phase stays."""
    sealed = sealed_checkpoints(run)
    last_of_phase = {_phase_of(folder): folder for folder in sealed}
    kept = set(sealed[-keep:]) | set(last_of_phase.values())
    for folder in (run / "checkpoints").iterdir():
        if folder.is_dir() and folder not in kept:
            shutil.rmtree(folder)


def _phase_of(folder: Path) -> Phase:
    return Phase(folder.name.rpartition("step_")[0].rstrip("_") or Phase.ONLINE)


def resolve_model_path(path: Path) -> Path:
    """The model folder that a user means: itself, a checkpoint's `hf` folder, or the newest checkpoint of a run.

    Raises:
        CheckpointError: nothing there can be loaded.
    """
    path = Path(path)
    if is_model_folder(path):
        return path
    if is_model_folder(path / "hf"):
        read_manifest(path)
        return path / "hf"
    sealed = sealed_checkpoints(path)
    if sealed:
        read_manifest(sealed[-1])
        return sealed[-1] / "hf"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint or a model folder")
    raise CheckpointError(f"{path} holds no checkpoint yet; give a run folder with a finished checkpoint, or a model folder")


def run_folder_of(path: Path) -> Path | None:
    """The run that a checkpoint or a model folder lies in, or is; None where there is none."""
    return next((folder for folder in (path, *path.resolve().parents[:3]) if (folder / RECIPE).is_file()), None)


def recipe_of_run(path: Path) -> Path:
    """The recipe of the run that a checkpoint or a model folder lies in.

    Raises:
        RecipeError: it lies in no run folder.
    """
    folder = run_folder_of(path)
    if folder is None:
        raise RecipeError(f"{path} lies in no run folder; say which task with --recipe RECIPE")
    return folder / RECIPE


def _hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
