"""The variance laboratory: what noise sharing and each way to spend n draws do to the preference score, its loss and its gradient.

`measure` scores the same pairs many times under fresh noise. One pool of draws per design is evaluated once for the policy and twice for
the reference (the same noise, and independent noise), and every cell of the grid is made from these pools by averaging:

    levels      one mask on each level      1 x 1, 4 x 1, 8 x 1
    masks       eight masks on each level   1 x 4, 2 x 2, 1 x 8
    stratified, coupled, adaptive           eight forwards each

Two sequences of a pair, repeats, pools and the second reference pass have noise of their own. Variances are those of one pair under its
noise, averaged over the pairs, as in VRPO's table (arXiv 2505.19223); that of the gradient is the trace of its covariance.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhub.algorithm.batching import micro_batches, sequence_batch
from rlhub.algorithm.scoring import micro_batch_log_probs, token_log_probs
from rlhub.errors import UserError
from rlhub.likelihoods import sequence_draws
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.parts import load_part
from rlhub.studies.variance.estimates import (
    Exact,
    best_edges,
    cell_values,
    components,
    estimate_variance,
    logistic_loss,
    loss_excess,
    replicate_variance,
)
from rlhub.types import Batch, Views
from rlhub.views import adaptive, mask_level
from rlhub.views._rows import NoisyRow, build_views

BUDGET = 8  # forwards of a sequence and model in the largest cells, the paper's
BLOCK_ENTRIES = 1 << 16  # of the gradient that are looked at
MIN_REPEATS = 4
GRID = ((1, 1), (4, 1), (8, 1), (1, 4), (2, 2), (1, 8))  # n_t, n_y

Tick = Callable[[int], None]  # told how many rows were scored


@dataclass(frozen=True)
class VarianceCell:
    """An estimator: `n_t` levels with `n_y` masks each, made from the draws of a pool."""

    name: str
    pool: str
    n_t: int
    n_y: int


CELLS = [VarianceCell(f"{n_t} x {n_y}", "levels" if n_y == 1 else "masks", n_t, n_y) for n_t, n_y in GRID] + [
    VarianceCell("stratified", "stratified", 1, BUDGET),
    VarianceCell("coupled", "coupled", 1, BUDGET // 2),
    VarianceCell("adaptive", "adaptive", 1, BUDGET),
]


@dataclass(frozen=True)
class DrawPool:
    """A views part with its options, and the number of the pool, which keys its noise."""

    number: int
    views: str
    options: dict[str, Any]


def pools_of(form: str, edges: Sequence[float]) -> dict[str, DrawPool]:
    """The designs that are measured, around the l-form (`elbo`) or the t-form (`time_form`)."""
    return {
        "levels": DrawPool(0, form, {"draws": BUDGET}),
        "masks": DrawPool(1, form, {"draws": BUDGET, "masks_per_level": BUDGET}),
        "stratified": DrawPool(2, form, {"draws": BUDGET, "levels": "stratified"}),
        "coupled": DrawPool(3, "coupled", {"draws": BUDGET // 2}),
        "adaptive": DrawPool(4, "adaptive", {"draws": BUDGET, "edges": list(edges)}),
    }


@dataclass(frozen=True)
class Setting:
    """What stays the same over the policies: the pairs, the noise and the scale of the score.

    `batch` holds chosen and rejected sequences in turn: pair i is samples 2 i and 2 i + 1.
    """

    batch: Batch
    beta: float
    repeats: int
    seed: int = 0
    form: str = "elbo"
    max_tokens: int = 4096
    device: str = "cpu"

    @property
    def num_pairs(self) -> int:
        return len(self.batch) // 2

    def views(self, pool: DrawPool, purpose: str, profile: Profile, pairs: int | None = None) -> Iterator[Views]:
        """The views of each repeat, of the first `pairs` pairs."""
        part = load_part("views", pool.views)
        batch = self.batch if pairs is None else first_samples(self.batch, 2 * pairs)
        stream = Noise(self.seed).stream(purpose)
        for repeat in range(self.repeats):
            yield part.make(batch, None, part.Config(**pool.options), stream, pool.number * self.repeats + repeat, profile)

    @torch.no_grad()
    def draws(self, network: nn.Module, pool: DrawPool, purpose: str, tick: Tick) -> np.ndarray:
        """float64 [2 N, R, K], every draw of a pool."""
        parts = []
        for views in self.views(pool, purpose, network.profile):
            log_prob = token_log_probs(network, views, self.max_tokens, self.device)
            parts.append(sequence_draws(log_prob.double(), views).numpy())
            tick(views.num_rows)
        return np.stack(parts, 1)

    def levels(self, pool: DrawPool) -> np.ndarray:
        """float64 [2 N, R, K], the noise level of every draw of a pool of independent levels."""
        stream, count = Noise(self.seed).stream("views"), pool.options["draws"]
        shape = (len(self.batch), self.repeats, count)
        made = [
            mask_level(stream, self.batch, sample, draw, count, pool.number * self.repeats + repeat, "independent")
            for sample, repeat, draw in np.ndindex(shape)
        ]
        return np.array(made).reshape(shape)


@dataclass(frozen=True)
class Draws:
    """The draws [2 N, R, K] of each pool: of the policy, and of the reference under the same and under independent noise."""

    policy: dict[str, np.ndarray]
    shared: dict[str, np.ndarray]
    independent: dict[str, np.ndarray]

    def estimates(self, cell: VarianceCell, shared: bool) -> tuple[np.ndarray, np.ndarray]:
        """[2 N, replicates, groups] of the policy and of the reference."""
        reference = self.shared if shared else self.independent
        return tuple(cell_values(_grid(pools[cell.pool], cell.pool), cell.n_t, cell.n_y) for pools in (self.policy, reference))

    def scores(self, cell: VarianceCell, shared: bool, beta: float) -> np.ndarray:
        """[N, replicates, groups], the preference score of each pair."""
        policy, reference = self.estimates(cell, shared)
        gain = beta * (policy - reference)
        return gain[0::2] - gain[1::2]


class Laboratory:
    """Measures policies against one reference; the reference's draws are kept between policies.

    Args:
        edges: of the adaptive design; fitted to the draws of each policy when None.
        gradient_pairs: pairs whose gradient is measured, 0 for none.
        tick: called with the number of rows that were scored.
    """

    def __init__(
        self,
        setting: Setting,
        reference: nn.Module,
        *,
        edges: Sequence[float] | None = None,
        gradient_pairs: int = 0,
        tick: Tick = lambda rows: None,
    ) -> None:
        if setting.repeats < MIN_REPEATS:
            raise UserError(f"at least {MIN_REPEATS} repeats are needed, of which 2 x 2 makes two estimates; got {setting.repeats}")
        self.setting, self.reference, self.edges, self.tick = setting, reference, edges, tick
        self.gradient_pairs = min(gradient_pairs, setting.num_pairs)
        self._kept: dict[tuple[str, str], np.ndarray] = {}
        self._levels: np.ndarray | None = None

    def measure(self, policy: nn.Module, exact_scores: np.ndarray | None = None) -> dict[str, Any]:
        """Everything about one policy, as plain numbers; `docs/variance.md` names them.

        Args:
            exact_scores: float64 [N], where they are known; the mean of all draws stands for them otherwise.
        """
        setting, beta = self.setting, self.setting.beta
        pool = self._pools([])["levels"]
        first = setting.draws(policy, pool, "views", self.tick)
        edges = self.edges or self._fit(first - self._of_reference(pool, "views"), pool)
        pools = self._pools(edges)
        draws = Draws(
            {name: first if name == "levels" else setting.draws(policy, pool, "views", self.tick) for name, pool in pools.items()},
            {name: self._of_reference(pool, "views") for name, pool in pools.items()},
            {name: self._of_reference(pool, "reference_views") for name, pool in pools.items()},
        )
        gradients = self._gradient_variances(policy, pools, draws) if self.gradient_pairs else {}
        parts = {shared: score_components(draws, shared, beta) for shared in (True, False)}
        center = draws.scores(CELLS[0], True, beta).mean((1, 2)) if exact_scores is None else exact_scores
        rows = []
        for cell in CELLS:
            on_grid = cell.pool in ("levels", "masks")
            for shared in (True, False):
                score = draws.scores(cell, shared, beta)
                loss = logistic_loss(score)
                variance = replicate_variance(score)
                rows.append(
                    {
                        "cell": cell.name,
                        "shared": shared,
                        "forwards": cell.n_t * cell.n_y if on_grid else BUDGET,
                        "mean": float(score.mean()),
                        "standard_error": float(np.sqrt(variance.sum() / score.shape[1]) / setting.num_pairs),
                        "score_variance": float(variance.mean()),
                        "predicted": float(estimate_variance(*parts[shared], cell.n_t, cell.n_y)) if on_grid else None,
                        "loss_variance": float(replicate_variance(loss).mean()),
                        "loss_bias": float(loss_excess(score, center).mean()),
                        "gradient_variance": gradients.get((cell.name, shared)),
                    }
                )
        return {
            "mean_absolute_score": float(np.abs(center).mean()),
            "components": {name: dict(zip(("V_t", "V_y"), parts[name == "shared"], strict=True)) for name in ("shared", "unshared")},
            "edges": list(edges),
            "cells": rows,
        }

    def rows_per_policy(self, first: bool) -> int:
        """Rows that `measure` scores, a gradient counted as three: for a progress bar. The first policy pays for the reference."""
        per_pool = 2 * self.setting.num_pairs * BUDGET * self.setting.repeats
        gradients = 3 * 2 * self.gradient_pairs * BUDGET * self.setting.repeats
        refits = 0 if self.edges else 2
        return len(pools_of("elbo", [])) * (per_pool + gradients) + per_pool * (10 if first else refits)

    def _pools(self, edges: Sequence[float]) -> dict[str, DrawPool]:
        return pools_of(self.setting.form, edges)

    def _of_reference(self, pool: DrawPool, purpose: str) -> np.ndarray:
        key = (repr(pool), purpose)
        if key not in self._kept:
            self._kept[key] = self.setting.draws(self.reference, pool, purpose, self.tick)
        return self._kept[key]

    def _fit(self, difference: np.ndarray, pool: DrawPool) -> list[float]:
        """The edges of least variance for the shared difference; none, which are equal cells, where it is 0 as for the reference itself."""
        if not difference.any():
            return []
        if self._levels is None:
            self._levels = self.setting.levels(pool)
        flat = len(difference), -1
        return best_edges(difference.reshape(flat), self._levels.reshape(flat), BUDGET)

    def _gradient_variances(self, policy: nn.Module, pools: dict[str, DrawPool], draws: Draws) -> dict[tuple[str, bool], float]:
        """Trace of the covariance of a pair's loss gradient, mean over pairs, by cell and kind of noise."""
        totals: dict[tuple[str, bool], float] = {}
        for name, pool in pools.items():
            gradients = self._gradients(policy, pool)
            for cell in (cell for cell in CELLS if cell.pool == name):
                estimate = _over_draws(gradients, cell)  # [2 n, replicates, groups, F]
                for shared in (True, False):
                    score = draws.scores(cell, shared, self.setting.beta)[: self.gradient_pairs]
                    factor = (-self.setting.beta / (1 + np.exp(score))).astype(np.float32)[..., None]
                    variances = [
                        (scale * (chosen - rejected)).var(0, ddof=1).sum(-1).mean()
                        for scale, chosen, rejected in zip(factor, estimate[0::2], estimate[1::2], strict=True)
                    ]
                    totals[cell.name, shared] = float(np.mean(variances))
        return totals

    def _gradients(self, policy: nn.Module, pool: DrawPool) -> np.ndarray:
        """float32 [2 n, R, K, F], the gradient of every draw."""
        parts = []
        for views in self.setting.views(pool, "views", policy.profile, self.gradient_pairs):
            parts.append(draw_gradients(policy, views, self.setting.max_tokens, self.setting.device).numpy())
            self.tick(3 * views.num_rows)
        return np.stack(parts, 1)


def score_components(draws: Draws, shared: bool, beta: float) -> tuple[float, float]:
    """V_t and V_y of the score, mean over pairs: both sequences add up, and so do policy and reference under independent noise."""
    policy, reference = draws.policy["masks"], (draws.shared if shared else draws.independent)["masks"]
    parts = [components(policy - reference)] if shared else [components(policy), components(reference)]
    by_level, by_mask = (2 * beta**2 * float(sum(part[index].mean() for part in parts)) for index in range(2))
    return by_level, by_mask


def first_samples(batch: Batch, count: int) -> Batch:
    """The first `count` samples, which must end with a group."""
    return dataclasses.replace(
        batch,
        uid=batch.uid[:count],
        group=batch.group[:count],
        prompts=batch.prompts[:count],
        completions=batch.completions[:count],
        response_length=batch.response_length[:count],
        scored_length=batch.scored_length[:count],
        rewards=batch.rewards[: int(batch.group[count - 1]) + 1],
        member=batch.member[:count],
    )


def block_of(network: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the up projection of the first block, whose gradient stands for the whole one, as in the paper.

    Raises:
        UserError: the network has none.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] == "up_proj":
            return name, module
    raise UserError("this network has no linear layer up_proj, whose gradient is measured; use --gradient-pairs 0")


def draw_gradients(network: nn.Module, views: Views, max_tokens: int, device: str = "cpu") -> Tensor:
    """float32 [B, K, F], gradient of every draw of the ELBO with respect to the up projection of the first block.

    Of a linear layer the gradient of a row is the product of its output's gradient and its input, so one backward pass serves all rows of
    a micro-batch. Only the first outputs of the layer are kept, `BLOCK_ENTRIES` numbers in all.
    """
    _, layer = block_of(network)
    width = min(layer.out_features, max(1, BLOCK_ENTRIES // layer.in_features))
    total = torch.zeros(views.num_samples * views.num_draws, width * layer.in_features)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output)))
    try:
        for run in micro_batches(views, max_tokens):
            seen.clear()
            log_prob = micro_batch_log_probs(network, views, run, device)
            weight = views.score_weight[run.first_score : run.last_score].to(device)
            ((entered, left),) = seen
            (slope,) = torch.autograd.grad((log_prob * weight).sum(), left)
            entered, slope = entered.float().cpu(), slope[:, :width].float().cpu()
            offsets = (views.layout.row_offsets[run.first_row : run.last_row + 1] - views.layout.row_offsets[run.first_row]).tolist()
            for row, begin, end in zip(range(run.first_row, run.last_row), offsets[:-1], offsets[1:], strict=True):
                draw = int(views.sample[row]) * views.num_draws + int(views.draw[row])
                total[draw] += (slope[begin:end].T @ entered[begin:end]).flatten()
    finally:
        handle.remove()
    return total.view(views.num_samples, views.num_draws, -1)


def _grid(draws: np.ndarray, pool: str) -> np.ndarray:
    """Draws [2 N, R, K, ...] as [2 N, T, Y, ...]: those of `levels` are independent, the others belong together by repeat."""
    return draws.reshape(len(draws), -1, 1, *draws.shape[3:]) if pool == "levels" else draws


def _over_draws(gradients: np.ndarray, cell: VarianceCell) -> np.ndarray:
    """[2 n, replicates, groups, F] from gradients [2 n, R, K, F]."""
    grid = np.moveaxis(_grid(gradients, cell.pool), -1, 1)
    return np.moveaxis(cell_values(grid, cell.n_t, cell.n_y), 1, -1)


# ------------------------------------------------------------------------------------------------------------- enumeration


def exact_laws(network: nn.Module, setting: Setting) -> list[Exact]:
    """The law of a draw of each sample [2 N], from all its masks."""
    return [Exact(masks, sums) for masks, sums in (_all_sums(network, setting, sample) for sample in range(len(setting.batch)))]


def exact_cells(policy: list[Exact], reference: list[Exact], beta: float, edges: Sequence[float]) -> dict[tuple[str, bool], float]:
    """Variance of the score, mean over pairs, for each cell and kind of noise: no draws, all masks."""
    differences = [Exact(one.masks, one.sums - other.sums) for one, other in zip(policy, reference, strict=True)]
    cells = {}
    for cell in CELLS:
        for shared, laws in ((True, differences), (False, [*policy, *reference])):
            total = sum(_exact_variance(law, cell, edges) for law in laws)
            cells[cell.name, shared] = beta**2 * total * 2 / len(policy)
    return cells


def exact_scores(policy: list[Exact], reference: list[Exact], beta: float) -> np.ndarray:
    """float64 [N]."""
    gain = np.array([one.value - other.value for one, other in zip(policy, reference, strict=True)])
    return beta * (gain[0::2] - gain[1::2])


def _exact_variance(law: Exact, cell: VarianceCell, edges: Sequence[float]) -> float:
    if cell.pool == "stratified":
        return law.stratified_variance(BUDGET)
    if cell.pool == "coupled":
        return law.coupled_variance(BUDGET // 2)
    if cell.pool == "adaptive":
        return law.adaptive_variance(adaptive.Config(BUDGET, list(edges)).cells)
    return estimate_variance(*law.components(), cell.n_t, cell.n_y)


def _all_sums(network: nn.Module, setting: Setting, sample: int) -> tuple[np.ndarray, np.ndarray]:
    length = int(setting.batch.scored_length[sample])
    masks = np.array(list(itertools.islice(itertools.product((False, True), repeat=length), 1, None)))
    views = build_views(setting.batch, [NoisyRow(sample, number, mask) for number, mask in enumerate(masks)], len(masks), network.profile)
    log_prob = token_log_probs(network, views, setting.max_tokens, setting.device)
    return masks, sequence_draws(log_prob.double(), views)[sample].numpy()


def small_problem(seed: int, num_pairs: int = 8, vocabulary: int = 4, longest: int = 6) -> tuple[nn.Module, nn.Module, Batch]:
    """A random LLaDA as policy, a neighbour as reference, and pairs of random responses short enough to sum over all masks."""
    from rlhub.models.llada import Config, LLaDA

    config = Config(
        d_model=16,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=32,
        vocab_size=vocabulary + 2,
        mask_token_id=vocabulary,
        eos_token_id=vocabulary + 1,
        init_std=0.4,
    )
    generator = torch.Generator().manual_seed(seed)
    reference = LLaDA(config).initialize(generator).eval()
    policy = LLaDA(config).eval()
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    random = Noise(seed).generator("variance/problem")
    length = random.integers(2, longest + 1, 2 * num_pairs)
    length[:2] = longest
    prompts = [random.integers(0, vocabulary, 2) for _ in range(2 * num_pairs)]
    responses = [random.integers(0, vocabulary, size) for size in length]
    batch = sequence_batch(prompts, responses, range(2 * num_pairs), rewards=np.tile([1.0, 0.0], (num_pairs, 1)))
    return policy, reference, batch
