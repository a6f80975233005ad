"""`rlhub export`: the newest model of a run as a folder that can be published."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhub.checkpoints.folders import is_adapter_folder
from rlhub.checkpoints.sealed import resolve_model_path
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.errors import CheckpointError


def export(run: Path, out: Path, adapter_only: bool = False) -> Path:
    """Write the newest model of a run (or a checkpoint's) to `out` in the Hugging Face layout, an adapter merged into its base.

    Args:
        adapter_only: write the adapter in PEFT's layout instead.

    Raises:
        CheckpointError: there is nothing to export, no adapter where one is asked for, or `out` exists and is not empty.
    """
    source, out = resolve_model_path(run), Path(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another folder, nothing was overwritten")
    if adapter_only and not is_adapter_folder(source):
        raise CheckpointError(f"{source} was trained without adapters; export it without --adapter-only")
    merged = is_adapter_folder(source) and not adapter_only
    network = load_network(source, dtype=None, progress=True) if merged else None
    ignored = shutil.ignore_patterns("adapter_*", "README.md") if merged else None
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=ignored)
    if network is not None:
        save_network(network, out)
    return out
