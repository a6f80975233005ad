"""Dream and DiffuCoder: a next-token predictor becomes a masked diffusion model fast if it keeps predicting from the position before.

Source: Dream (arXiv 2508.15487), section 3.1, the shift operation; DiffuGPT (arXiv 2410.17891), section 3.3; DiffuCoder (arXiv 2506.20639).
Experiment: a small Dream network first learns to put six digits in order as a causal next-token predictor. It is then trained by masked
    diffusion, read with the family's logit shift (position i predicts token i + 1) and, from the same weights and with the same noise,
    without it (position i predicts token i). The shifted one is saved and loaded.
Control: each of the two trained networks is scored with the other's reading, which must be far worse than its own.
Pass: in the 95 % interval over seeds the loss averaged over training is lower with the shift than without; the loaded network's logits
    differ by exactly 0. Control: the held-out loss is at least 1 nat per token higher under the wrong reading than under the right one,
    for both networks on every seed. The held-out losses of both at the end of training are reported and decide nothing: given enough
    steps, the network learns either reading.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlhub.checkpoints.weights import load_network, save_network
from rlhub.models import dream
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, causal_layout, counted, masked_loss, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.types import Batch
from rlhub.views import elbo

KIND = "statistical"
DIGITS = 6
SHIFTS = {"shift": 1, "none": 0}
LABELS = {"shift": "shift by one", "none": "no shift"}
EVERY = 20  # steps between two ticks
CAUSAL, DIFFUSION, TEST = range(3)  # key of the rows


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    width: int = 64
    layers: int = 2
    causal_steps: int = 200
    steps: int = 120
    batch_size: int = 64
    learning_rate: float = 1e-3  # of the diffusion training; 2e-3 for the next-token predictor
    problems: int = 256


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    ticks = config.causal_steps // EVERY + len(SHIFTS) * (config.steps // EVERY)
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, ticks) for seed in config.seeds]
    return judge(list(run_arms(arms, config, progress, out).values()))


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Loss of every step by the shift of training, held-out loss by it and by the shift of scoring, and the difference after reloading."""
    predictor = tiny_dream(config, seed)
    train(predictor, partial(next_token_loss, config, predictor, seed), config.causal_steps, SFT, counted(tick, EVERY))
    result: dict[str, Any] = {"curve": {}, "held_out": {}}
    for name, shift in SHIFTS.items():
        network = with_shift(predictor, shift)
        result["curve"][name] = diffusion_losses(config, tick, network, seed)
        result["held_out"][name] = {other: held_out_loss(config, with_shift(network, SHIFTS[other]).eval(), seed) for other in SHIFTS}
        if name == "shift":
            result["reload"] = reload_difference(config, network.eval(), seed)
    return result


def tiny_dream(config: Config, seed: int) -> nn.Module:
    """A random Dream for digits; the mask is token 10, EOS 11."""
    fields = dream.Config(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        intermediate_size=8 * config.width // 3,
        vocab_size=12,
        mask_token_id=10,
        eos_token_id=11,
    )
    return dream.build(fields).initialize(torch.Generator().manual_seed(seed))


def with_shift(network: nn.Module, shift: int) -> nn.Module:
    """A copy of a network that reads the prediction of token p at position p - shift."""
    other = copy.deepcopy(network)
    other.profile = replace(network.profile, logit_shift=shift)
    return other


def digit_rows(count: int, seed: int, purpose: int, step: int) -> Batch:
    """Rows of digits and the same digits in order."""
    prompts = Noise(seed).generator("shift_adapter/rows", uid=purpose << 32 | step).integers(0, 10, (count, DIGITS))
    return batch_of(list(prompts), list(np.sort(prompts, 1)), step)


def next_token_loss(config: Config, network: nn.Module, seed: int, step: int) -> Tensor:
    """Cross-entropy of the answers, each token seeing what is before it: the shift reads it at the token before."""
    batch = digit_rows(config.batch_size, seed, CAUSAL, step)
    rows = torch.from_numpy(np.concatenate([np.stack(batch.prompts), np.stack(batch.completions)], 1))
    count, length = rows.shape
    answer = torch.arange(count * length).view(count, length)[:, DIGITS:].flatten()
    hidden = network.denoise(rows.flatten(), causal_layout(count, length), targets=answer)
    return F.cross_entropy(network.head(hidden), rows.flatten()[answer].long())


def diffusion_losses(config: Config, tick: Tick, network: nn.Module, seed: int) -> list[float]:
    """Train by masked diffusion; the loss of each step."""
    losses = []
    loss = masked_loss(network, elbo, elbo.Config(draws=1), lambda step: digit_rows(config.batch_size, seed, DIFFUSION, step), seed)

    def kept(step: int) -> Tensor:
        value = loss(step)
        losses.append(value.item())
        return value

    train(network, kept, config.steps, replace(SFT, learning_rate=config.learning_rate, warmup_steps=10), counted(tick, EVERY))
    return losses


@torch.no_grad()
def held_out_loss(config: Config, network: nn.Module, seed: int) -> float:
    """Nats per token of fresh rows, minus the ELBO with four draws."""
    make = partial(digit_rows, config.problems, seed, TEST)
    return float(masked_loss(network, elbo, elbo.Config(draws=4), lambda step: make(step), seed)(0))


@torch.no_grad()
def reload_difference(config: Config, network: nn.Module, seed: int) -> float:
    """Largest difference of logits after saving and loading."""
    batch = digit_rows(8, seed, TEST, 0)
    rows = torch.from_numpy(np.stack(batch.prompts)).flatten()
    layout = causal_layout(len(batch), DIGITS)
    with TemporaryDirectory() as folder:
        save_network(network, Path(folder) / "model")
        loaded = load_network(Path(folder) / "model").eval()
    one, other = (net.head(net.denoise(rows, layout)) for net in (network, loaded))
    return float((one - other).abs().max())


def judge(results: list[dict[str, Any]]) -> Verdict:
    """The verdict on the losses of all seeds."""
    curve = {name: [mean(one["curve"][name]) for one in results] for name in SHIFTS}
    held_out = {(name, other): [one["held_out"][name][other] for one in results] for name in SHIFTS for other in SHIFTS}
    reload = max(one["reload"] for one in results)
    checks = (
        above("loss over training, no shift minus shift", difference(curve["none"], curve["shift"])),
        Check("the loaded network is the saved one", reload == 0, f"largest difference of logits {reload:g}"),
    )
    wrong = {name: difference(held_out[name, other], held_out[name, name]) for name, other in itertools.permutations(SHIFTS)}
    least = {name: min(values) for name, values in wrong.items()}
    detail = ", ".join(f"trained with {LABELS[name]}: {value:+.2f} nats per token at least" for name, value in least.items())
    control = Check("scored with the wrong shift", min(least.values()) > 1, detail)
    numbers = {f"loss over training, {LABELS[name]}": values for name, values in curve.items()}
    numbers |= {f"held-out loss, trained with {LABELS[name]}, scored with {LABELS[other]}": v for (name, other), v in held_out.items()}
    return Verdict(checks, control, numbers, draw(results))


def difference(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


@rc_context(STYLE)
def draw(results: list[dict[str, Any]]) -> Figure:
    """Loss over diffusion training, mean over seeds with their range, of windows of ten steps."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for color, (name, label) in zip(COLORS, LABELS.items(), strict=False):
        losses = np.array([one["curve"][name] for one in results])
        window = min(10, losses.shape[1])
        smooth = np.apply_along_axis(np.convolve, 1, losses, np.ones(window) / window, "valid")
        step = np.arange(window, losses.shape[1] + 1)
        axes.plot(step, smooth.mean(0), color=color, label=label)
        axes.fill_between(step, smooth.min(0), smooth.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("step of diffusion training")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    return figure
