"""What the headers of safetensors files say, before a tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rlhub.checkpoints.folders import read_json
from rlhub.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it; `dtype` in safetensors' words, `offset` in bytes from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * (FLOATS | WHOLE)[self.dtype].itemsize


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What the headers of a model folder's weight files say, by published name.

    Raises:
        CheckpointError: a file is missing or corrupt, or index and files disagree.
    """
    if not (path / INDEX).exists():
        return read_header(path / WEIGHTS)
    weight_map = read_weight_map(path)
    headers = {name: read_header(path / name) for name in sorted(set(weight_map.values()))}
    found: dict[str, StoredTensor] = {}
    for name, header in headers.items():
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in sorted(listed - set(header)):
            raise CheckpointError(f"{path / name} lacks {tensor}, which {INDEX} places there; download the shard and the index again")
        for tensor in sorted(set(header) - listed):
            raise CheckpointError(
                f"{path / name} holds {tensor}, which {INDEX} does not place there; download the shard and the index again"
            )
        found |= header
    return found


def read_weight_map(path: Path) -> dict[str, str]:
    """Published tensor name -> file name, from a folder's weight index.

    Raises:
        CheckpointError: the index is damaged.
    """
    weight_map = read_json(path / INDEX, "the weight index is damaged").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"the weight index {path / INDEX} has no weight_map; download it again")
    return weight_map


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: it is missing or corrupt.
    """
    if not file.is_file():
        others = sorted(file.parent.glob("*.bin")) if file.parent.is_dir() else []
        hint = (
            f"{others[0].name} is not read, convert it to safetensors" if others else "export the checkpoint again or complete the download"
        )
        raise CheckpointError(f"no weights {file}; {hint}")
    try:
        with safe_open(file, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.offset_keys()}
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        with file.open("rb") as handle:
            offset = 8 + int.from_bytes(handle.read(8), "little")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is corrupt ({error}); delete it and restore the checkpoint from a copy") from None
    stored = {}
    for name, (shape, dtype) in kinds.items():
        if dtype not in FLOATS | WHOLE:
            raise CheckpointError(f"{file}: {name} is {dtype}, which is not read; use the unquantized checkpoint")
        stored[name] = StoredTensor(file, shape, dtype, offset)
        offset += stored[name].num_bytes  # the format allows no gaps, and safe_open has checked it
    return stored
