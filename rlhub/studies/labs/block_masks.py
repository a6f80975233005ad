"""LLaDA2 and SDAR: one pass over a clean and a noisy copy says of every block what a pass per block and a cached decoder say.

Source: BD3-LM (arXiv 2503.09573), section 3; LLaDA2.0 (arXiv 2512.15745) and SDAR (arXiv 2510.06303) train and decode this way.
Experiment: random networks of both families with blocks of four, prompts of every length modulo four. Masked tokens of all blocks are
    scored in one pass over [clean | noisy] rows with the views `elbo`; once more in a plain row per block, the blocks before it clean and
    nothing behind it; and once more with a cache, in which each block is denoised and then stored clean. The rollouts of the sampler
    `block`, which decodes with that cache, are replayed with one [clean | noisy] row for the n-th steps of all blocks.
Control: the same rows read with full attention, and with the grid of blocks shifted by half a block. Both must change the logits.
Pass: logits differ by less than 1e-5, and the log-probs that a rollout recorded from those of its replay by less than 1e-5 nats, on every
    seed and family. Control: the largest difference lies above 1e-3 for both wrong masks on every seed and family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlhub.config.schema import SamplerConfig
from rlhub.models import llada2, sdar
from rlhub.networks.cache import CacheView
from rlhub.networks.layout import pack_layout
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import Tick, batch_of, sample
from rlhub.studies.labs import Arm, Check, Verdict, run_arms
from rlhub.types import Layout, Rollout, Views
from rlhub.views import elbo
from rlhub.views._rows import NoisyRow, build_views

KIND = "identity"
FAMILIES = {"llada2": (llada2, "block_length"), "sdar": (sdar, "block_size")}
BLOCK = 4
LOGITS = {"loop": "a pass per block", "cache": "decoding with a cache"}
WRONG = {"full": "full attention", "shifted": "shifted blocks"}
EXACT, VISIBLE = 1e-5, 1e-3


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    rows: int = 8
    length: int = 14  # of the answer, not a whole number of blocks
    draws: int = 4
    rollouts: int = 16


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    arms = [Arm(f"{family}_seed{seed}", measure, {"family": family, "seed": seed}, 3) for seed in config.seeds for family in FAMILIES]
    return judge(run_arms(arms, config, progress, out))


@torch.no_grad()
def measure(config: Config, tick: Tick, family: str, seed: int) -> dict[str, float]:
    """Largest differences: of logits by kind of pass and by wrong mask, and of the log-probs of a replay."""
    network = tiny_network(family, seed)
    views = noisy_views(config, network, seed)
    logits = read(network, views, views.layout)
    result = {name: largest(logits, blockwise(views, pass_of(network))) for name, pass_of in (("loop", plain_pass), ("cache", cached_pass))}
    tick()
    result |= {name: largest(logits, read(network, views, wrong)) for name, wrong in wrong_layouts(views.layout).items()}
    tick()
    result["replay"] = replay_error(config, network, seed)
    tick()
    return result


def tiny_network(family: str, seed: int) -> nn.Module:
    """A family's smallest network with random weights."""
    module, block_field = FAMILIES[family]
    fields = module.TINY | {"mask_token_id": 14, "eos_token_id": 13, "vocab_size": 16, "initializer_range": 0.2, block_field: BLOCK}
    return module.build(module.Config.from_published(fields)).initialize(torch.Generator().manual_seed(seed)).eval()


def noisy_views(config: Config, network: nn.Module, seed: int) -> Views:
    """[clean | noisy] rows of random answers to random prompts, `draws` for each."""
    random = Noise(seed).generator("block_masks/rows")
    prompts = [random.integers(0, 13, 1 + row) for row in range(config.rows)]
    answers = list(random.integers(0, 13, (config.rows, config.length)))
    batch = batch_of(prompts, answers)
    return elbo.make(batch, None, elbo.Config(draws=config.draws), Noise(seed).stream("views"), 0, network.profile)


def read(network: nn.Module, views: Views, layout: Layout) -> Tensor:
    """Logits [M, V] of what is scored, in one pass."""
    return network.head(network.denoise(views.tokens, layout, targets=views.target_rows))


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def wrong_layouts(layout: Layout) -> dict[str, Layout]:
    """Layouts of the same rows under which each sees too much, or blocks begin at other tokens. Relative positions stay as they are."""
    zeros = torch.zeros_like(layout.segment_ids)
    return {
        "full": replace(layout, attention="block_causal", segment_ids=zeros, block_ids=zeros),
        "shifted": replace(layout, position_ids=layout.position_ids + BLOCK // 2),
    }


def blockwise(views: Views, logits_of: Callable[[Tensor, Tensor], Iterator[Tensor]]) -> Tensor:
    """Logits [M, V] of what is scored, where `logits_of(clean tokens, noisy tokens)` gives those [block, V] of one noisy block at a time.

    Both arguments hold the row from its first token to its last noisy one; the noisy row is clean before its first noisy block.
    """
    found = []
    for row in range(views.num_rows):
        part = slice(*views.layout.row_offsets[row : row + 2].tolist())
        tokens, noisy = views.tokens[part], views.layout.segment_ids[part] == 1
        clean, position = tokens[~noisy], views.layout.position_ids[part][noisy]
        first = int(position[0])
        logits = torch.cat(list(logits_of(clean, torch.cat([clean[:first], tokens[noisy]])))[first // BLOCK :])
        found.append(logits[views.score_position[views.score_row == row] - len(clean)])
    return torch.cat(found)


def plain_pass(network: nn.Module) -> Callable[[Tensor, Tensor], Iterator[Tensor]]:
    """A row for each block: clean before, noisy in it, nothing behind."""

    def logits_of(clean: Tensor, noisy: Tensor) -> Iterator[Tensor]:
        for start in range(0, len(noisy), BLOCK):
            tokens = torch.cat([clean[:start], noisy[start : start + BLOCK]])
            yield network.head(network.denoise(tokens, pack_layout([len(tokens)])))[start:]

    return logits_of


def cached_pass(network: nn.Module) -> Callable[[Tensor, Tensor], Iterator[Tensor]]:
    """Block after block: its noisy tokens see the cache, then its clean ones are stored in their place."""

    def logits_of(clean: Tensor, noisy: Tensor) -> Iterator[Tensor]:
        view = CacheView(network.new_cache(1, len(noisy)), torch.tensor([0]))
        for start in range(0, len(noisy), BLOCK):
            block = slice(start, start + BLOCK)
            layout = pack_layout([len(noisy[block])])
            layout = replace(layout, position_ids=layout.position_ids + start)
            yield network.head(network.denoise(noisy[block], layout, cache=view))
            if start < len(clean):
                network.denoise(clean[block], layout, cache=view)

    return logits_of


def replay_error(config: Config, network: nn.Module, seed: int) -> float:
    """Largest difference in nats between the log-probs that rollouts recorded and those of their [clean | noisy] replay."""
    random = Noise(seed).generator("block_masks/prompts")
    prompts = [random.integers(0, 13, 1 + row % (2 * BLOCK)) for row in range(config.rollouts)]
    settings = SamplerConfig(
        name="block", length=3 * BLOCK, steps=3 * BLOCK, block_length=BLOCK, early_stop="off", options={"threshold": 0.5}
    )
    return max(one_replay_error(network, rollout) for rollout in sample(network, prompts, settings, seed))


def one_replay_error(network: nn.Module, rollout: Rollout) -> float:
    """One row scores the n-th step of every block."""
    batch = batch_of([rollout.prompt_ids], [rollout.completion_ids])
    step = rollout.unmask_step % BLOCK
    rows = [NoisyRow(0, 0, step >= number, scored=step == number, clean_before=True) for number in np.unique(step)]
    recorded = np.concatenate([rollout.logp_model[row.scored] for row in rows])
    views = build_views(batch, rows, 1, network.profile)
    logits = read(network, views, views.layout)
    replayed = logits.log_softmax(-1).gather(1, views.score_target[:, None]).squeeze(1)
    return float(np.abs(replayed.numpy() - recorded).max())


def judge(results: dict[str, dict[str, float]]) -> Verdict:
    """The verdict on the differences of every family and seed."""
    values = {name: [one[name] for one in results.values()] for name in (*LOGITS, "replay", *WRONG)}
    checks = tuple(
        Check(f"one pass = {label}", max(values[name]) < EXACT, f"largest difference {max(values[name]):.1e}, bound {EXACT:.0e}")
        for name, label in (LOGITS | {"replay": "what rollouts recorded"}).items()
    )
    least = {label: min(values[name]) for name, label in WRONG.items()}
    detail = ", ".join(f"{label}: at least {value:.2g}" for label, value in least.items())
    control = Check("wrong masks change the logits", min(least.values()) > VISIBLE, f"{detail}; bound {VISIBLE:.0e}")
    labels = {**LOGITS, "replay": "replay, nats", **WRONG}
    numbers = {
        f"{family}, {label}": [one[name] for arm, one in results.items() if arm.startswith(f"{family}_")]
        for family in FAMILIES
        for name, label in labels.items()
    }
    return Verdict(checks, control, numbers, draw(values, labels))


@rc_context(STYLE)
def draw(values: dict[str, list[float]], labels: dict[str, str]) -> Figure:
    """Differences from the one pass, every family and seed a dot."""
    figure = Figure(figsize=(5.6, 2.8), layout="constrained", dpi=150)
    axes = figure.subplots()
    for place, name in enumerate(labels):
        color = COLORS[1] if name in WRONG else COLORS[0]
        axes.plot(np.maximum(values[name], 1e-9), [place] * len(values[name]), "o", color=color, markersize=4, alpha=0.7)
    axes.set_xscale("log")
    axes.axvline(EXACT, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.invert_yaxis()
    axes.set_xlabel("largest difference from one pass over [clean | noisy]")
    return figure
