"""UltraLLaDA: packed documents teach a network its longer context best when the documents of a row do not see each other.

Source: UltraLLaDA (arXiv 2510.10481), section 3.3, and RULER at 32K after 600 steps: adaptive 73.6, EOD 70.8, direct 63.0.
Experiment: the LLaDA of `passkey_ntk` learns to find a key, one symbol of 32, somewhere in filler, in rows of 8 to 64 tokens.
    Diffusion-aware NTK extends its context 8 times. Post-training with a tenth as many steps follows, on documents of 32 to 512 tokens,
    each with a key and at its end the question and the key again, which `training.documents` puts into rows of 512: with each packing,
    adaptive, eod and direct. All answers are hidden, and the loss is theirs. Then keys are asked for in single documents 4 and 8 times as
    long as the longest of training, at evenly spread depths.
Control: the same post-training, adaptive, on documents whose question has the key of another document. It must undo what was learned, or
    post-training is too short to tell packings apart.
Pass: with accuracies averaged over the longer lengths, in the 95 % interval over seeds: adaptive minus EOD and EOD minus direct above
    -0.05, adaptive minus direct above 0, adaptive minus no post-training above -0.05. Control: below half of adaptive on every seed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from torch import Tensor, nn

from rlhub.algorithm.batching import micro_batches
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.studies.lab_training import SFT, Tick, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.studies.labs.passkey_ntk import (
    ASK,
    EVERY,
    KEY,
    TRAINED,
    accuracy,
    difference,
    draw,
    extended,
    haystacks,
    network_config,
    trained,
)
from rlhub.training.documents import PackedDocuments
from rlhub.types import Batch, Views
from rlhub.views._rows import NoisyRow, build_views

KIND = "statistical"
PACKINGS = ("adaptive", "eod", "direct")
BEFORE, CONTROL = "no post-training", "keys of others"
LEAST = TRAINED // 2  # tokens of a document of post-training


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    parallel: int = 2
    layers: int = 2
    heads: int = 2
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 3e-3
    post_steps: int = 40
    post_batch_size: int = 4
    post_learning_rate: float = 2e-3
    documents: int = 1000  # of post-training
    times: list[int] = field(default_factory=lambda: [1, 4, 8])  # lengths of the test; rows are packed to the last one
    problems: int = 64


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    ticks = config.steps // EVERY + 2 + len(PACKINGS)
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, ticks) for seed in config.seeds]
    return judge(config, list(run_arms(arms, config, progress, out).values()))


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Accuracies by kind of post-training, one for each length."""
    network = trained(config, tick, seed)
    network = extended(network, "diffusion_ntk", config.times[-1])
    result = {}
    for kind in (BEFORE, *PACKINGS, CONTROL):
        one = network if kind == BEFORE else post_trained(config, network, kind, seed)
        result[kind] = [accuracy(one, config.problems, times * TRAINED, seed) for times in config.times]
        tick()
    return result


def post_trained(config: Config, network: nn.Module, kind: str, seed: int) -> nn.Module:
    """A copy of the extended network that was trained on the answers in packed documents."""
    network, rows = deepcopy(network).train(), packed(config, kind, seed)
    optimizer = replace(SFT, learning_rate=config.post_learning_rate, warmup_steps=config.post_steps // 5)

    def loss(step: int) -> Tensor:
        views = answer_views(rows.batch(step, config.post_batch_size), network.profile)
        (whole,) = micro_batches(views, int(views.layout.row_offsets[-1]))
        return -micro_batch_log_probs(network, views, whole).sum() / max(len(views.score_target), 1)

    return train(network, loss, config.post_steps, optimizer).eval()


def answer_views(batch: Batch, profile: Profile) -> Views:
    """Rows in which the keys after all questions are hidden and scored; a key that the row's end cut off is left out."""
    rows = []
    for number, tokens in enumerate(batch.completions):
        places = (np.flatnonzero(tokens == ASK)[:, None] + 1 + np.arange(KEY)).ravel()
        masked = np.zeros(len(tokens), dtype=bool)
        masked[places[places < len(tokens)]] = True
        rows.append(NoisyRow(number, 0, masked))
    return build_views(batch, rows, 1, profile)


def packed(config: Config, kind: str, seed: int) -> PackedDocuments:
    """The rows of one of `PACKINGS`, or of the control."""
    shape, length = network_config(config.layers, config.heads), config.times[-1] * TRAINED
    packing = "adaptive" if kind == CONTROL else kind
    return PackedDocuments(documents(config, seed, kind == CONTROL), packing, length, shape.eos_token_id, Noise(seed))


def documents(config: Config, seed: int, swapped: bool = False) -> list[np.ndarray]:
    """int [n] each, n log-uniform from 32 tokens to a whole row; `swapped` gives each question the key of the document behind."""
    random = Noise(seed).generator("packing_masks/documents")
    longest = config.times[-1] * TRAINED
    lengths = np.exp(random.uniform(np.log(LEAST), np.log(longest + 1), config.documents)).astype(int)
    prompts, keys = zip(*(haystacks(random, 1, length) for length in lengths), strict=True)
    keys = np.roll(np.concatenate(keys), -1 if swapped else 0, axis=0)
    return [np.append(prompt, key) for prompt, key in zip(prompts, keys, strict=True)]


def judge(config: Config, results: list[dict[str, list[float]]]) -> Verdict:
    """The verdict on the accuracies of each seed: kind -> one for each length."""
    longer = [index for index, times in enumerate(config.times) if times > 1]
    average = {kind: [mean(one[kind][index] for index in longer) for one in results] for kind in (BEFORE, *PACKINGS, CONTROL)}
    adaptive, eod, direct = (average[packing] for packing in PACKINGS)
    checks = (
        above("adaptive minus EOD", difference(adaptive, eod), -0.05),
        above("EOD minus direct", difference(eod, direct), -0.05),
        above("adaptive minus direct", difference(adaptive, direct)),
        above("adaptive minus no post-training", difference(adaptive, average[BEFORE]), -0.05),
    )
    kept = max(wrong / max(right, 1e-9) for wrong, right in zip(average[CONTROL], adaptive, strict=True))
    control = Check("keys of other documents", kept < 0.5, f"{kept:.2f} at most of the accuracy that right keys give")
    numbers = {
        f"{kind}, {times * TRAINED} tokens": [one[kind][index] for one in results]
        for kind in average
        for index, times in enumerate(config.times)
    }
    return Verdict(checks, control, numbers, draw(config.times, {kind: kind for kind in average}, results))
