"""eMIGM: for masked images an exponential mask schedule with weight 1 beats the linear ELBO, and guidance is best kept to an interval.

Source: eMIGM (arXiv 2503.07197), sections 3.1 to 3.3: schedules, loss weights, the mask as unconditional class, guidance intervals.
Experiment: scikit-learn's handwritten digits, 64 tokens with 17 grey levels and a class as prompt. One small network for each of three
    curves and two loss weights, trained and sampled along its curve; the Frechet distance to real images is taken on their first 20
    principal components, over the number of forwards. The network of the exponential curve with weight 1 is also sampled with guidance,
    at all times and in an interval of the masked share.
Control: images with every pixel drawn on its own from the real images, which have the right mean and variance of each pixel. Their
    distance must lie above that of the network, so that the measure sees structure. The floor is the distance of as many real images.
Pass: in the 95 % interval over seeds, at 16 steps, the logarithm of (linear, ELBO weight) over (exponential, weight 1) lies above 0, and
    the logarithm of guidance at all times over guidance in the interval lies above 0. Control: further than (exponential, weight 1) on
    every seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.linalg import sqrtm
from torch import nn

from rlhub.config.schema import SamplerConfig
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, DASHES, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, counted, masked_loss, sample, tiny_llada, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.tasks.digits import CLASSES, LEVELS, PIXELS, images
from rlhub.types import Batch
from rlhub.views import mask_ratio

KIND = "statistical"
CURVES = ("linear", "cosine", "exponential")
WEIGHTS = ("elbo", "plain")
COMPARED_STEPS = 16
COMPONENTS = 20
ROPE_THETA = 100.0  # wavelengths that tell 64 pixels apart
EVERY = 25  # steps between two ticks


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    width: int = 64
    layers: int = 2
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-3
    drop_class: float = 0.1  # how often training hides the class
    sampling_steps: list[int] = field(default_factory=lambda: [4, 16])
    guidance: float = 1.0
    interval: list[float] = field(default_factory=lambda: [0.1, 0.6])  # of the masked share
    images: int = 320  # sampled for each distance

    def __post_init__(self) -> None:
        if COMPARED_STEPS not in self.sampling_steps:
            raise ValueError(f"sampling_steps must hold {COMPARED_STEPS}, which is compared, got {self.sampling_steps}")


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    """Train every curve and weight on every seed and judge the images by their distance to real ones."""
    arms = [
        Arm(
            f"{curve}_{weight}_seed{seed}",
            measure,
            {"curve": curve, "weight": weight, "seed": seed},
            config.steps // EVERY + len(config.sampling_steps) + 2 * is_guided(curve, weight),
        )
        for seed in config.seeds
        for curve in CURVES
        for weight in WEIGHTS
    ]
    results = run_arms(arms, config, progress, out)
    by_arm = {(c, w): [results[f"{c}_{w}_seed{seed}"] for seed in config.seeds] for c in CURVES for w in WEIGHTS}
    controls = [distance(real_pixels(config.images, seed, together=False)) for seed in config.seeds]
    return judge(by_arm, controls, [distance(real_pixels(config.images, seed, together=True)) for seed in config.seeds])


def is_guided(curve: str, weight: str) -> bool:
    return (curve, weight) == ("exponential", "plain")


def measure(config: Config, tick: Tick, curve: str, weight: str, seed: int) -> dict[str, Any]:
    """Train one network; Frechet distances by number of steps, and with guidance where it is the network for that."""
    network = tiny_llada(LEVELS + CLASSES, seed, width=config.width, layers=config.layers, rope_theta=ROPE_THETA)
    pixels, labels = images("train")

    def make_batch(step: int) -> Batch:
        chosen = Noise(seed).generator("digits/rows", uid=step).integers(0, len(labels), config.batch_size)
        return batch_of(LEVELS + labels[chosen, None], pixels[chosen], step)

    optimizer = replace(SFT, learning_rate=config.learning_rate)
    options = mask_ratio.Config(curve=curve, weight=weight, drop_prompt=config.drop_class)
    train(network, masked_loss(network, mask_ratio, options, make_batch, seed), config.steps, optimizer, counted(tick, EVERY))
    result: dict[str, Any] = {"distance": {}}
    for steps in config.sampling_steps:
        result["distance"][steps] = distance(generate(network, config, curve, steps, seed))
        tick()
    if is_guided(curve, weight):
        for name, interval in (("full", [0.0, 1.0]), ("interval", config.interval)):
            guided = {"guidance": config.guidance, "guidance_interval": interval}
            result[name] = distance(generate(network, config, curve, COMPARED_STEPS, seed, **guided))
            tick()
    return result


def generate(network: nn.Module, config: Config, curve: str, steps: int, seed: int, **guidance: Any) -> np.ndarray:
    """Images int [N, 64] of the ten classes in turn; tokens that are no grey level count as the darkest one."""
    settings = SamplerConfig(
        name="emigm", options={"curve": curve}, length=PIXELS, steps=steps, block_length=PIXELS, early_stop="off", **guidance
    )
    prompts = [np.array([LEVELS + row % CLASSES]) for row in range(config.images)]
    tokens = np.stack([rollout.completion_ids for rollout in sample(network, prompts, settings, seed)])
    return np.where(tokens < LEVELS, tokens, 0)


def real_pixels(count: int, seed: int, together: bool) -> np.ndarray:
    """Training images, int [count, 64], or the control: each pixel from another one."""
    pixels, _ = images("train")
    drawn = Noise(seed).generator("digits/real").integers(0, len(pixels), (count, 1 if together else PIXELS))
    return pixels[drawn, np.arange(PIXELS)]


def distance(pixels: np.ndarray) -> float:
    """Frechet distance to the held-out images, on principal components of the training images."""
    return frechet(components(pixels), components(images("test")[0]))


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Between the normal laws with the moments of two samples [N, D] and [M, D] (Heusel et al. 2017, arXiv 1706.08500)."""
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    mixed = np.real(sqrtm(first @ second))
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * mixed))


def components(pixels: np.ndarray) -> np.ndarray:
    """[N, 20] of images in units of one grey level."""
    return _principal().transform(pixels)


@cache
def _principal() -> Any:
    from sklearn.decomposition import PCA

    return PCA(COMPONENTS, svd_solver="full").fit(images("train")[0])


def judge(by_arm: dict[tuple[str, str], list[dict[str, Any]]], controls: list[float], floor: list[float]) -> Verdict:
    """The verdict on the distances of each curve and weight, a result per seed."""

    def at_compared(curve: str, weight: str) -> np.ndarray:
        return np.array([one["distance"][str(COMPARED_STEPS)] for one in by_arm[curve, weight]])

    best = at_compared("exponential", "plain")
    guided = {name: np.array([one[name] for one in by_arm["exponential", "plain"]]) for name in ("full", "interval")}
    checks = (
        above("log of (linear, ELBO) over (exponential, 1)", np.log(at_compared("linear", "elbo") / best).tolist()),
        above("log of guidance at all times over in the interval", np.log(guided["full"] / guided["interval"]).tolist()),
    )
    factor = (np.array(controls) / best).tolist()
    control = Check("independent pixels", min(factor) > 1, f"distance {min(factor):.2f} to {max(factor):.2f} times the network's")
    numbers = {f"{curve}, {weight}, {COMPARED_STEPS} steps": at_compared(curve, weight).tolist() for curve, weight in by_arm}
    numbers |= {f"guidance, {name}": values.tolist() for name, values in guided.items()}
    numbers |= {"control": controls, "floor": floor}
    return Verdict(checks, control, numbers, draw(by_arm, controls, floor))


@rc_context(STYLE)
def draw(by_arm: dict[tuple[str, str], list[dict[str, Any]]], controls: list[float], floor: list[float]) -> Figure:
    """Distance over forwards; mean over seeds with their range."""
    figure = Figure(figsize=(6.6, 3.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for (curve, weight), seeds in by_arm.items():
        steps = [int(key) for key in seeds[0]["distance"]]
        values = np.array([list(one["distance"].values()) for one in seeds])
        color, dash = COLORS[CURVES.index(curve)], DASHES[WEIGHTS.index(weight)]
        axes.plot(steps, values.mean(0), color=color, linestyle=dash, marker="o", markersize=3, label=f"{curve}, {weight}")
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.1, linewidth=0)
    axes.axhline(float(np.mean(controls)), color="black", linewidth=0.8, linestyle=":", label="control: independent pixels")
    axes.axhline(float(np.mean(floor)), color="black", linewidth=0.8, label="floor: real images")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("forwards of an image")
    axes.set_ylabel("Frechet distance")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
