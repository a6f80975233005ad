"""ESPO on images: reinforcement learning against a classifier makes generated digits easier to recognise, for another classifier too.

Source: eMIGM (arXiv 2503.07197) for the images, ESPO (arXiv 2512.03759) for the algorithm; the combination is ours.
Experiment: `recipes/digits.yaml` through rlhub's own trainer, supervised and then online. The reward is a logistic regression that was
    fitted to one half of the images; what is reported is the accuracy of a support vector machine fitted to the other half, on images
    sampled before and after.
Control: the same with rewards shuffled over the batch, from the same supervised model.
Pass: in the 95 % interval over seeds the accuracy under the second classifier rises by more than 0.02, and by more than the control's.
    Control: its accuracy does not rise by more than 0.05 on any seed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import Tick
from rlhub.studies.labs import Arm, Check, Verdict, above, folder_of, run_arms
from rlhub.tasks.digits import CLASSES, LEVELS

KIND = "statistical"
RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "digits.yaml"
KINDS = {"espo": "ESPO", "shuffled": "control: shuffled rewards"}


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    images: int = 320  # sampled for each accuracy
    overrides: list[str] = field(default_factory=list)  # of the recipe


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    folder = str(folder_of(config, out).resolve())
    run_arms([Arm(f"base_seed{seed}", train_base, {"folder": folder, "seed": seed}, 1) for seed in config.seeds], config, progress, out)
    arms = [
        Arm(f"{kind}_seed{seed}", improve, {"folder": folder, "kind": kind, "seed": seed}, 1) for seed in config.seeds for kind in KINDS
    ]
    results = run_arms(arms, config, progress, out)
    return judge({kind: [results[f"{kind}_seed{seed}"] for seed in config.seeds] for kind in KINDS})


def train_base(config: Config, tick: Tick, folder: str, seed: int) -> dict[str, Any]:
    """The supervised model of a seed."""
    path = _train(config, folder, "base", seed, ["run.phases=[sft]"])
    tick()
    return {"path": path}


def improve(config: Config, tick: Tick, folder: str, kind: str, seed: int) -> dict[str, Any]:
    """Accuracies under both classifiers before and after reinforcement learning."""
    base = f"{folder}/base_seed{seed}"
    options = ["run.phases=[online]", f"model.path={base}", f"task.shuffle_rewards={str(kind == 'shuffled').lower()}"]
    trained = _train(config, folder, kind, seed, options)
    result = {"before": accuracies(config, base, seed), "after": accuracies(config, trained, seed)}
    tick()
    return result


def accuracies(config: Config, path: str, seed: int) -> dict[str, float]:
    """Share of sampled images in which the rewarding and the independent classifier see the asked digit."""
    from rewards.digit_class import classifier
    from rlhub.checkpoints.sealed import resolve_model_path
    from rlhub.checkpoints.weights import load_network
    from rlhub.config.recipe import load_recipe
    from rlhub.studies.lab_training import sample

    labels = np.arange(config.images) % CLASSES
    settings = load_recipe(RECIPE, config.overrides).sampler
    network = load_network(resolve_model_path(Path(path)))
    rollouts = sample(network, list(LEVELS + labels[:, None]), settings, seed)
    pixels = np.stack([rollout.completion_ids for rollout in rollouts])
    pixels = np.where(pixels < LEVELS, pixels, 0)
    return {
        name: float((judge.predict(pixels) == labels).mean()) for name, judge in (("reward", classifier()), ("other", second_opinion()))
    }


@cache
def second_opinion() -> Any:
    """Fitted to the images that the reward's classifier has not seen."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    data = load_digits()
    return SVC(gamma=1e-3).fit(data.data[1::2], data.target[1::2])


def judge(results: dict[str, list[dict[str, Any]]]) -> Verdict:
    """The verdict on the accuracies of each kind and seed."""
    gain = {kind: [one["after"]["other"] - one["before"]["other"] for one in seeds] for kind, seeds in results.items()}
    over_control = [ours - theirs for ours, theirs in zip(gain["espo"], gain["shuffled"], strict=True)]
    checks = (
        above("gain under the second classifier", gain["espo"], 0.02),
        above("gain over the control", over_control),
    )
    worst = max(gain["shuffled"])
    control = Check("shuffled rewards", worst <= 0.05, f"gain at most {worst:+.3f}")
    numbers = {
        f"{label}, {name} classifier, {when}": [one[when][key] for one in results[kind]]
        for kind, label in KINDS.items()
        for key, name in (("reward", "rewarding"), ("other", "second"))
        for when in ("before", "after")
    }
    return Verdict(checks, control, numbers, draw(results))


@rc_context(STYLE)
def draw(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy under the second classifier before and after, a line per seed."""
    figure = Figure(figsize=(4.2, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for color, (kind, label) in zip(COLORS, KINDS.items(), strict=False):
        for number, one in enumerate(results[kind]):
            values = [one[when]["other"] for when in ("before", "after")]
            axes.plot([0, 1], values, "o-", color=color, markersize=4, label=None if number else label)
    axes.set_xticks([0, 1], ["supervised", "after online steps"])
    axes.set_xlim(-0.2, 1.2)
    axes.set_ylabel("recognised by the second classifier")
    axes.legend()
    return figure


def _train(config: Config, folder: str, kind: str, seed: int, options: list[str]) -> str:
    """A run folder of the recipe; continues by itself when it was stopped."""
    from rlhub.config.recipe import load_recipe
    from rlhub.training.run import train

    names = [f"run.seed={seed}", f"run.output_dir={folder}", f"run.name={kind}_seed{seed}"]
    with open(os.devnull, "w") as silent:
        return str(train(load_recipe(RECIPE, [*config.overrides, *options, *names]), Console(file=silent)))
