"""UltraLLaDA: rotary scaling made for bidirectional attention carries passkey retrieval further than scaling made for causal attention.

Source: UltraLLaDA (arXiv 2510.10481), section 3.2 and its needle-in-a-haystack results without training; LongLLaDA (arXiv 2506.14429).
Experiment: a small LLaDA with heads of 32 dimensions and base 10,000 learns to find a key, one symbol of 32, that stands somewhere among
    filler, in rows of 8 to 64 tokens. The context is then extended 8, 16 and 32 times, without training, with `rope.scaling` none, ntk and
    diffusion_ntk. Keys are put at evenly spread depths.
Control: no scaling. At 32 times the length it must lose most of what it knew, otherwise the task needs no positions that far away.
Pass: the bases are those of the formulas (1e4 x 12.5, 79, 503 and 14.2, 130, 1199, to 3 %); in the 95 % interval over seeds the accuracy
    averaged over the extended lengths is higher with diffusion_ntk than with none by 0.1, and it is not lower than with ntk by 0.05 or
    more. Control: without scaling the accuracy at 32 times the length is below half of that at 64 tokens, on every seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

from rlhub.config.schema import RopeConfig, SamplerConfig
from rlhub.models import llada
from rlhub.networks.rope import extend
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, counted, masked_loss, sample, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.types import Batch
from rlhub.views import elbo

KIND = "statistical"
SHORTEST, TRAINED = 8, 64  # tokens of a training row
KEY = 1  # tokens of a key; of more than one, networks of this size learn one and for long no other
SYMBOLS, FILLERS = 32, 16  # tokens 0 to 31 are symbols of a key, the next ones filler, then the token before a key and the question
MARK, ASK = SYMBOLS + FILLERS, SYMBOLS + FILLERS + 1
VOCABULARY = SYMBOLS + FILLERS + 2
RULES = {"none": "no scaling", "ntk": "NTK", "diffusion_ntk": "diffusion-aware NTK"}
FACTORS = {4: (14.2, 12.5), 8: (130.0, 79.0), 16: (1199.0, 503.0)}  # of the base, for ntk and diffusion_ntk
EVERY = 50  # steps between two ticks


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    layers: int = 2
    heads: int = 2
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 3e-3
    times: list[int] = field(default_factory=lambda: [1, 8, 16, 32])
    problems: int = 64


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, config.steps // EVERY + len(config.times)) for seed in config.seeds]
    return judge(config, list(run_arms(arms, config, progress, out).values()))


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Train a network; accuracies by rule, one for each length."""
    network = trained(config, tick, seed)
    result: dict[str, Any] = {rule: [] for rule in RULES}
    for times in config.times:
        for rule in RULES:
            result[rule].append(accuracy(extended(network, rule, times), config.problems, times * TRAINED, seed))
        tick()
    return result


def trained(config: Any, tick: Tick, seed: int) -> nn.Module:
    """A network that finds keys in rows of at most 64 tokens. `config` has layers, heads, steps, batch_size and learning_rate."""
    network = llada.build(network_config(config.layers, config.heads)).initialize(torch.Generator().manual_seed(seed))

    def batch(step: int) -> Batch:
        return batch_of(*short_haystacks(config.batch_size, seed, step), step)

    loss = masked_loss(network, elbo, elbo.Config(draws=1), batch, seed)
    return train(network, loss, config.steps, replace(SFT, learning_rate=config.learning_rate), counted(tick, EVERY))


def network_config(layers: int, heads: int) -> llada.Config:
    """Heads of 32 dimensions, for which the paper's formulas give the factors above."""
    width = 32 * heads
    return llada.Config(
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        mlp_hidden_size=(8 * width // 3 + 15) // 16 * 16,
        vocab_size=VOCABULARY + 2,
        mask_token_id=VOCABULARY,
        eos_token_id=VOCABULARY + 1,
        pad_token_id=VOCABULARY + 1,
        max_sequence_length=TRAINED,
        rope_theta=10000.0,
    )


def extended(network: nn.Module, rule: str, times: int) -> nn.Module:
    """The same weights with the context of `times` training rows."""
    target = times * TRAINED
    if rule == "none" or times == 1:
        config = replace(network.config, max_sequence_length=target)
    else:
        config = extend(network.config, RopeConfig(rule, target))
    longer = llada.build(config)
    longer.load_state_dict(network.state_dict())
    return longer.eval()


def short_haystacks(count: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The haystacks of a step of training, all as long as each other; short ones teach the network where to look."""
    random = Noise(seed).generator("passkey_ntk/rows", uid=step)
    return haystacks(random, count, int(random.integers(SHORTEST, TRAINED + 1)))


def haystacks(random: np.random.Generator, count: int, length: int, depths: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Prompts int [count, length - KEY], a key at a random depth or at `depths` [count] in (0, 1), and the keys int [count, KEY]."""
    prompts = random.integers(SYMBOLS, SYMBOLS + FILLERS, (count, length - KEY))
    prompts[:, -1] = ASK
    keys = random.integers(0, SYMBOLS, (count, KEY))
    room = length - 2 * KEY - 1  # places of the mark
    place = random.integers(0, room, count) if depths is None else (depths * room).astype(np.int64)
    prompts[np.arange(count), place] = MARK
    prompts[np.arange(count)[:, None], place[:, None] + 1 + np.arange(KEY)] = keys
    return prompts, keys


def accuracy(network: nn.Module, count: int, length: int, seed: int) -> float:
    """Share of `count` keys that are found in full, over evenly spread depths of rows of `length` tokens."""
    random = Noise(seed).generator("passkey_ntk/test", uid=length)
    prompts, keys = haystacks(random, count, length, (np.arange(count) + 0.5) / count)
    settings = SamplerConfig(name="low_confidence", length=KEY, steps=KEY, block_length=KEY, temperature=0.0, early_stop="off")
    answers = np.stack([rollout.completion_ids for rollout in sample(network, list(prompts), settings, seed)])
    return float((answers == keys).all(1).mean())


def judge(config: Config, results: list[dict[str, list[float]]]) -> Verdict:
    """The verdict on the accuracies of each seed: rule -> one for each length."""
    longer = [index for index, times in enumerate(config.times) if times > 1]
    average = {rule: [mean(one[rule][index] for index in longer) for one in results] for rule in RULES}
    base = network_config(config.layers, config.heads)
    theta = {rule: {times: extend(base, RopeConfig(rule, times * TRAINED)).rope_theta for times in FACTORS} for rule in list(RULES)[1:]}
    error = max(
        abs(theta[rule][times] / base.rope_theta / factor - 1)
        for times, factors in FACTORS.items()
        for rule, factor in zip(theta, factors, strict=True)
    )
    checks = (
        Check("bases of the formulas", error < 0.03, f"largest relative difference {error:.3f}, bound 0.03"),
        above("diffusion-aware minus none", difference(average["diffusion_ntk"], average["none"]), 0.1),
        above("diffusion-aware minus NTK", difference(average["diffusion_ntk"], average["ntk"]), -0.05),
    )
    near, far = config.times.index(1), config.times.index(max(config.times))
    kept = max(one["none"][far] / max(one["none"][near], 1e-9) for one in results)
    control = Check(
        "no scaling",
        kept < 0.5,
        f"keeps {kept:.2f} at most of its accuracy at {TRAINED} tokens when rows are {max(config.times)} times as long",
    )
    numbers = {
        f"{label}, {times * TRAINED} tokens": [one[rule][index] for one in results]
        for rule, label in RULES.items()
        for index, times in enumerate(config.times)
    }
    return Verdict(checks, control, numbers, draw(config.times, RULES, results))


def difference(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


@rc_context(STYLE)
def draw(times: list[int], labels: dict[str, str], results: list[dict[str, list[float]]]) -> Figure:
    """Accuracy over length for each of `labels`, mean over seeds with their range."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    length = TRAINED * np.array(times)
    for color, (kind, label) in zip(COLORS, labels.items(), strict=False):
        values = np.array([one[kind] for one in results])
        axes.plot(length, values.mean(0), "o-", markersize=3, color=color, label=label)
        axes.fill_between(length, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(length, length)
    axes.set_xlabel("tokens of a row (64 in training)")
    axes.set_ylabel("keys found")
    axes.legend()
    return figure
