"""RADD: ancestral sampling of L tokens in n steps costs n (1 - (1 - 1 / n)^L) forwards, and the skipped ones change nothing.

Source: RADD (arXiv 2406.03736), section 3.3: a step that unmasks nothing leaves the input of a time-independent network as it was.
Experiment: a random network and the sampler `ancestral` of the rollout engine, which runs the model only for rows that unmask something;
    n from L / 2 to 8 L. The same rollouts are made with `records: [predictions]`, for which every step runs the model.
Control: the sampler `random` at n = L steps, which commits one token in each: nothing can be skipped, and the formula must be rejected.
Pass: at every n the mean number of forwards over all seeds lies within 3 standard errors of the formula; tokens, and the log-probs that
    were recorded with them to 1e-5, are equal with and without skipping; without skipping more forwards were run at every n from L on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rlhub.config.schema import SamplerConfig, TraceField
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import Tick, sample, tiny_llada
from rlhub.studies.labs import Arm, Check, Verdict, run_arms

KIND = "identity"
VOCABULARY = 16


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    length: int = 16  # L
    steps_per_token: list[float] = field(default_factory=lambda: [0.5, 1, 2, 4, 8])  # n / L
    rollouts: int = 300  # of each n and seed
    compared: int = 32  # of them are made again without skipping


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, len(config.steps_per_token) + 1) for seed in config.seeds]
    return judge(list(run_arms(arms, config, progress, out).values()), config.length)


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Forwards of every rollout, by number of steps, and how the rollouts without skipping differ."""
    network = tiny_llada(VOCABULARY, seed, width=32, layers=1, heads=2)
    prompts = [np.array([row % VOCABULARY]) for row in range(config.rollouts)]
    result: dict[str, Any] = {"forwards": {}, "all_steps": {}, "different_tokens": 0, "log_prob_error": 0.0}
    for share in config.steps_per_token:
        steps = round(share * config.length)
        skipping = sample(network, prompts, settings(config, "ancestral", steps), seed)
        complete = sample(network, prompts[: config.compared], settings(config, "ancestral", steps, ["predictions"]), seed)
        result["forwards"][steps] = [rollout.num_forwards for rollout in skipping]
        result["all_steps"][steps] = [rollout.num_forwards for rollout in complete]
        for one, other in zip(skipping, complete, strict=False):
            result["different_tokens"] += int((one.completion_ids != other.completion_ids).sum())
            error = float(np.abs(one.logp_model - other.logp_model).max())
            result["log_prob_error"] = max(result["log_prob_error"], error)
        tick()
    control = sample(network, prompts, settings(config, "random", config.length), seed)
    result["control"] = [rollout.num_forwards for rollout in control]
    tick()
    return result


def settings(config: Config, sampler: str, steps: int, records: list[TraceField] | None = None) -> SamplerConfig:
    return SamplerConfig(
        name=sampler, length=config.length, steps=steps, block_length=config.length, early_stop="off", records=records or []
    )


def expected_forwards(steps: int, length: int) -> float:
    """n (1 - (1 - 1 / n)^L): each token's step is uniform over n, and a step costs a forward unless it is nobody's."""
    return steps * (1 - (1 - 1 / steps) ** length)


def judge(results: list[dict[str, Any]], length: int) -> Verdict:
    """The verdict on the forwards of all seeds."""
    steps = [int(key) for key in results[0]["forwards"]]
    forwards = {n: np.concatenate([one["forwards"][str(n)] for one in results]) for n in steps}
    z = {n: deviation(values, expected_forwards(n, length)) for n, values in forwards.items()}
    worst = max(z.values(), key=abs)
    different = sum(one["different_tokens"] for one in results)
    error = max(one["log_prob_error"] for one in results)
    saved = {n: np.mean([np.mean(one["all_steps"][str(n)]) for one in results]) - forwards[n].mean() for n in steps}
    checks = (
        Check("forwards follow the formula", abs(worst) < 3, f"largest deviation {worst:+.2f} standard errors over {len(steps)} n"),
        Check("equal tokens without skipping", different == 0, f"{different} different tokens"),
        Check("equal log-probs without skipping", error < 1e-5, f"largest difference {error:.1e} nats"),
        Check(
            "skipping saves forwards", min(saved[n] for n in steps if n >= length) > 0, f"saved at n = {steps[-1]}: {saved[steps[-1]]:.1f}"
        ),
    )
    every_step = np.concatenate([one["control"] for one in results])
    gap = every_step.mean() - expected_forwards(length, length)
    control = Check(
        "random at n = L",
        abs(deviation(every_step, expected_forwards(length, length))) > 3,
        f"{every_step.mean():.2f} forwards, {gap:+.2f} from the formula",
    )
    numbers = {f"forwards at n = {n} (formula {expected_forwards(n, length):.2f})": means(results, n) for n in steps}
    return Verdict(checks, control, numbers, draw(forwards, length, float(every_step.mean())))


def means(results: list[dict[str, Any]], steps: int) -> list[float]:
    return [float(np.mean(one["forwards"][str(steps)])) for one in results]


def deviation(values: np.ndarray, expected: float) -> float:
    """How many standard errors the mean lies from what is expected; infinite where all values are equal and wrong."""
    gap, error = values.mean() - expected, values.std(ddof=1) / len(values) ** 0.5
    return float(gap / error) if error > 0 else 0.0 if abs(gap) < 1e-9 else float("inf")


@rc_context(STYLE)
def draw(forwards: dict[int, np.ndarray], length: int, every_step: float) -> Figure:
    """Measured forwards on the formula's curve."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    grid = np.linspace(min(forwards), max(forwards), 200)
    axes.plot(grid, [expected_forwards(n, length) for n in grid], color=COLORS[0], label="n (1 - (1 - 1/n)$^L$)")
    axes.plot(list(forwards), [values.mean() for values in forwards.values()], "o", color=COLORS[0], label="ancestral, measured")
    axes.plot([length], [every_step], "x", color=COLORS[1], label="control: random, n = L")
    axes.axhline(length, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("denoising steps n")
    axes.set_ylabel(f"forwards of a rollout, L = {length}")
    axes.legend()
    return figure
