"""LLaDA Eq. 6: masking exactly l tokens with weight L / l keeps the mean of the 1 / t estimator and lowers its variance.

Source: LLaDA (arXiv 2502.09992), Eq. 3 against Eq. 6; the exact value is the mean over all orders of the chain rule (RADD, 2406.03736).
Experiment: random networks and responses of at most six tokens, for which every mask and every order can be summed. Means and variances
    of both estimators are exact; the views `elbo` and `time_form`, which training uses, are drawn many times and must have them.
    The variance of 1 / t has no useful estimate from draws, since its fourth moment grows like 1 / epsilon^2.
Control: tokens masked one by one with probability t, weighted L / l: it looks like Eq. 6, but l may be 0 and the mean is L / (L + 1) of
    the true one. The test of the mean must reject it.
Pass: the two exact means and the mean over orders agree to 1e-6 nats; each views part has its exact mean (root mean square of z over
    the responses of a seed below 2); the drawn variance of Eq. 6 is the exact one to 10 %; Eq. 6 has the lower exact variance on every
    seed. The control's root mean square of z is above 3 on every seed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.integrate import quad
from scipy.special import beta
from torch import nn

from rlhub.algorithm.scoring import token_log_probs
from rlhub.likelihoods import sequence_draws
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.records.progress import RunProgress
from rlhub.reports.plots import COLORS, STYLE
from rlhub.studies.lab_training import Tick
from rlhub.studies.labs import Arm, Check, Verdict, run_arms
from rlhub.studies.variance.estimates import Exact
from rlhub.studies.variance.laboratory import small_problem
from rlhub.types import Batch, Views
from rlhub.views import elbo, time_form
from rlhub.views._rows import NoisyRow, build_views

KIND = "identity"
TOKENS_AT_ONCE = 4096
EPSILON = time_form.Config().epsilon


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])  # each a random network with its responses
    parallel: int = 2
    num_pairs: int = 4  # half the number of responses
    longest: int = 6  # tokens of a response
    draws: int = 4096  # of each estimator and response

    def __post_init__(self) -> None:
        if not 2 <= self.longest <= 8:
            raise ValueError(f"longest must be 2 to 8, since all masks are summed, got {self.longest}")


def run(config: Config, progress: RunProgress, out: Path) -> Verdict:
    arms = [Arm(f"seed{seed}", measure, {"seed": seed}, 3) for seed in config.seeds]
    return judge(list(run_arms(arms, config, progress, out).values()), config.draws)


def measure(config: Config, tick: Tick, seed: int) -> dict[str, Any]:
    """Exact and drawn moments of the estimators, a value for each response."""
    network, _, batch = small_problem(seed, config.num_pairs, longest=config.longest)
    tables = [all_log_probs(network, batch, sample) for sample in range(len(batch))]
    laws = [Exact(masks, log_prob.sum(1)) for masks, log_prob in tables]
    inverse_t = [time_form_moments(law) for law in laws]
    exact = {
        "elbo": {"mean": [law.value for law in laws], "variance": [float(law.chance @ (law.draws - law.value) ** 2) for law in laws]},
        "time_form": {"mean": [mean for mean, _ in inverse_t], "variance": [variance for _, variance in inverse_t]},
        "time_form_limit": {"mean": [time_form_limit(law) for law in laws]},
        "orders": {"mean": [mean_over_orders(log_prob) for _, log_prob in tables]},
    }
    drawn = {}
    profile, stream = network.profile, Noise(seed).stream("views")
    for name, make in (
        ("elbo", lambda: elbo.make(batch, None, elbo.Config(config.draws), stream, 0, profile)),
        ("time_form", lambda: time_form.make(batch, None, time_form.Config(config.draws), stream, 0, profile)),
        ("control", lambda: counted_bernoulli(batch, config.draws, Noise(seed), profile)),
    ):
        views = make()
        values = sequence_draws(token_log_probs(network, views, TOKENS_AT_ONCE).double(), views).numpy()
        drawn[name] = {"mean": values.mean(1).tolist(), "variance": values.var(1, ddof=1).tolist()}
        tick()
    return {"exact": exact, "drawn": drawn}


def judge(results: list[dict[str, Any]], draws: int) -> Verdict:
    """The verdict on the results of all seeds."""
    exact, drawn = [one["exact"] for one in results], [one["drawn"] for one in results]
    gap = [np.abs(np.subtract(one[name]["mean"], one["elbo"]["mean"])).max() for one in exact for name in ("orders", "time_form_limit")]
    z = {
        name: [_z(sampled[name]["mean"], truth[name], draws) for truth, sampled in zip(exact, drawn, strict=True)]
        for name in ("elbo", "time_form")
    }
    z["control"] = [
        _z(sampled["control"]["mean"], {"mean": truth["elbo"]["mean"], "variance": sampled["control"]["variance"]}, draws)
        for truth, sampled in zip(exact, drawn, strict=True)
    ]
    variance = {name: [float(np.mean(one[name]["variance"])) for one in exact] for name in ("elbo", "time_form")}
    sampled = [float(np.mean(one["elbo"]["variance"])) for one in drawn]
    ratio = [high / low for high, low in zip(variance["time_form"], variance["elbo"], strict=True)]
    error = max(abs(one / true - 1) for one, true in zip(sampled, variance["elbo"], strict=True))
    worst = max(*z["elbo"], *z["time_form"])
    checks = (
        Check("1 / t, Eq. 6 and all orders have one exact mean", max(gap) < 1e-6, f"largest difference {max(gap):.1e} nats"),
        Check("the views have this mean", worst < 2, f"root mean square of z at most {worst:.2f}"),
        Check("the views of Eq. 6 have their exact variance", error < 0.1, f"largest relative error {error:.1%}"),
        Check("Eq. 6 has the lower variance", min(ratio) > 1, f"1 / t over Eq. 6: {min(ratio):.2f} to {max(ratio):.2f}"),
    )
    control = Check("L / l on independent masks", min(z["control"]) > 3, f"root mean square of z at least {min(z['control']):.1f}")
    numbers = {
        "variance of Eq. 6, nats^2": variance["elbo"],
        "variance of 1 / t, nats^2": variance["time_form"],
        "ratio": ratio,
        "root mean square of z of the control": z["control"],
    }
    return Verdict(checks, control, numbers, draw(exact))


def all_log_probs(network: nn.Module, batch: Batch, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [2^L - 1, L] of a response, and its log-probs float64 [2^L - 1, L] under each, 0 where visible.

    Row m - 1 masks the positions of which the bit is set in m.
    """
    length = int(batch.scored_length[sample])
    masks = (np.arange(1, 2**length)[:, None] >> np.arange(length) & 1).astype(bool)
    views = build_views(batch, [NoisyRow(sample, number, mask) for number, mask in enumerate(masks)], len(masks), network.profile)
    log_prob = np.zeros(masks.shape)
    log_prob[masks] = token_log_probs(network, views, TOKENS_AT_ONCE).double().numpy()
    return masks, log_prob


def mean_over_orders(log_prob: np.ndarray) -> float:
    """The chain rule averaged over all orders, from log-probs as `all_log_probs` has them: whatever is masked, each token of it is the
    next one equally often."""
    length = log_prob.shape[1]
    value = np.zeros(2**length)
    for mask in range(1, 2**length):
        value[mask] = np.mean([log_prob[mask - 1, i] + value[mask & ~(1 << i)] for i in range(length) if mask >> i & 1])
    return float(value[-1])


def time_form_limit(law: Exact) -> float:
    """Exact mean of the 1 / t estimator over t in (0, 1)."""
    size = law.masks.sum(1)
    return float(beta(size, law.length - size + 1) @ law.sums)


def time_form_moments(law: Exact) -> tuple[float, float]:
    """Exact mean and variance of the 1 / t estimator over t in (epsilon, 1)."""

    def moment(power: int) -> float:
        def weight(size: int) -> float:
            return quad(lambda t: t ** (size - power) * (1 - t) ** (law.length - size), EPSILON, 1, limit=200)[0] / (1 - EPSILON)

        by_size = np.array([0.0, *(weight(size) for size in range(1, law.length + 1))])
        return float(by_size[law.masks.sum(1)] @ law.sums**power)

    return moment(1), moment(2) - moment(1) ** 2


def counted_bernoulli(batch: Batch, draws: int, noise: Noise, profile: Profile) -> Views:
    """The control's views: t ~ U(0, 1), each token masked with probability t, weight L / l."""
    generator, rows = noise.generator("control"), []
    for sample, draw_number in itertools.product(range(len(batch)), range(draws)):
        length = int(batch.scored_length[sample])
        masked = generator.random(length) < generator.random()
        if masked.any():
            rows.append(NoisyRow(sample, draw_number, masked, length / masked.sum()))
    return build_views(batch, rows, draws, profile)


@rc_context(STYLE)
def draw(exact: list[dict[str, Any]]) -> Figure:
    """The variance of each response under both estimators."""
    figure = Figure(figsize=(4.2, 3.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for index, one in enumerate(exact):
        axes.loglog(one["elbo"]["variance"], one["time_form"]["variance"], "o", markersize=4, color=COLORS[index % len(COLORS)])
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.set_xlabel("variance of Eq. 6, nats$^2$")
    axes.set_ylabel("variance of 1 / t, nats$^2$")
    axes.set_title("Every response lies above the line")
    return figure


def _z(means: list[float], truth: dict[str, list[float]], draws: int) -> float:
    """Root mean square over responses of the error in standard errors."""
    z = np.subtract(means, truth["mean"]) / np.sqrt(np.array(truth["variance"]) / draws)
    return float(np.sqrt((z**2).mean()))
