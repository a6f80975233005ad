"""LLaDA 1.5 (VRPO): noise shared by policy and reference, and n levels with one mask each, lower the variance of the preference score.

Source: VRPO (arXiv 2505.19223), section 3.2: sharing, and n x 1 against 1 x n, at equal forwards.
Experiment: a small network learns to put six digits in ascending or descending order (the reference) and is trained further on ascending
    rows only (the policy). The score of pairs (ascending, descending) is estimated again and again with the draws of the variance
    laboratory; variances are those of one pair.
Control: the very draws of shared noise, but each of the policy's paired with the reference's of another repeat. Whatever is not the
    sharing itself stays the same, and the gain must vanish.
Pass: in the 95 % interval over seeds, the logarithms of independent over shared variance (at 1 x 1, 8 x 1 and 1 x 8) and of 1 x 8 over
    8 x 1 (with and without sharing) lie above 0. Control: its interval lies below log 1.25.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, counted, masked_loss, tiny_llada, train
from rlhub.studies.labs import Arm, Verdict, above, not_above, run_arms
from rlhub.studies.variance.estimates import replicate_variance
from rlhub.studies.variance.laboratory import CELLS, Draws, Setting, pools_of
from rlhub.types import Batch
from rlhub.views import elbo

KIND = "statistical"
DIGITS = 6
SHAPES = ("1 x 1", "8 x 1", "1 x 8")
EVERY = 20  # steps between two ticks


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    parallel: int = 2
    width: int = 64
    layers: int = 2
    reference_steps: int = 300
    policy_steps: int = 40
    batch_size: int = 64
    learning_rate: float = 5e-4  # of the policy; 2e-3 for the reference
    beta: float = 0.2
    num_pairs: int = 16
    repeats: int = 32


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    ticks = config.reference_steps // EVERY + config.policy_steps // EVERY + 1
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, ticks) for seed in config.seeds]
    return judge(list(run_arms(arms, config, progress, out).values()))


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Train the pair and return the variance of the score: shape -> kind of noise -> nats^2."""
    reference = tiny_llada(10, seed, width=config.width, layers=config.layers)

    def loss(network: Any, ascending: float, phase: int) -> Any:
        return masked_loss(
            network, elbo, elbo.Config(draws=1), lambda step: digit_rows(config.batch_size, ascending, seed, phase, step), seed
        )

    train(reference, loss(reference, 0.5, 0), config.reference_steps, SFT, counted(tick, EVERY))
    policy = copy.deepcopy(reference)
    train(policy, loss(policy, 1.0, 1), config.policy_steps, replace(SFT, learning_rate=config.learning_rate), counted(tick, EVERY))
    setting = Setting(pairs(config.num_pairs, seed), config.beta, config.repeats, seed)
    result = score_variances(policy.eval(), reference.eval(), setting)
    tick()
    return result


def score_variances(policy: nn.Module, reference: nn.Module, setting: Setting) -> dict[str, Any]:
    """Variance of a pair's score by shape and kind of noise, and the mean absolute score."""
    pools = {name: pool for name, pool in pools_of(setting.form, []).items() if name in ("levels", "masks")}
    ours, shared, independent = (
        {name: setting.draws(network, pool, purpose, lambda rows: None) for name, pool in pools.items()}
        for network, purpose in ((policy, "views"), (reference, "views"), (reference, "reference_views"))
    )
    other_repeat = {name: np.roll(values, 1, axis=1) for name, values in shared.items()}
    kinds = {"shared": Draws(ours, shared, shared), "independent": Draws(ours, independent, independent)}
    kinds["control"] = Draws(ours, other_repeat, other_repeat)
    cells = {cell.name: cell for cell in CELLS if cell.name in SHAPES}
    return {
        "score": float(np.abs(kinds["shared"].scores(cells["1 x 1"], True, setting.beta).mean((1, 2))).mean()),
        "variance": {
            shape: {kind: float(replicate_variance(draws.scores(cells[shape], True, setting.beta)).mean()) for kind, draws in kinds.items()}
            for shape in SHAPES
        },
    }


def judge(results: list[dict[str, Any]]) -> Verdict:
    """The verdict on the variances of all seeds."""
    by_seed = [one["variance"] for one in results]

    def log_ratio(over: tuple[str, str], under: tuple[str, str]) -> list[float]:
        return [math.log(one[over[0]][over[1]] / one[under[0]][under[1]]) for one in by_seed]

    sharing = {shape: log_ratio((shape, "independent"), (shape, "shared")) for shape in SHAPES}
    levels = {kind: log_ratio(("1 x 8", kind), ("8 x 1", kind)) for kind in ("shared", "independent")}
    checks = (
        *(above(f"log of independent over shared, {shape}", values) for shape, values in sharing.items()),
        *(above(f"log of 1 x 8 over 8 x 1, {kind} noise", values) for kind, values in levels.items()),
    )
    unpaired = log_ratio(("8 x 1", "independent"), ("8 x 1", "control"))
    control = not_above("shared draws of another repeat gain nothing, 8 x 1", unpaired, math.log(1.25))
    numbers = {
        "mean absolute score": [one["score"] for one in results],
        **{f"independent / shared, {shape}": np.exp(values).tolist() for shape, values in sharing.items()},
        **{f"1 x 8 / 8 x 1, {kind}": np.exp(values).tolist() for kind, values in levels.items()},
        "independent / control, 8 x 1": np.exp(unpaired).tolist(),
    }
    return Verdict(checks, control, numbers, draw(by_seed))


def digit_rows(count: int, ascending: float, seed: int, phase: int, step: int) -> Batch:
    """Rows of digits and the same digits in order, the ascending one with probability `ascending`."""
    random = Noise(seed).generator("vrpo_sharing/rows", uid=phase << 32 | step)
    prompts = random.integers(0, 10, (count, DIGITS))
    ordered = np.sort(prompts, 1)
    return batch_of(list(prompts), list(np.where(random.random((count, 1)) < ascending, ordered, ordered[:, ::-1])), step)


def pairs(count: int, seed: int) -> Batch:
    """Chosen (ascending) and rejected (descending) in turn."""
    prompts = Noise(seed).generator("vrpo_sharing/pairs").integers(0, 10, (count, DIGITS))
    ordered = np.sort(prompts, 1)
    completions = [row for one in ordered for row in (one, one[::-1])]
    batch = batch_of([prompt for prompt in prompts for _ in range(2)], completions)
    return replace(batch, group=np.repeat(np.arange(count), 2), member=np.tile([0, 1], count), rewards=np.tile([1.0, 0.0], (count, 1)))


@rc_context(STYLE)
def draw(by_seed: list[dict[str, dict[str, float]]]) -> Figure:
    """Variance of the score by shape and kind of noise: geometric mean over seeds, and each seed."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    labels = {"shared": "shared noise", "independent": "independent noise", "control": "control: shared, another repeat"}
    for index, (kind, label) in enumerate(labels.items()):
        values = np.array([[one[shape][kind] for shape in SHAPES] for one in by_seed])
        place = np.arange(len(SHAPES)) + 0.27 * (index - 1)
        axes.bar(place, np.exp(np.log(values).mean(0)), 0.25, color=COLORS[index], alpha=0.85, label=label)
        for row in values:
            axes.plot(place, row, "o", color="black", markersize=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(SHAPES)), SHAPES)
    axes.set_xlabel("noise levels x masks on each")
    axes.set_ylabel("variance of a pair's score")
    axes.legend()
    return figure
