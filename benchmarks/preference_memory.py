"""Peak memory of one preference step against the number of draws n: constant through the learner's two passes, growing in one pass.

    python benchmarks/preference_memory.py [--json]

Ends with status 1 when going from 1 to 32 draws raises the two-pass peak by more than a quarter; what grows is the list of masked rows.
A single draw fills several micro-batches already: with less, the peak would rise until the first one is full.

Each measurement is a process of its own. It builds the learner (a network of 0.8 million parameters, 32 pairs with prompts of 16 and
responses of 64 tokens), notes its peak resident size, takes one DPO step, and reports by how much the peak rose.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

DRAWS = (1, 4, 8, 32)
PAIRS, PROMPT, RESPONSE = 32, 16, 64
MICRO_BATCH_TOKENS = 1024
ONE_PASS = 10**9  # every row in one micro-batch, whose graph is kept
GROWTH_LIMIT = 1.25  # from 1 draw to 32
ONE_PASS_DRAWS = (1, 4)  # 32 would take many gigabytes


def measure(draws: int, micro_batch_tokens: int) -> float:
    """Megabytes by which the peak rises in one step; to be called once in a process."""
    import numpy as np
    import torch

    from rlhub.algorithm.batching import sequence_batch
    from rlhub.algorithm.scoring import token_log_probs
    from rlhub.checkpoints.weights import load_network, save_network
    from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig
    from rlhub.models.llada import Config, LLaDA
    from rlhub.noise import Noise
    from workers.learner import Learner

    torch.set_num_threads(1)
    config = Config(d_model=128, n_layers=4, n_heads=4, mlp_hidden_size=352, vocab_size=258, mask_token_id=256, eos_token_id=257)
    algorithm = AlgorithmConfig(
        advantage={"name": "best_worst"},
        views={"name": "elbo", "draws": draws},
        objective={"name": "dpo", "beta": 0.2},
        length="response",
        reference="frozen",
        behavior="none",
    )
    with tempfile.TemporaryDirectory() as folder:
        save_network(LLaDA(config).initialize(torch.Generator().manual_seed(0)), Path(folder))
        optimizer = OptimizerConfig()
        learner = Learner(folder, LearnerConfig(backend="torch", micro_batch_tokens=micro_batch_tokens, optimizer=optimizer), 0)
        reference = load_network(Path(folder))
    learner.begin(algorithm, optimizer, 1)
    random = Noise(0).generator("benchmark")
    prompts = [random.integers(0, 256, PROMPT) for _ in range(2 * PAIRS)]
    responses = [random.integers(0, 256, RESPONSE) for _ in range(2 * PAIRS)]
    pairs = sequence_batch(prompts, responses, range(2 * PAIRS), rewards=np.tile([1.0, 0.0], (PAIRS, 1)))
    batch = learner.algorithm.credited(pairs)
    before = _peak_megabytes()
    views = learner.make_views(batch)
    learner.step(batch, views, {0: token_log_probs(reference, views[0], min(micro_batch_tokens, 4096))})
    return _peak_megabytes() - before


def main(as_json: bool) -> int:
    """The exit status."""
    rows = []
    for draws in DRAWS:
        row = {"draws": draws, "rows": 2 * PAIRS * draws, "two_pass_mb": _in_new_process(draws, MICRO_BATCH_TOKENS)}
        row["one_pass_mb"] = _in_new_process(draws, ONE_PASS) if draws in ONE_PASS_DRAWS else None
        rows.append(row)
    status = int(rows[-1]["two_pass_mb"] > GROWTH_LIMIT * rows[0]["two_pass_mb"])
    if as_json:
        print(json.dumps(rows))
        return status
    from rich.console import Console
    from rich.table import Table

    table = Table("draws n", "rows", "two passes", "one pass", title="rise of the peak in one step")
    for row in rows:
        table.add_row(
            str(row["draws"]),
            str(row["rows"]),
            f"{row['two_pass_mb']:.0f} MB",
            "-" if row["one_pass_mb"] is None else f"{row['one_pass_mb']:.0f} MB",
        )
    Console().print(table)
    return status


def _in_new_process(draws: int, micro_batch_tokens: int) -> float:
    command = [sys.executable, __file__, "--measure", str(draws), str(micro_batch_tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--measure"]:
        print(measure(int(arguments[1]), int(arguments[2])))
    elif arguments in ([], ["--json"]):
        sys.exit(main(as_json=bool(arguments)))
    else:
        sys.exit(__doc__)
