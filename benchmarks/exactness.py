"""Does the engine generate what the oracle specifies? Counts equal tokens and near ties on a trained model and its task's problems.

    python benchmarks/exactness.py runs/sort_base [--rollouts 2000] [--sampler low_confidence] [--sampler random] [--json]

Ends with status 1 when a rollout differs although all margins of its decisions are 1e-5 nats or more, or when at least one decision in
1e5 has a smaller margin. A decision is the choice of a token at a masked position, or of the positions that a step commits.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

NEAR_TIE = 1e-5


@click.command(help=__doc__)
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--rollouts", default=2000, show_default=True, help="Of each sampler at each temperature.")
@click.option("--sampler", "samplers", multiple=True, default=("low_confidence", "random"), show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=(0.0, 1.0), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def main(run: Path, rollouts: int, samplers: tuple[str, ...], temperatures: tuple[float, ...], as_json: bool) -> None:
    import numpy as np
    import torch
    from rich.progress import track

    from rlhub import oracle
    from rlhub.checkpoints.sealed import resolve_model_path
    from rlhub.checkpoints.tokenizers import encode_prompts, load_tokenizer
    from rlhub.checkpoints.weights import load_network
    from rlhub.config.recipe import load_recipe
    from rlhub.config.tasks import evaluation_task
    from rlhub.engines.torch_engine import Engine
    from rlhub.noise import Noise
    from rlhub.types import Request

    torch.set_num_threads(1)
    model_path = resolve_model_path(run)
    recipe = load_recipe(str(run / "config.yaml"))
    task, network = evaluation_task(recipe), load_network(model_path)
    problems = rollouts if task.size is None else min(rollouts, task.size)
    ids = encode_prompts(load_tokenizer(str(model_path)), [task.example(index).prompt for index in range(problems)])
    requests = [Request(uid=number, group_uid=number, prompt_ids=ids[number % problems]) for number in range(rollouts)]
    noise, failed = Noise(0), False
    for sampler in samplers:
        for temperature in temperatures:
            settings = dataclasses.replace(recipe.sampler, name=sampler, temperature=temperature, options={})
            fast = Engine(network).generate(requests, settings, noise)
            margins: list[float] = []
            near, different, unexplained = 0, 0, 0
            for request, rollout in zip(track(requests, f"{sampler} {temperature:g}", disable=as_json), fast, strict=True):
                plain, margin = oracle.generate(network, request, settings, noise, margins)
                same = np.array_equal(plain.completion_ids, rollout.completion_ids)
                near += margin < NEAR_TIE
                different += not same
                unexplained += not same and margin >= NEAR_TIE
            ties = int((np.array(margins) < NEAR_TIE).sum())
            row = {
                "sampler": sampler,
                "temperature": temperature,
                "rollouts": rollouts,
                "decisions": len(margins),
                "near_ties": ties,
                "near_ties_per_100000": round(1e5 * ties / len(margins), 3),
                "different_rollouts": different,
                "different_without_a_near_tie": unexplained,
            }
            failed |= unexplained > 0 or (ties >= 1e-5 * len(margins) and ties > 1)
            click.echo(json.dumps(row) if as_json else "  ".join(f"{name} {value}" for name, value in row.items()))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
