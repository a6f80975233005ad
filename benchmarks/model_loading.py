"""Time and memory of loading a model, against reading its files.

    python benchmarks/model_loading.py [--json] [--dtype float32] [--warm] [--repeats 3]

Ends with status 1 unless loading takes less than 1.3 times as long as reading and the peak stays below 1.1 times the model's size.

A random LLaDA of 1.0 billion parameters is written in bfloat16 to a temporary folder, in 6 shards (2 GB, removed afterwards). Then
reading the files into memory and loading the network take turns, each in a process of its own that times the work alone, not its
start. Before each turn the files are dropped from the page cache, so both read from the disk; `--warm` leaves them there.
`--dtype float32` converts while loading. The peak is the rise of the largest resident size over that before loading. Times are medians
over the repeats; all of them are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {"d_model": 2048, "n_layers": 15, "n_heads": 16, "mlp_hidden_size": 5632, "vocab_size": 50304, "max_sequence_length": 4096}
SHARDS = 6
TIME_LIMIT, MEMORY_LIMIT = 1.3, 1.1
BUFFER_BYTES = 16 << 20


def write(folder: Path) -> dict[str, float]:
    """The checkpoint, with weights of one random block repeated: what they are does not matter here."""
    import torch

    from rlhub.checkpoints.weights import save_network
    from rlhub.models.llada import Config, LLaDA

    torch.set_default_dtype(torch.bfloat16)
    network = LLaDA(Config(**SHAPE))
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(1 << 20).normal_(0, 0.02, generator=generator)
    with torch.no_grad():
        for parameter in network.parameters():
            flat = parameter.view(-1)
            for first in range(0, len(flat), len(noise)):
                flat[first : first + len(noise)] = noise[: len(flat) - first]
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    save_network(network, folder, max_shard_bytes=size // SHARDS + (20 << 20))
    return {"parameters": sum(parameter.numel() for parameter in network.parameters())}


def read(folder: Path) -> dict[str, float]:
    """Every byte of the weight files, in memory as loading leaves it."""
    started = time.perf_counter()
    contents = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]
    return {"seconds": time.perf_counter() - started, "bytes": sum(map(len, contents))}


def load(folder: Path, dtype: str) -> dict[str, float]:
    """The network, with every value looked at afterwards."""
    import torch

    from rlhub.checkpoints.folders import family_of
    from rlhub.checkpoints.weights import load_network

    torch.set_num_threads(1)
    family_of({"architectures": ["LLaDAModelLM"]})  # imports the families
    before = _peak_bytes()
    started = time.perf_counter()
    network = load_network(folder, getattr(torch, dtype))
    seconds = time.perf_counter() - started
    rise = _peak_bytes() - before
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if not all(bool(parameter.isfinite().all()) and parameter.std() > 0 for parameter in network.parameters() if parameter.dim() > 1):
        raise SystemExit("the network holds other values than were written")
    return {"seconds": seconds, "peak_bytes": rise, "model_bytes": size}


def measure(dtype: str, warm: bool, repeats: int) -> dict[str, Any]:
    """Turns of reading and loading."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = _in_new_process("write", folder, dtype)["parameters"]
        files = sorted(folder.glob("*.safetensors"))
        reads, loads = [], []
        for _ in range(repeats):
            _drop(files, warm)
            reads.append(_in_new_process("read", folder, dtype))
            _drop(files, warm)
            loads.append(_in_new_process("load", folder, dtype))
        result = {
            "parameters": parameters,
            "shards": len(files),
            "file_bytes": sum(file.stat().st_size for file in files),
            "dtype": dtype,
            "page_cache": "warm" if warm else "cold",
        }
    result["read_seconds"] = [turn["seconds"] for turn in reads]
    result["load_seconds"] = [turn["seconds"] for turn in loads]
    result["time_ratio"] = statistics.median(result["load_seconds"]) / statistics.median(result["read_seconds"])
    result["memory_ratio"] = max(turn["peak_bytes"] / turn["model_bytes"] for turn in loads)
    return result


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turn", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        what, folder = arguments.turn[0], Path(arguments.turn[1])
        turns = {"write": write, "read": read, "load": lambda path: load(path, arguments.dtype)}
        print(json.dumps(turns[what](folder)))
        return 0
    result = measure(arguments.dtype, arguments.warm, arguments.repeats)
    if arguments.json:
        print(json.dumps(result))
    else:
        times = {key: "  ".join(f"{seconds:.2f}" for seconds in result[key]) for key in ("read_seconds", "load_seconds")}
        print(f"{result['parameters'] / 1e9:.2f} B parameters, {result['file_bytes'] / 1e9:.2f} GB in {result['shards']} shards, ", end="")
        print(f"page cache {result['page_cache']}, loaded as {result['dtype']}")
        print(f"reading  {times['read_seconds']} s\nloading  {times['load_seconds']} s")
        print(f"time     {result['time_ratio']:.2f} x reading (limit {TIME_LIMIT})")
        print(f"memory   {result['memory_ratio']:.3f} x the model (limit {MEMORY_LIMIT})")
    return int(result["time_ratio"] >= TIME_LIMIT or result["memory_ratio"] > MEMORY_LIMIT)


def _in_new_process(what: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--turn", what, str(folder), "--dtype", dtype]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def _drop(files: list[Path], warm: bool) -> None:
    """Write the files out and, unless they are to stay warm, give back their page cache."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            if warm:
                while handle.read(BUFFER_BYTES):
                    pass
            else:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
