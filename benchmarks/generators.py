"""Do two rollout generators make twice as many samples as one? Ray actors with one thread each, as a run uses them.

    python benchmarks/generators.py [--json] [--seconds 60] [--generators 2]

Batches of equal size go to one generator and to all of them in turn, until each side has worked for `--seconds`; what is compared is
samples per second of wall time, the way to the actors and back included. Needs as many idle cores as generators. Every batch must have the
same tokens on both sides. Ends with status 1 when the ratio is below 0.9 for each generator.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import SamplerConfig
from rlhub.models import llada
from rlhub.types import Request
from workers.crew import GeneratorPool
from workers.generator import Generator
from workers.runtimes.ray_runtime import RayRuntime
from workers.runtimes.runtime import Resources

FOLDER_VERSION = -1  # the weights of the model folder
SHARE = 0.9  # of the ideal ratio, at least
PROMPT, CANVAS, BLOCK, STEPS = 64, 64, 32, 16
CONFIG = llada.Config(d_model=256, n_layers=6, n_heads=8, mlp_hidden_size=704, vocab_size=8192)


def batch(number: int, size: int) -> list[Request]:
    tokens = np.random.default_rng(number).integers(2, CONFIG.vocab_size - 8, (size, PROMPT)).astype(np.int32)
    return [Request(number << 16 | row, row, prompt) for row, prompt in enumerate(tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generators", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of work on each side")
    parser.add_argument("--batch", type=int, default=64, help="samples of a batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    settings = SamplerConfig("low_confidence", CANVAS, STEPS, BLOCK, 1.0, early_stop="off")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        save_network(llada.build(CONFIG).initialize(torch.Generator().manual_seed(0)), Path(folder))
        demand = Resources(cpus=1)
        runtime = RayRuntime([demand] * options.generators)
        handles = [
            runtime.spawn(f"generator-{index}", Generator, demand, model_path=folder, run_seed=0, threads=1)
            for index in range(options.generators)
        ]
        pools = {count: GeneratorPool(runtime, handles[:count]) for count in (1, options.generators)}
        for pool in pools.values():
            pool.generate(batch(0, options.batch), settings, FOLDER_VERSION)
        seconds, samples = dict.fromkeys(pools, 0.0), dict.fromkeys(pools, 0)
        number = 0
        with tqdm(total=round(options.seconds * len(pools)), unit="s", disable=None) as bar:
            while min(seconds.values()) < options.seconds:
                number += 1
                tokens = {}
                for count in sorted(pools, reverse=number % 2 == 0):
                    started = time.perf_counter()
                    rollouts = pools[count].generate(batch(number, options.batch), settings, FOLDER_VERSION)
                    spent = time.perf_counter() - started
                    seconds[count] += spent
                    samples[count] += len(rollouts)
                    tokens[count] = np.stack([rollout.completion_ids for rollout in rollouts])
                    bar.update(min(round(spent), bar.total - bar.n))
                if len(np.unique(np.stack(list(tokens.values())), axis=0)) > 1:
                    sys.exit(f"batch {number}: the generators made other tokens than one alone")
        runtime.close()
    rate = {count: samples[count] / seconds[count] for count in pools}
    ratio = rate[options.generators] / rate[1]
    result = {
        "generators": options.generators,
        "samples_per_second": {str(count): round(value, 2) for count, value in rate.items()},
        "seconds": {str(count): round(value, 1) for count, value in seconds.items()},
        "ratio": round(ratio, 3),
        "limit": SHARE * options.generators,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{rate[1]:.2f} samples/s from one generator, {rate[options.generators]:.2f} from {options.generators}: {ratio:.2f} times")
    sys.exit(ratio < SHARE * options.generators)


if __name__ == "__main__":
    main()
