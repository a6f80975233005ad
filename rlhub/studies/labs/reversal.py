"""LLaDA: a masked diffusion model that read "a b" can answer what comes before b; the same network trained causally cannot.

Source: LLaDA (arXiv 2502.09992), section 3.3, the reversal poems; SMDM (arXiv 2410.18514), the reverse curse.
Experiment: couplets of two random lines of three tokens. All of them are read as raw text "a b". For half of them two questions are
    taught, NEXT (a, then b) and PREV (b, then a); both are asked about the other half, and the answer must be exact. The network, data
    and number of steps are the same for masked diffusion and for causal next-token training.
Control: the causal network. It must answer NEXT, so that it has read the text, and must stay near 0 on PREV.
Pass: at the last step the masked network's PREV accuracy lies above twice the chance of guessing a known line and above the causal
    network's by at least 0.1, in the 95 % interval over seeds. Control: the causal network has NEXT above 0.8 and PREV below 0.1 on
    every seed. Parity of PREV and NEXT is not claimed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlhub.config.schema import OptimizerConfig, SamplerConfig
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import Tick, batch_of, causal_layout, masked_loss, sample, tiny_llada, train
from rlhub.studies.labs import Arm, Check, Verdict, above, run_arms
from rlhub.types import Batch
from rlhub.views import elbo

KIND = "statistical"
LINE = 3  # tokens of a line
TEXT, NEXT, PREV = range(3)  # the first token of a row says what it is; the tokens of lines follow these three
QUESTIONS = {"next": NEXT, "prev": PREV}


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    couplets: int = 60  # half of them are taught
    tokens: int = 32  # of the lines' vocabulary
    width: int = 96
    layers: int = 3
    steps: int = 2000
    batch_size: int = 64  # rows, half of them raw text
    learning_rate: float = 2e-3
    eval_every: int = 100


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    arms = [
        Arm(f"{kind}_seed{seed}", learn, {"kind": kind, "seed": seed}, config.steps // config.eval_every)
        for seed in config.seeds
        for kind in ("masked", "causal")
    ]
    results = run_arms(arms, config, progress, out)
    curves = {kind: [results[f"{kind}_seed{seed}"] for seed in config.seeds] for kind in ("masked", "causal")}
    return judge(curves, chance=2 / config.couplets)


def judge(curves: dict[str, list[dict[str, Any]]], chance: float) -> Verdict:
    """The verdict on the accuracies of each kind of network and seed."""
    last = {f"{kind} {name}": [one[name][-1] for one in curves[kind]] for kind in curves for name in QUESTIONS}
    gap = [ours - theirs for ours, theirs in zip(last["masked prev"], last["causal prev"], strict=True)]
    checks = (
        above("masked PREV above twice chance", last["masked prev"], 2 * chance),
        above("masked PREV above causal PREV by 0.1", gap, 0.1),
    )
    control = Check(
        "causal network: NEXT but not PREV",
        min(last["causal next"]) > 0.8 and max(last["causal prev"]) < 0.1,
        f"NEXT {min(last['causal next']):.2f} at least, PREV {max(last['causal prev']):.2f} at most",
    )
    ratio = [prev / max(following, 1e-9) for prev, following in zip(last["masked prev"], last["masked next"], strict=True)]
    return Verdict(checks, control, last | {"masked PREV / NEXT": ratio}, draw(curves, chance))


def learn(config: Config, tick: Tick, kind: str, seed: int) -> dict[str, Any]:
    """Train one network and ask it about the couplets that were not taught, every `eval_every` steps."""
    first, second = couplets(config, seed)
    network = tiny_llada(config.tokens + 3, seed, width=config.width, layers=config.layers)
    rows = partial(draw_rows, config, first, second, Noise(seed))
    if kind == "masked":
        loss = masked_loss(network, elbo, elbo.Config(draws=1), lambda step: split_rows(*rows(step), step), seed)
        answer = answer_masked
    else:
        loss, answer = partial(causal_loss, network, rows), answer_causal
    asked = slice(config.couplets // 2, None)
    curve: dict[str, Any] = {"step": [], "next": [], "prev": []}

    def evaluate(step: int) -> None:
        if step % config.eval_every:
            return
        curve["step"].append(step)
        for name, given, expected in (("next", first, second), ("prev", second, first)):
            prompts = question(QUESTIONS[name], given[asked])
            curve[name].append(float((answer(network.eval(), prompts) == expected[asked]).all(1).mean()))
        network.train()
        tick()

    optimizer = OptimizerConfig(
        learning_rate=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=100, schedule="cosine", final_fraction=0.1
    )
    train(network, loss, config.steps, optimizer, evaluate)
    return curve


def couplets(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second lines, int [couplets, 3] each, all of them different; the first half is taught."""
    numbers = Noise(seed).generator("reversal/couplets").choice(config.tokens**LINE, 2 * config.couplets, replace=False)
    lines = 3 + numbers[:, None] // config.tokens ** np.arange(LINE) % config.tokens
    return lines[: config.couplets], lines[config.couplets :]


def question(kind: int, given: np.ndarray) -> np.ndarray:
    """int [N, 4], a row's kind and its first line."""
    return np.concatenate([np.full((len(given), 1), kind), given], 1)


def draw_rows(config: Config, first: np.ndarray, second: np.ndarray, noise: Noise, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int [B, 7] of one step, and how many tokens of each are given (the kind alone in raw text)."""
    random = noise.generator("reversal/rows", uid=step)
    raw, taught = config.batch_size // 2, config.couplets // 2
    kind = np.concatenate([np.full(raw, TEXT), random.choice([NEXT, PREV], config.batch_size - raw)])
    which = random.integers(0, np.where(kind == TEXT, config.couplets, taught))
    backwards = (kind == PREV)[:, None]
    rows = np.concatenate(
        [kind[:, None], np.where(backwards, second[which], first[which]), np.where(backwards, first[which], second[which])], 1
    )
    return rows, np.where(kind == TEXT, 1, 1 + LINE)


def split_rows(rows: np.ndarray, given: np.ndarray, step: int) -> Batch:
    return batch_of(
        [row[:count] for row, count in zip(rows, given, strict=True)],
        [row[count:] for row, count in zip(rows, given, strict=True)],
        step,
    )


def causal_logits(network: nn.Module, rows: np.ndarray) -> Tensor:
    """[B, T, V]; position i predicts token i + 1."""
    count, length = rows.shape
    hidden = network.denoise(torch.from_numpy(rows.astype(np.int32)).flatten(), causal_layout(count, length))
    return network.head(hidden, torch.arange(count * length)).view(count, length, -1)


def causal_loss(network: nn.Module, rows_of: Any, step: int) -> Tensor:
    """Cross-entropy of the same tokens that the masked network learns, from left to right."""
    rows, given = rows_of(step)
    logits = causal_logits(network, rows[:, :-1])
    learned = torch.from_numpy(np.arange(1, rows.shape[1]) >= given[:, None])
    return F.cross_entropy(logits[learned], torch.from_numpy(rows[:, 1:])[learned])


def answer_masked(network: nn.Module, prompts: np.ndarray) -> np.ndarray:
    """int [N, 3], the surest token first."""
    settings = SamplerConfig(name="low_confidence", length=LINE, steps=LINE, block_length=LINE, temperature=0.0, early_stop="off")
    return np.stack([rollout.completion_ids for rollout in sample(network, list(prompts), settings, seed=0)])


@torch.no_grad()
def answer_causal(network: nn.Module, prompts: np.ndarray) -> np.ndarray:
    """int [N, 3], from left to right."""
    for _ in range(LINE):
        best = causal_logits(network, prompts)[:, -1].argmax(-1).numpy()
        prompts = np.concatenate([prompts, best[:, None]], 1)
    return prompts[:, -LINE:]


@rc_context(STYLE)
def draw(curves: dict[str, list[dict[str, Any]]], chance: float) -> Figure:
    """Accuracy on couplets that were only read, over training; mean over seeds with their range."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained", dpi=150)
    for axes, name, title in zip(
        figure.subplots(1, 2, sharey=True), QUESTIONS, ("what comes after a?", "what comes before b?"), strict=True
    ):
        for color, (kind, seeds) in zip(COLORS, curves.items(), strict=False):
            values = np.array([one[name] for one in seeds])
            axes.plot(seeds[0]["step"], values.mean(0), color=color, label=f"{kind} ({mean(values[:, -1]):.2f} at the end)")
            axes.fill_between(seeds[0]["step"], values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
        axes.axhline(chance, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.legend(loc="center right")
    figure.axes[0].set_ylabel("exact answers")
    return figure
