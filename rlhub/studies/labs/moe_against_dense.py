"""LLaDA-MoE: a mixture of experts learns more than a dense network with as many active parameters, under an even load.

Source: LLaDA-MoE (arXiv 2509.24389): softmax routing without renormalisation, load-balance weight 0.01, z weight 0.001.
Experiment: facts, each a key of two random symbols with an answer of four, are learned by masked diffusion. Two networks of the LLaDA-MoE
    family: eight experts, two per token, and a single expert of twice the width, which is a dense SwiGLU. A token goes through as many
    parameters in both, the router aside; batches, masks and number of steps are the same. The loss is that on all facts.
Control: the mixture without the load-balance term. Its busiest expert must take a larger share.
Pass: in the 95 % interval over seeds the loss of the mixture is lower than that of the dense network, and the load of the busiest expert,
    over the mean load, lies below 2. Control: without the term that ratio is higher by at least 0.1 on every seed.
    The loss without the term, and loads by noise level, are reported and decide nothing.
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
from rlhub.algorithm.routing import LEVELS, auxiliary_loss, masked_share, router_metrics, router_sums
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.config.schema import RouterConfig
from rlhub.models import llada_moe
from rlhub.networks.experts import Routing, record_routing, routers
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import SFT, Tick, batch_of, train
from rlhub.studies.labs import Arm, Check, Verdict, above, not_above, run_arms
from rlhub.types import Batch, Views
from rlhub.views import elbo

KIND = "statistical"
SYMBOLS, KEY, ANSWER = 32, 2, 4
EXPERTS, ACTIVE = 8, 2
KINDS = {"balanced": "mixture of experts", "dense": "dense", "unbalanced": "control: no load-balance term"}
MAX_LOAD = 2.0  # of the busiest expert over the mean
GROWTH = 0.1  # of that without the load-balance term, at least


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 2
    facts: int = 400
    width: int = 48
    layers: int = 1
    expert_width: int = 16
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 5e-3
    load_balance: float = 0.01
    z: float = 0.001
    eval_every: int = 100


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    ticks = config.steps // config.eval_every
    arms = [Arm(f"{kind}_seed{seed}", learn, {"kind": kind, "seed": seed}, ticks) for seed in config.seeds for kind in KINDS]
    results = run_arms(arms, config, progress, out)
    return judge({kind: [results[f"{kind}_seed{seed}"] for seed in config.seeds] for kind in KINDS})


def learn(config: Config, tick: Tick, kind: str, seed: int) -> dict[str, Any]:
    """Train one network; loss on all facts and load of the busiest expert every `eval_every` steps, router metrics at the end."""
    network = build(config, kind, seed)
    keys, answers = facts(config, seed)
    weights = RouterConfig(load_balance=config.load_balance * (kind == "balanced"), z=config.z)
    curve: dict[str, Any] = {"step": [], "loss": [], "load": [], "routing": {}}

    def loss(step: int) -> Tensor:
        which = Noise(seed).generator("moe_against_dense/rows", uid=step).integers(0, config.facts, config.batch_size)
        views = noisy_views(network, batch_of(keys[which], answers[which], step), 1, seed)
        value, record, sums = forward(network, views)
        return value + (auxiliary_loss(record, sums, weights) if kind != "dense" else 0.0)

    def evaluate(step: int) -> None:
        if step % config.eval_every:
            return
        with torch.no_grad():
            value, _, sums = forward(network, noisy_views(network, batch_of(keys, answers), 2, seed))
        metrics = router_metrics(sums, routers(network)[0].rule)
        curve["step"].append(step)
        curve["loss"].append(value.item())
        curve["load"].append(metrics["router/load_max_over_mean"])
        curve["routing"] = metrics
        tick()

    train(network, loss, config.steps, replace(SFT, learning_rate=config.learning_rate), evaluate)
    return curve


def build(config: Config, kind: str, seed: int) -> nn.Module:
    """A random LLaDA-MoE; with a single expert it is dense, since that one's weight is softmax of one number."""
    experts, active = (1, 1) if kind == "dense" else (EXPERTS, ACTIVE)
    fields = llada_moe.Config(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        expert_intermediate_size=config.expert_width * ACTIVE // active,
        num_experts=experts,
        num_experts_per_tok=active,
        vocab_size=SYMBOLS + 2,
        mask_token_id=SYMBOLS,
        eos_token_id=SYMBOLS + 1,
        pad_token_id=SYMBOLS + 1,
    )
    return llada_moe.build(fields).initialize(torch.Generator().manual_seed(seed))


def facts(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys int [facts, KEY], all different, and their answers int [facts, ANSWER].

    Raises:
        ValueError: there are fewer keys than facts.
    """
    if config.facts > SYMBOLS**KEY:
        raise ValueError(f"there are {SYMBOLS**KEY} keys, got facts={config.facts}")
    random = Noise(seed).generator("moe_against_dense/facts")
    numbers = random.choice(SYMBOLS**KEY, config.facts, replace=False)
    return numbers[:, None] // SYMBOLS ** np.arange(KEY) % SYMBOLS, random.integers(0, SYMBOLS, (config.facts, ANSWER))


def noisy_views(network: nn.Module, batch: Batch, draws: int, seed: int) -> Views:
    return elbo.make(batch, None, elbo.Config(draws=draws), Noise(seed).stream("views"), 0, network.profile)


def forward(network: nn.Module, views: Views) -> tuple[Tensor, list[Routing], Tensor]:
    """Nats per answer token (minus the ELBO), what the routers did, and its sums by noise level."""
    (whole,) = micro_batches(views, int(views.layout.row_offsets[-1]))
    with record_routing(network) as record:
        log_prob = micro_batch_log_probs(network, views, whole)
    level = masked_share(views.tokens, views.layout.row_offsets, network.mask_id)
    loss = -(log_prob * views.score_weight).sum() / (views.num_rows * ANSWER)
    return loss, record, router_sums(record, level, views.target_rows)


def judge(results: dict[str, list[dict[str, Any]]]) -> Verdict:
    """The verdict on the curves of each kind of network and seed."""
    loss = {kind: [one["loss"][-1] for one in results[kind]] for kind in KINDS}
    load = {kind: [one["load"][-1] for one in results[kind]] for kind in ("balanced", "unbalanced")}
    checks = (
        above("loss of dense minus mixture", [ours - theirs for ours, theirs in zip(loss["dense"], loss["balanced"], strict=True)]),
        not_above("busiest expert over mean load", load["balanced"], MAX_LOAD),
    )
    growth = [without - having for having, without in zip(load["balanced"], load["unbalanced"], strict=True)]
    control = Check("no load-balance term", min(growth) > GROWTH, f"busiest expert over mean load grows by {min(growth):.2f} at least")
    numbers = {f"nats per token, {label}": loss[kind] for kind, label in KINDS.items()}
    numbers |= {f"busiest expert over mean load, {KINDS[kind]}": values for kind, values in load.items()}
    for quarter in range(1, LEVELS + 1):
        for name, label in (("load_max_over_mean", "busiest expert over mean load"), ("load_shift", "load shift")):
            key = f"router/level_{quarter}/{name}"
            if all(key in one["routing"] for one in results["balanced"]):
                numbers[f"{label}, masked share in quarter {quarter}, {KINDS['balanced']}"] = [
                    one["routing"][key] for one in results["balanced"]
                ]
    return Verdict(checks, control, numbers, draw(results))


@rc_context(STYLE)
def draw(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss on all facts and load of the busiest expert over training; mean over seeds with their range."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained", dpi=150)
    for axes, name, title in zip(
        figure.subplots(1, 2), ("loss", "load"), ("nats per token, all facts", "busiest expert over mean load"), strict=True
    ):
        for color, (kind, label) in zip(COLORS, KINDS.items(), strict=False):
            if (kind, name) == ("dense", "load"):
                continue
            values = np.array([one[name] for one in results[kind]])
            axes.plot(results[kind][0]["step"], values.mean(0), color=color, label=label)
            axes.fill_between(results[kind][0]["step"], values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("training step")
    figure.axes[0].legend()
    figure.axes[1].axhline(MAX_LOAD, color="black", linewidth=0.8, linestyle=":")
    return figure
