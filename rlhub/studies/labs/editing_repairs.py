"""LLaDA2.1: a network that was trained on wrong tokens as well as on masks repairs a filled block by editing it.

Source: LLaDA2.1 (arXiv 2602.08676): training from mask to token and from token to token, decoding with both.
Experiment: a small LLaDA2 network, all layers dense, learns to put eight digits in order. Of a noisy answer l ~ U{0..8} tokens are masked,
    each of the others becomes a random digit with some probability, and all eight are predicted. Then k tokens of a filled answer are
    replaced by wrong digits, and the rollout engine goes on from there with the sampler `edit` and, for comparison, with `block`, which
    never changes a token. Both also fill empty answers, many tokens at a time.
Control: a network that learned in the same way, but whose tokens were masked or right. Edits must not repair what it is given.
Pass: in the 95 % interval over seeds and for every k the share of exact answers is higher with edits than without, by at least 0.2; no
    rollout takes more than `max_post_steps` steps. Control: its gain from edits stays below 0.2 on every k and seed.
    The gain from edits on answers that were generated is reported and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlhub.algorithm.batching import micro_batches
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.config.schema import SamplerConfig
from rlhub.models import llada2
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, counted, sample, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.types import Request, Rollout, Views
from rlhub.views._rows import NoisyRow, build_views

KIND = "statistical"
DIGITS = 8  # of prompt and answer, one block each
SAMPLERS = {"edit": "edits", "block": "no edits"}
NETWORKS = {"corrupted": "trained on wrong tokens too", "right": "control: on masks and right tokens"}
GAIN = 0.2
EVERY = 50  # steps between two ticks
TRAIN, TEST = range(2)  # key of the rows


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    width: int = 64
    layers: int = 2
    steps: int = 400
    batch_size: int = 64
    corruption: float = 0.3  # probability that a token which is not masked becomes a random digit
    wrong: list[int] = field(default_factory=lambda: [1, 2, 4])  # k, of eight
    problems: int = 128
    threshold: float = 0.5  # of filling, low so that many tokens are filled at once
    editing_threshold: float = 0.7
    max_post_steps: int = 16


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    ticks = config.steps // EVERY + len(config.wrong) + 1
    arms = [Arm(f"{kind}_seed{seed}", measure, {"kind": kind, "seed": seed}, ticks) for seed in config.seeds for kind in NETWORKS]
    results = run_arms(arms, config, progress, out)
    return judge(config, {kind: [results[f"{kind}_seed{seed}"] for seed in config.seeds] for kind in NETWORKS})


def measure(config: Config, tick: Tick, kind: str, seed: int) -> dict[str, Any]:
    """Train a network; exact answers by sampler, from answers with k wrong tokens and from empty ones, and the most steps of a repair."""
    network = tiny_llada2(config, seed)
    corruption = config.corruption if kind == "corrupted" else 0.0
    train(network, lambda step: repair_loss(config, network, corruption, seed, step), config.steps, SFT, counted(tick, EVERY))
    network.eval()
    prompts, answers = digit_rows(config.problems, seed, TEST, 0)
    result: dict[str, Any] = {"repaired": {name: [] for name in SAMPLERS}, "generated": {}, "post_steps": 0}
    for count in config.wrong:
        canvases = with_wrong(answers, count, Noise(seed).generator("editing_repairs/wrong", uid=count))
        for name in SAMPLERS:
            rollouts = go_on(network, prompts, canvases, sampler_settings(config, name), seed)
            result["repaired"][name].append(exact(rollouts, answers))
            result["post_steps"] = max(result["post_steps"], *(rollout.num_forwards for rollout in rollouts))
        tick()
    for name in SAMPLERS:
        result["generated"][name] = exact(sample(network, list(prompts), sampler_settings(config, name), seed), answers)
    tick()
    return result


def tiny_llada2(config: Config, seed: int) -> nn.Module:
    """A random LLaDA2 for digits without mixtures of experts; the mask is token 10, EOS 11."""
    fields = llada2.Config(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=config.width // 4,
        intermediate_size=8 * config.width // 3,
        first_k_dense_replace=config.layers,
        vocab_size=12,
        mask_token_id=10,
        eos_token_id=11,
        pad_token_id=11,
        block_length=DIGITS,
        editing=True,
    )
    return llada2.build(fields).initialize(torch.Generator().manual_seed(seed))


def digit_rows(count: int, seed: int, purpose: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of digits and the same digits in order, int [count, DIGITS] each."""
    prompts = Noise(seed).generator("editing_repairs/rows", uid=purpose << 32 | step).integers(0, 10, (count, DIGITS))
    return prompts, np.sort(prompts, 1)


def noisy_views(config: Config, network: nn.Module, corruption: float, seed: int, step: int) -> Views:
    """One row for each problem, l ~ U{0..L} of its answer's L tokens masked and some of the others wrong; all of them are scored.

    l = 0 is needed: a repair begins with nothing masked, and a network that never saw that gets lost.
    """
    random = Noise(seed).generator("editing_repairs/noise", uid=step)
    batch = batch_of(*digit_rows(config.batch_size, seed, TRAIN, step), step)
    order = random.random((config.batch_size, DIGITS)).argsort(1)
    masked = order < random.integers(0, DIGITS + 1, (config.batch_size, 1))
    rows = [NoisyRow(sample, 0, mask, scored=np.ones_like(mask), clean_before=True) for sample, mask in enumerate(masked)]
    views = build_views(batch, rows, 1, network.profile)
    changed = torch.from_numpy(random.random(len(views.target_rows)) < corruption)
    place = views.target_rows[changed & (views.tokens[views.target_rows] != network.mask_id)]
    tokens = views.tokens.clone()
    tokens[place] = torch.from_numpy(random.integers(0, 10, len(place)).astype(np.int32))
    return replace(views, tokens=tokens)


def repair_loss(config: Config, network: nn.Module, corruption: float, seed: int, step: int) -> Tensor:
    """Plain cross-entropy of all tokens, as LLaDA2 weighs them."""
    views = noisy_views(config, network, corruption, seed, step)
    (whole,) = micro_batches(views, int(views.layout.row_offsets[-1]))
    return -micro_batch_log_probs(network, views, whole).mean()


def with_wrong(answers: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """The answers with `count` tokens of each replaced by other digits."""
    chosen = random.random(answers.shape).argsort(1) < count
    return np.where(chosen, (answers + random.integers(1, 10, answers.shape)) % 10, answers)


def sampler_settings(config: Config, name: str) -> SamplerConfig:
    options: dict[str, Any] = {"threshold": config.threshold}
    if name == "edit":
        options |= {"editing_threshold": config.editing_threshold, "max_post_steps": config.max_post_steps}
    return SamplerConfig(name=name, length=DIGITS, steps=DIGITS, block_length=DIGITS, temperature=0.0, early_stop="off", options=options)


def go_on(network: nn.Module, prompts: np.ndarray, canvases: np.ndarray, settings: SamplerConfig, seed: int) -> list[Rollout]:
    """Rollouts of the engine from answers that are filled already."""
    from rlhub.engines.torch_engine import Engine, RunningRows

    class Filled(RunningRows):
        def admit(self, slot: int, index: int) -> int:
            start = len(self.requests[index].prompt_ids)
            super().admit(slot, index)
            self.slots.tokens[slot, start : start + settings.length] = torch.from_numpy(canvases[index])
            return slot

    requests = [Request(row, row, prompt.astype(np.int32)) for row, prompt in enumerate(prompts)]
    with torch.no_grad():
        return Filled(Engine(network), requests, settings, Noise(seed), 0).run()


def exact(rollouts: list[Rollout], answers: np.ndarray) -> float:
    return float((np.stack([rollout.completion_ids for rollout in rollouts]) == answers).all(1).mean())


def judge(config: Config, results: dict[str, list[dict[str, Any]]]) -> Verdict:
    """The verdict on the exact answers of each kind of network and seed."""
    gain = {
        kind: [[one["repaired"]["edit"][index] - one["repaired"]["block"][index] for one in seeds] for index in range(len(config.wrong))]
        for kind, seeds in results.items()
    }
    most = max(one["post_steps"] for seeds in results.values() for one in seeds)
    checks = (
        *(
            above(f"gain from edits, {k} of {DIGITS} wrong", values, GAIN)
            for k, values in zip(config.wrong, gain["corrupted"], strict=True)
        ),
        Check("repairs end", most <= config.max_post_steps, f"{most} steps at most, bound {config.max_post_steps}"),
    )
    worst = max(map(max, gain["right"]))
    control = Check("trained without wrong tokens", worst < GAIN, f"gain from edits at most {worst:+.3f}, bound {GAIN:g}")
    numbers = {
        f"{label}, {k} wrong, {how}": [one["repaired"][name][index] for one in results[kind]]
        for kind, label in NETWORKS.items()
        for name, how in SAMPLERS.items()
        for index, k in enumerate(config.wrong)
    } | {
        f"{label}, generated, {how}": [one["generated"][name] for one in results[kind]]
        for kind, label in NETWORKS.items()
        for name, how in SAMPLERS.items()
    }
    return Verdict(checks, control, numbers, draw(config.wrong, results))


@rc_context(STYLE)
def draw(wrong: list[int], results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Exact answers over k, mean over seeds with their range."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for color, (kind, label) in zip(COLORS, NETWORKS.items(), strict=False):
        for name, line in zip(SAMPLERS, ("o-", "o:"), strict=True):
            values = np.array([one["repaired"][name] for one in results[kind]])
            axes.plot(wrong, values.mean(0), line, markersize=3, color=color, label=f"{label}, {SAMPLERS[name]}")
            axes.fill_between(wrong, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xticks(wrong)
    axes.set_xlabel(f"wrong tokens of a filled answer of {DIGITS}")
    axes.set_ylabel("exact answers")
    axes.legend()
    return figure
