"""Model folders in the family's Hugging Face layout: config.json, weights in one safetensors file or in shards with an index, tokenizer.

Tensors are read from the files straight into a network that was built without memory: loading takes the memory of the model and about
the time of reading it. What can be wrong is found in the headers before a tensor is read, so a network is returned whole or not at all.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhub.checkpoints.folders import CONFIG, empty_network, family_of, is_adapter_folder, published_config, published_form, with_turn_ends
from rlhub.checkpoints.origin import Origin
from rlhub.checkpoints.tensors import FLOATS, INDEX, WEIGHTS, WHOLE, StoredTensor, stored_tensors
from rlhub.errors import CheckpointError
from rlhub.networks.decoder import Decoder
from rlhub.networks.lora import has_adapters

PIECE_BYTES = 16 << 20  # read at once
READERS = 4  # files read at the same time
MAX_SHARD_BYTES = 5 * 10**9
BAR_BYTES = 1 << 30  # a progress bar is shown from this size on

Place = tuple[str, tuple[Any, ...]]  # a tensor of the network and the index of the part of it that one published tensor fills


def load_network(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merge_adapter: bool = True,
    progress: bool = False,
) -> Decoder:
    """The network of a model folder, in eval mode.

    Args:
        dtype: of the parameters; None keeps what the files hold. Buffers keep the dtype that the family gives them.
        merge_adapter: add an adapter's product to the weights; false leaves it beside them, and only the adapter takes gradients.
        progress: show a bar on a terminal while more than a gibibyte is read.

    Raises:
        CheckpointError: the folder or a file is missing, corrupt, or does not hold the tensors that the config calls for.
    """
    path = Path(path)
    if is_adapter_folder(path):
        from rlhub.checkpoints.adapters import load_adapter
        from rlhub.checkpoints.folders import base_folder
        from rlhub.networks.lora import merge_adapters

        network = load_network(base_folder(path), dtype, device, progress=progress)
        load_adapter(network, path)
        return merge_adapters(network) if merge_adapter else network
    if not path.is_dir():
        raise CheckpointError(f"no model folder {path}; give a folder with config.json and model.safetensors")
    config = published_config(path)
    network = empty_network(config, str(path / CONFIG))
    network.origin = Origin(path, config)
    stored = stored_tensors(path)
    places = check_fit(network, stored, path)
    _materialize(network, stored, places, dtype, device)
    sources = defaultdict(dict)
    tensors = network.state_dict()
    for name, (own, index) in places.items():
        sources[stored[name].file][name] = tensors[own][index]
    with _bar(sum(stored[name].num_bytes for name in places), progress) as advance, ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda file: _read_into(file, sources[file], stored, advance), sorted(sources)))
    _check_tied(network, stored, path)
    return with_turn_ends(network, path).eval()


def published_places(network: nn.Module) -> dict[str, Place]:
    """Where each published tensor goes; names that share a tensor, as tied weights do, are all there."""
    family = family_of(published_form(network.config))
    own = network.state_dict(keep_vars=True)
    places = family.places(network.config) if "places" in vars(family) else {}
    moved = {name for name, _ in places.values()}
    return {name: (name, ()) for name in own if name not in moved} | places


def check_fit(network: nn.Module, stored: dict[str, StoredTensor], path: Path) -> dict[str, Place]:
    """Which published tensors are to be read, and where to.

    Raises:
        CheckpointError: one is missing, surplus, or has another shape or kind of number than the network's.
    """
    places, own = published_places(network), network.state_dict(keep_vars=True)
    repeated = _repeated(network)
    for name in [name for name, (target, _) in places.items() if target in repeated]:
        # Tied weights may be stored under any of their names; one that is stored twice is compared after loading.
        first = repeated[places[name][0]]
        if name in stored and first not in stored and first in places:
            places[name] = places.pop(first)
        else:
            del places[name]
    unused = vars(family_of(published_form(network.config))).get("UNUSED", r"(?!)")
    surplus = [name for name in stored if name not in places and name not in repeated and not re.fullmatch(unused, name)]
    missing = [name for name in places if name not in stored]
    if missing:
        near = difflib.get_close_matches(missing[0], surplus, n=1)
        renamed = f" (is {near[0]} the same under another name?)" if near else ""
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors, the first is {missing[0]}{renamed}; the download or the export is incomplete"
        )
    misfit = f"{path} does not fit its config.json"
    if surplus:
        raise CheckpointError(
            f"{misfit}: {stored[surplus[0]].file.name} holds {len(surplus)} tensors that the network has not, the first is {surplus[0]}; "
            "restore both from one download"
        )
    for name, (target, index) in places.items():
        wanted, found = own[target][index], stored[name]
        if tuple(wanted.shape) != found.shape:
            raise CheckpointError(
                f"{misfit}: {name} in {found.file.name} has shape {list(found.shape)}, the config calls for {list(wanted.shape)}; "
                "restore both from one download"
            )
        if found.dtype not in (FLOATS if wanted.is_floating_point() else WHOLE):
            kind = "floating-point numbers" if wanted.is_floating_point() else "whole numbers"
            raise CheckpointError(f"{path}: {name} in {found.file.name} is {found.dtype}, expected {kind}; use the unquantized checkpoint")
    return places


def save_network(
    network: nn.Module, path: Path, tokenizer: Any = None, *, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a model folder: config.json, safetensors in shards of at most `max_shard_bytes`, and the tokenizer's files.

    What else the folder had that the network was loaded from is kept: see `Origin`. A network with adapters is written as the adapter
    alone, in PEFT's layout. Tied weights are written once. What was in the folder stays until everything is written, and config.json
    goes first and comes last: an interrupted replacement cannot be loaded by mistake.

    Args:
        dtype: of the parameters in the files; None keeps theirs. Buffers are written as they are.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".partial-") as scratch:
        written = Path(scratch)
        if has_adapters(network):
            from rlhub.checkpoints.adapters import save_adapter

            save_adapter(network, written)
        else:
            _write_weights(network, written, dtype, max_shard_bytes)
            if origin := _origin(network):
                origin.copy_files(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        (path / CONFIG).unlink(missing_ok=True)
        for stale in [*path.glob("model.safetensors*"), *path.glob("model-*-of-*.safetensors")]:
            stale.unlink()
        for entry in sorted(written.iterdir(), key=lambda entry: entry.name == CONFIG):
            if (path / entry.name).is_dir():
                shutil.rmtree(path / entry.name)
            os.replace(entry, path / entry.name)


def _origin(network: nn.Module) -> Origin | None:
    return getattr(network, "origin", None)


def _repeated(network: nn.Module) -> dict[str, str]:
    """Names whose tensor has another name before them, with that name."""
    first: dict[int, str] = {}
    pairs = [(name, first.setdefault(id(tensor), name)) for name, tensor in network.state_dict(keep_vars=True).items()]
    return {name: before for name, before in pairs if name != before}


def _materialize(
    network: nn.Module, stored: dict[str, StoredTensor], places: dict[str, Place], dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Give every tensor of a meta network memory; it is not touched yet."""
    repeated, state = _repeated(network), {}
    in_file = {own: FLOATS.get(stored[name].dtype) for name, (own, _) in places.items()}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name in repeated:
            state[name] = state[repeated[name]]
        elif isinstance(tensor, nn.Parameter):
            wanted = dtype or in_file[name]
            state[name] = nn.Parameter(torch.empty(tensor.shape, dtype=wanted, device=device), requires_grad=tensor.requires_grad)
        else:
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    network.load_state_dict(state, assign=True)
    left = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if left:  # such a buffer would hold whatever its memory held before
        raise RuntimeError(f"{type(network).__name__} has a buffer {left[0]} outside its state; compute it in the forward pass instead")


@torch.no_grad()
def _read_into(file: Path, targets: dict[str, Tensor], stored: dict[str, StoredTensor], advance: Callable[[int], None]) -> None:
    """Read tensors of one file into memory in the order of the file, at once where nothing is converted, else a piece at a time.

    Read rather than mapped: a mapped file must stay as it is while the network lives, and matrix kernels round by the memory's alignment.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    with file.open("rb", buffering=0) as handle:
        for name in sorted(targets, key=lambda name: stored[name].offset):
            source, target = stored[name], targets[name]
            dtype = (FLOATS | WHOLE)[source.dtype]
            handle.seek(source.offset)
            if target.dtype == dtype and target.is_contiguous() and target.device.type == "cpu":
                whole = target.reshape(-1).view(torch.uint8)
                for piece in whole.split(PIECE_BYTES):
                    _fill(piece, handle)
                    advance(len(piece))
                continue
            rows = target[None] if target.dim() == 0 else target
            row_bytes = max(1, source.num_bytes // max(1, len(rows)))
            for some in rows.split(max(1, PIECE_BYTES // row_bytes)):
                size = some.numel() * dtype.itemsize
                if len(buffer) < size:
                    buffer = torch.empty(size, dtype=torch.uint8)
                _fill(buffer[:size], handle)
                some.copy_(buffer[:size].view(dtype).view(some.shape))
                advance(size)


def _fill(piece: Tensor, handle: BufferedReader) -> None:
    """Read into uint8 memory.

    Raises:
        CheckpointError: the file ends before.
    """
    memory, done = memoryview(piece.numpy()), 0
    while done < len(memory):
        count = handle.readinto(memory[done:])
        if not count:
            raise CheckpointError(f"{handle.name} ends too early; delete it and restore the checkpoint from a copy")
        done += count


def _check_tied(network: nn.Module, stored: dict[str, StoredTensor], path: Path) -> None:
    """Raises CheckpointError when tied weights are stored under two names and differ."""
    state = network.state_dict()
    for name, first in _repeated(network).items():
        if name in stored and first in stored:
            with safe_open(stored[name].file, "pt") as weights:
                same = torch.equal(weights.get_tensor(name).to(state[name].device, state[name].dtype), state[name])
            if not same:
                raise CheckpointError(f"{path}: {name} differs from {first}, but the config ties them; correct config.json")


def _write_weights(network: nn.Module, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Weight files, their index when there are several, and config.json."""
    own, repeated = network.state_dict(keep_vars=True), _repeated(network)
    parts, stored = {}, {}
    for name, (target, index) in published_places(network).items():
        if target not in repeated:
            parts[name] = own[target][index]
            stored[name] = dtype or parts[name].dtype if isinstance(own[target], nn.Parameter) else parts[name].dtype
    shards: list[list[str]] = []
    sizes = {name: tensor.numel() * stored[name].itemsize for name, tensor in parts.items()}
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: parts[name].detach().to("cpu", stored[name]).contiguous() for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    precision = str(stored[next(iter(parts))]).removeprefix("torch.")
    config = published_form(network.config)
    if origin := _origin(network):
        config = origin.complete(config, getattr(network.config, "FIXED", {}))
    key = "dtype" if "dtype" in config else "torch_dtype"
    (folder / CONFIG).write_text(json.dumps(config | {key: precision}, indent=2) + "\n")


@contextmanager
def _bar(total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes on the terminal; yields what counts them."""
    if not enabled or total < BAR_BYTES or not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=total)
        yield lambda size: bar.advance(task, size)
