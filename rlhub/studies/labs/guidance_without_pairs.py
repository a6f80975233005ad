"""SMDM: a network trained on whole rows with random masks, without any notion of a prompt, gains from classifier-free guidance.

Source: SMDM (arXiv 2410.18514), section 4.2, Eq. 7: logits un + (1 + w) (cond - un), where `un` hides the prompt.
Experiment: rows [c | x] of symbols. With probability q the answer x repeats c, else it is another row, so that sampling the true law at
    temperature 1 is right about q of the time. The network learns whole rows, any token of which may be masked, and never a prompt apart
    from its response; the sampler then conditions on c and guides with strength w. Rows of the test are held out.
Control: the same network guided by the prompt of another problem. If guidance helped by making samples more typical rather than more
    faithful to the prompt, accuracy would rise here too.
Pass: in the 95 % interval over seeds the accuracy at w = 1 lies above that at w = 0. Control: its gain at w = 1 is below 0.02 on every
    seed. What larger w do is reported and decides nothing: on a task as small as this one nothing need be lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rlhub.config.schema import SamplerConfig
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, counted, masked_loss, sample, tiny_llada, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.types import Batch
from rlhub.views import elbo

KIND = "statistical"
CHOSEN = 1.0  # the w of the claim
KINDS = {"right": "its own prompt", "wrong": "control: prompt of another problem"}
SYMBOLS = 6
EVERY = 50  # steps between two ticks


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    length: int = 3  # of prompt and of answer
    correct: float = 0.4  # q
    width: int = 48
    layers: int = 2
    steps: int = 500
    batch_size: int = 64
    guidance: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0, 2.0, 8.0])
    problems: int = 512

    def __post_init__(self) -> None:
        if not {0.0, CHOSEN} <= set(self.guidance):
            raise ValueError(f"guidance must hold 0 and {CHOSEN}, which are compared, got {self.guidance}")


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, config.steps // EVERY + len(config.guidance)) for seed in config.seeds]
    return judge(config.guidance, list(run_arms(arms, config, progress, out).values()))


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Train a network; accuracies at temperature 1, one for each w, with the right and with wrong prompts."""
    network = tiny_llada(SYMBOLS, seed, width=config.width, layers=config.layers)

    def make_batch(step: int) -> Batch:
        rows = whole_rows(config, Noise(seed).generator("guidance/rows", uid=step), config.batch_size, held_out=False)
        return batch_of([row[:0] for row in rows], rows, step)

    train(network, masked_loss(network, elbo, elbo.Config(draws=1), make_batch, seed), config.steps, SFT, counted(tick, EVERY))
    prompts = whole_rows(config, Noise(seed).generator("guidance/test"), config.problems, held_out=True)[:, : config.length]
    given = {"right": prompts, "wrong": np.roll(prompts, 1, axis=0)}
    result: dict[str, Any] = {kind: [] for kind in given}
    for w in config.guidance:
        settings = SamplerConfig(
            name="random", length=config.length, steps=config.length, block_length=config.length, early_stop="off", guidance=w
        )
        for kind, asked in given.items():
            answers = np.stack([rollout.completion_ids for rollout in sample(network, list(asked), settings, seed)])
            counts = (asked != prompts).any(1) | (kind == "right")  # another problem may have the same prompt
            result[kind].append(float((answers == prompts).all(1)[counts].mean()))
        tick()
    return result


def whole_rows(config: Config, random: np.random.Generator, count: int, held_out: bool) -> np.ndarray:
    """int [count, 2 length]; prompts of which the symbols' sum is a multiple of five are held out."""
    candidates = random.integers(0, SYMBOLS, (20 * count + 200, config.length))
    prompts = candidates[(candidates.sum(1) % 5 == 0) == held_out][:count]
    others = random.integers(0, SYMBOLS, prompts.shape)
    return np.concatenate([prompts, np.where(random.random((count, 1)) < config.correct, prompts, others)], 1)


def judge(guidance: list[float], accuracy: list[dict[str, list[float]]]) -> Verdict:
    """The verdict on the accuracies of each seed: kind of prompt -> w."""
    chosen, none = guidance.index(CHOSEN), guidance.index(0.0)
    gain = {kind: [one[kind][chosen] - one[kind][none] for one in accuracy] for kind in KINDS}
    checks = (above(f"gain of w = {CHOSEN:g}", gain["right"]),)
    worst = max(gain["wrong"])
    control = Check("guided by the prompt of another problem", worst < 0.02, f"gain of w = {CHOSEN:g} at most {worst:+.3f}")
    numbers = {
        f"{label}, w = {w:g}": [one[kind][index] for one in accuracy] for kind, label in KINDS.items() for index, w in enumerate(guidance)
    }
    return Verdict(checks, control, numbers, draw(guidance, accuracy))


@rc_context(STYLE)
def draw(guidance: list[float], accuracy: list[dict[str, list[float]]]) -> Figure:
    """Accuracy over w, mean over seeds with their range."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for color, (kind, label) in zip(COLORS, KINDS.items(), strict=False):
        values = np.array([one[kind] for one in accuracy])
        axes.plot(guidance, values.mean(0), "o-", markersize=3, color=color, label=label)
        axes.fill_between(guidance, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("guidance w")
    axes.set_ylabel("exact answers at temperature 1")
    axes.legend()
    return figure
