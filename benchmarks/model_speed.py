"""Forward, rollout and LoRA step of a random LLaDA on one device: seconds, and model FLOPs utilisation where the device's peak is known.

    python benchmarks/model_speed.py                        # a small network on the CPU, to see that it works
    python benchmarks/model_speed.py --shape 8b --device cuda --peak-teraflops 989     # LLaDA-8B's shape in bf16 on an H100 or H200

Counted are the matrix products of the layers and of the head, two FLOPs a multiply-add, and attention's two products over the whole row;
a training step counts three forwards (adapters need the gradient of activations and not that of the frozen weights, so two are done).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 256, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 768, "vocab_size": 1024, "mask_token_id": 1023},
    "8b": {
        **{"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464},
        **{"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081, "rope_theta": 500000.0},
    },
}


def measure(shape: str, device: str, rows: int, length: int, steps: int, rank: int, repeats: int, peak: float | None) -> dict[str, Any]:
    """The figures; the model is written to a temporary folder first, so that loading is measured too."""
    import numpy as np
    import torch

    from rlhub.algorithm.batching import sequence_batch
    from rlhub.checkpoints.adapters import write_fresh_adapter
    from rlhub.checkpoints.weights import load_network, save_network
    from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, SamplerConfig
    from rlhub.engines.torch_engine import Engine
    from rlhub.models.llada import Config, build
    from rlhub.networks.layout import pack_layout, to_device
    from rlhub.noise import Noise
    from rlhub.types import Request
    from workers.learner import Learner

    dtype = "bfloat16" if device == "cuda" else "float32"

    def seconds(work: Callable[[], Any], times: int = repeats) -> float:
        work()
        measured = []
        for _ in range(times):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            measured.append(time.perf_counter() - start)
        return median(measured)

    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        with torch.device(device):
            network = build(Config(**SHAPES[shape])).to(getattr(torch, dtype))
        save_network(network.initialize(torch.Generator(device).manual_seed(0)), base)
        network = None
        start = time.perf_counter()
        network = load_network(base, getattr(torch, dtype), device)
        found: dict[str, Any] = {"shape": shape, "device": device, "dtype": dtype, "load_s": time.perf_counter() - start}
        config, tokens = network.config, rows * length
        layers = sum(parameter.numel() for name, parameter in network.named_parameters() if parameter.dim() == 2 and ".blocks." in name)
        flops = 2 * tokens * (layers + config.d_model * config.vocab_size) + 4 * config.n_layers * rows * length**2 * config.d_model

        def speed(name: str, taken: float, work: float) -> None:
            found[f"{name}_s"], found[f"{name}_teraflops"] = taken, work / taken / 1e12
            if peak is not None:
                found[f"{name}_mfu"] = found[f"{name}_teraflops"] / peak

        ids = Noise(0).generator("benchmark").integers(0, 1000, (rows, length)).astype(np.int32)
        packed, layout = torch.from_numpy(ids.reshape(-1)).to(device), to_device(pack_layout([length] * rows), device)
        with torch.no_grad():
            speed("forward", seconds(lambda: network.head(network.denoise(packed, layout))), flops)
        half = length // 2
        requests = [Request(uid=row, group_uid=row, prompt_ids=ids[row, :half]) for row in range(rows)]
        settings = SamplerConfig(length=half, steps=steps, block_length=min(32, half), temperature=1.0, early_stop="off")
        engine = Engine(network, device)
        found["rollout_s"] = seconds(lambda: engine.generate(requests, settings, Noise(0)), 1)
        found["rollout_tokens_per_s"] = rows * half / found["rollout_s"]
        network = engine = None  # room for the learner

        write_fresh_adapter(base, adapter, rank, float(rank), "auto", torch.Generator().manual_seed(1))
        learner = Learner(str(adapter), LearnerConfig(backend="torch", micro_batch_tokens=tokens), 0, device=device, dtype=dtype)
        algorithm = AlgorithmConfig(views={"name": "elbo", "draws": 1}, behavior="detach", reference="none")
        learner.begin(algorithm, OptimizerConfig(), 2 * repeats + 2)
        samples = sequence_batch(list(ids[:, :half]), list(ids[:, half:]), range(rows), rewards=np.linspace(0, 1, rows)[None])
        batch = learner.algorithm.credited(samples)
        speed("lora_step", seconds(lambda: learner.step(batch)), 3 * flops)
    if device == "cuda":
        found["hardware"] = torch.cuda.get_device_name()
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rows", default=8, show_default=True)
@click.option("--length", default=256, show_default=True, help="Tokens of a row, half of them the canvas.")
@click.option("--steps", default=32, show_default=True, help="Denoising steps of a rollout.")
@click.option("--rank", default=16, show_default=True, help="Of the adapters.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--peak-teraflops", type=float, help="Of the device at the dtype; 989 for an H100 or H200 in bf16.")
def main(shape: str, device: str, rows: int, length: int, steps: int, rank: int, repeats: int, peak_teraflops: float | None) -> None:
    click.echo(json.dumps(measure(shape, device, rows, length, steps, rank, repeats, peak_teraflops), indent=2))


if __name__ == "__main__":
    main()
