"""Variance of ELBO scores against enumeration of all masks, draws through the real views."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rlhub.checkpoints.sealed import write_manifest
from rlhub.checkpoints.weights import save_network
from rlhub.commands.main import main
from rlhub.models.llada import Config, LLaDA
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.oracle import forward
from rlhub.studies.variance.estimates import Exact, best_edges, cell_values, components, replicate_variance
from rlhub.studies.variance.laboratory import (
    CELLS,
    Draws,
    Laboratory,
    Setting,
    block_of,
    draw_gradients,
    exact_cells,
    exact_laws,
    exact_scores,
    pools_of,
    small_problem,
)
from rlhub.studies.variance.measure import trajectory
from rlhub.tasks._vocabulary import word_level
from rlhub.types import Batch
from rlhub.views import adaptive, coupled, elbo, time_form

BETA = 0.2
EDGES = [0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0]
PROFILE = Profile(mask_id=1, eos_id=2, stop_ids=(2,), pad_id=2, lora_targets="")
CELLS_OF = list(itertools.pairwise(EDGES))


def law(length: int, seed: int = 0) -> Exact:
    """A random table: log-probs depend on the whole mask."""
    masks = np.array(list(itertools.islice(itertools.product((False, True), repeat=length), 1, None)))
    sums = -np.random.default_rng(seed).exponential(1.0, masks.shape)
    return Exact(masks, (sums * masks).sum(1) * (1 + masks.mean(1)))


def one_batch(length: int, samples: int) -> Batch:
    lengths = np.full(samples, length)
    return Batch(
        uid=np.arange(samples, dtype=np.uint64),
        group=np.arange(samples),
        prompts=[np.zeros(1, dtype=np.int32)] * samples,
        completions=[np.zeros(length, dtype=np.int32)] * samples,
        response_length=lengths,
        scored_length=lengths,
        rewards=np.ones((samples, 1)),
        member=np.zeros(samples, dtype=np.int64),
    )


def estimates(module, exact: Exact, samples: int, **options) -> np.ndarray:
    """float64 [samples] from the views' own masks and weights, with the table's sums in place of a model's."""
    views = module.make(one_batch(exact.length, samples), None, module.Config(**options), Noise(11).stream("views"), 0, PROFILE)
    code = 2 ** torch.arange(exact.length - 1, -1, -1)
    row_mask = torch.zeros(views.num_rows, dtype=torch.int64).index_add(0, views.score_row, code[views.score_token])
    weight = torch.zeros(views.num_rows, dtype=torch.float64).index_put((views.score_row,), views.score_weight.double())
    sums = torch.from_numpy(np.concatenate([[0.0], exact.sums]))[row_mask]
    total = torch.zeros(samples, dtype=torch.float64).index_add(0, views.sample, weight * sums)
    return (total / views.num_draws).numpy()


ESTIMATORS = {
    "8 x 1": (elbo, {"draws": 8}, lambda exact: _grid(exact, 8, 1)),
    "4 x 1": (elbo, {"draws": 4}, lambda exact: _grid(exact, 4, 1)),
    "2 x 2": (elbo, {"draws": 4, "masks_per_level": 2}, lambda exact: _grid(exact, 2, 2)),
    "1 x 4": (elbo, {"draws": 4, "masks_per_level": 4}, lambda exact: _grid(exact, 1, 4)),
    "stratified": (elbo, {"draws": 8, "levels": "stratified"}, lambda exact: exact.stratified_variance(8)),
    "coupled": (coupled, {"draws": 4}, lambda exact: exact.coupled_variance(4)),
    "adaptive": (adaptive, {"draws": 8, "edges": EDGES}, lambda exact: exact.adaptive_variance(CELLS_OF)),
}


def _grid(exact: Exact, n_t: int, n_y: int) -> float:
    by_level, by_mask = exact.components()
    return by_level / n_t + by_mask / (n_t * n_y)


@pytest.fixture(scope="module")
def sampled() -> dict[str, np.ndarray]:
    """2,500 estimates of each kind."""
    return {name: estimates(module, law(6), 2500, **options) for name, (module, options, _) in ESTIMATORS.items()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_way_to_spend_draws_is_unbiased_and_has_its_exact_variance(name, sampled):
    """Within 4 standard errors of the mean, and of the variance."""
    exact, values = law(6), sampled[name]
    assert abs(values.mean() - exact.value) < 4 * values.std() / math.sqrt(len(values))
    squares = (values - exact.value) ** 2
    assert abs(squares.mean() - ESTIMATORS[name][2](exact)) < 4 * squares.std() / math.sqrt(len(values))


def test_lemma_5_within_3_percent(sampled):
    """V_t / n_t + V_y / (n_t n_y) against what the four allocations show, on average."""
    ratios = [sampled[name].var(ddof=1) / ESTIMATORS[name][2](law(6)) for name in ("8 x 1", "4 x 1", "2 x 2", "1 x 4")]
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("edges", [[], EDGES, [0.0, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 1.0]])
def test_adaptive_cells_are_unbiased_by_enumeration(length, edges):
    """The sum over cells of width times the mean inside, from the pieces on which l is constant, is the ELBO whatever the edges."""
    exact = law(length)
    mean, _ = exact.by_level()
    total = 0.0
    for low, high in adaptive.Config(8, edges).cells:
        cuts = np.unique(np.clip(np.concatenate([[low, high], np.arange(length + 1) / length]), low, high))
        middle = (cuts[1:] + cuts[:-1]) / 2
        total += (np.diff(cuts) * mean[np.minimum((middle * length).astype(int), length - 1)]).sum()
    assert total == pytest.approx(exact.value, rel=1e-12)


def test_edges_of_least_variance():
    """Narrow cells where draws vary; on a table, from 20,000 draws, better than equal cells, which are better than independent levels."""
    random = np.random.default_rng(0)
    levels = random.random((20, 2000))
    edges = best_edges(np.where(levels < 0.5, 3.0, 1.0) * random.standard_normal(levels.shape), levels, 8)
    assert edges[0] == 0 and edges[-1] == 1 and sum(edge < 0.5 for edge in edges) == 6  # Neyman: three draws in four
    exact = law(6, seed=2)
    size = 1 + (levels[:1] * 6).astype(int)
    by_size = [exact.draws[exact.masks.sum(1) == count] for count in range(1, 7)]
    drawn = np.array([[random.choice(by_size[count - 1]) for count in row] for row in size])
    fitted = adaptive.Config(8, best_edges(drawn, levels[:1], 8)).cells
    assert exact.adaptive_variance(fitted) < exact.adaptive_variance(adaptive.Config(8).cells) < _grid(exact, 8, 1)
    with pytest.raises(ValueError, match="9 cells do not fit 8 bins"):
        best_edges(drawn, levels[:1], 9, bins=8)


def test_exact_value_is_the_average_over_orders():
    """The ELBO of Shapley weights: each mask of size l weighs 1 / (l binomial(L, l))."""
    exact = law(5)
    weights = [1 / (int(mask.sum()) * math.comb(5, int(mask.sum()))) for mask in exact.masks]
    assert exact.value == pytest.approx(float(np.dot(weights, exact.sums)))
    assert exact.chance.sum() == pytest.approx(1)
    second = float(exact.chance @ exact.draws**2 - exact.value**2)
    assert sum(exact.components()) == pytest.approx(second)


def test_one_mask_per_level_is_best_at_equal_cost():
    for seed in range(5):
        exact = law(6, seed)
        assert _grid(exact, 4, 1) < _grid(exact, 2, 2) < _grid(exact, 1, 4) < _grid(exact, 1, 1)


def test_components_of_a_known_law():
    """Levels of variance 4, masks of variance 9."""
    random = np.random.default_rng(0)
    draws = 2 * random.standard_normal((4000, 5, 1)) + 3 * random.standard_normal((4000, 5, 4))
    by_level, by_mask = components(draws)
    assert by_level.mean() == pytest.approx(4, rel=0.1) and by_mask.mean() == pytest.approx(9, rel=0.03)
    assert replicate_variance(cell_values(draws, 2, 2)).mean() == pytest.approx(4 / 2 + 9 / 4, rel=0.1)
    assert cell_values(np.arange(12.0).reshape(4, 3), 2, 2).tolist() == [[2.0], [8.0]]


@pytest.mark.parametrize("module", [elbo, time_form])
def test_masks_of_a_level_share_it_and_one_mask_per_level_changes_nothing(module):
    batch, stream = one_batch(40, 3), Noise(5).stream("views")
    plain = module.make(batch, None, module.Config(draws=6), stream, 1, PROFILE)
    same = module.make(batch, None, module.Config(draws=6, masks_per_level=1), stream, 1, PROFILE)
    assert torch.equal(plain.tokens, same.tokens) and torch.equal(plain.score_weight, same.score_weight)
    shared = module.make(batch, None, module.Config(draws=6, masks_per_level=3), stream, 1, PROFILE)
    first = torch.searchsorted(shared.score_row, torch.arange(shared.num_rows))
    weight = shared.score_weight[first].view(3, 2, 3)
    assert (weight == weight[..., :1]).all() and (weight[:, 0, 0] != weight[:, 1, 0]).all()
    rows = shared.tokens.view(18, 41)
    assert len({tuple(row.tolist()) for row in rows}) == 18


# ---------------------------------------------------------------------------------------------------- scores of real networks


@pytest.fixture(scope="module")
def problem():
    return small_problem(seed=0, num_pairs=4)


def test_enumerated_sums_are_those_of_the_oracle(problem):
    policy, _, batch = problem
    setting = Setting(batch, BETA, repeats=2)
    exact = exact_laws(policy, setting)[0]
    completion, prompt = batch.completions[0], batch.prompts[0]
    for mask, value in list(zip(exact.masks, exact.sums, strict=True))[::9]:
        tokens = np.concatenate([prompt, np.where(mask, policy.mask_id, completion)])
        log_prob = forward(policy, tokens)[len(prompt) :].double().log_softmax(-1)
        assert value == pytest.approx(log_prob[np.flatnonzero(mask), completion[mask]].sum().item(), abs=1e-4)


def test_measured_variances_agree_with_prediction_and_enumeration(problem):
    """Mean within 4 standard errors, variances on average within 10 % of exact, loss bias within its bound."""
    policy, reference, batch = problem
    setting = Setting(batch, BETA, repeats=40)
    laws = exact_laws(policy, setting), exact_laws(reference, setting)
    scores = exact_scores(*laws, BETA)
    measured = Laboratory(setting, reference, edges=EDGES).measure(policy, scores)
    exact = exact_cells(*laws, BETA, EDGES)
    ratios = []
    for row in measured["cells"]:
        truth = exact[row["cell"], row["shared"]]
        assert abs(row["mean"] - scores.mean()) < 4 * row["standard_error"]
        ratios.append([row["score_variance"] / truth, (row["predicted"] or truth) / truth])
        assert 0 < row["loss_bias"] < 1.2 * truth / 8
        assert row["loss_variance"] < row["score_variance"]
    assert np.mean(ratios, 0).tolist() == pytest.approx([1, 1], abs=0.1)
    totals = {row["cell"]: row["score_variance"] for row in measured["cells"] if row["shared"]}
    assert totals["8 x 1"] < totals["1 x 8"] and totals["4 x 1"] < totals["2 x 2"] < totals["1 x 4"] < totals["1 x 1"]


@pytest.mark.parametrize("draws", [1, 2])
def test_bias_of_the_loss_is_between_0_and_an_eighth_of_the_variance(draws):
    """By summing over every pair of masks of both sides (L = 3), and over every two of them for two draws."""
    chosen, rejected = law(3, seed=1), law(3, seed=2)

    def distribution(exact: Exact) -> tuple[np.ndarray, np.ndarray]:
        values, chances = exact.draws, exact.chance
        for _ in range(draws - 1):
            values, chances = np.add.outer(values, exact.draws).ravel(), np.outer(chances, exact.chance).ravel()
        return values / draws, chances

    (up, up_chance), (down, down_chance) = distribution(chosen), distribution(rejected)
    score, chance = BETA * np.subtract.outer(up, down), np.outer(up_chance, down_chance)
    mean = (chance * score).sum()
    variance = (chance * (score - mean) ** 2).sum()
    loss = (chance * np.log1p(np.exp(-score))).sum()
    assert mean == pytest.approx(BETA * (chosen.value - rejected.value))
    assert variance == pytest.approx(BETA**2 * (_grid(chosen, draws, 1) + _grid(rejected, draws, 1)))
    assert 0 < loss - math.log1p(math.exp(-mean)) < variance / 8


def test_the_reference_itself_scores_0_under_shared_noise_bit_for_bit(problem):
    _, reference, batch = problem
    measured = Laboratory(Setting(batch, BETA, repeats=4), reference, gradient_pairs=2).measure(reference)
    for row in measured["cells"]:
        if row["shared"]:
            assert row["mean"] == row["score_variance"] == row["loss_variance"] == 0.0
            assert row["gradient_variance"] > 0
        else:
            assert row["score_variance"] > 0
    setting, pool = Setting(batch, BETA, repeats=4), pools_of("elbo", [])["levels"]
    shared, apart = (setting.draws(reference, pool, purpose, lambda rows: None) for purpose in ("views", "reference_views"))
    draws = Draws({"levels": shared}, {"levels": shared}, {"levels": apart})
    score = draws.scores(CELLS[0], True, BETA)
    assert (score == 0).all() and (np.logaddexp(0, -score) == math.log(2)).all()
    assert (draws.scores(CELLS[0], False, BETA) != 0).mean() > 0.9


def test_gradient_of_a_draw_is_autograd_of_its_elbo(problem):
    policy, _, batch = problem
    views = next(Setting(batch, BETA, repeats=2).views(pools_of("elbo", [])["coupled"], "views", policy.profile))
    gradients = draw_gradients(policy, views, max_tokens=50)
    _, layer = block_of(policy)
    log_prob = policy.head(policy.denoise(views.tokens, views.layout), views.target_rows).log_softmax(-1)
    picked = log_prob.gather(1, views.score_target[:, None])[:, 0] * views.score_weight
    for sample, draw in ((0, 0), (3, 2), (7, 3)):
        one = picked[(views.score_sample == sample) & (views.score_draw == draw)].sum()
        (expected,) = torch.autograd.grad(one, layer.weight, retain_graph=True)
        torch.testing.assert_close(gradients[sample, draw], expected.flatten(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ command


def test_the_command_writes_what_it_measures(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("algorithm:\n  objective: {name: dpo, beta: 0.5}\n  reference: frozen\n  advantage: {name: best_worst}\n")
    arguments = ["bench", "variance", str(recipe), "--repeats", "4", "--num-pairs", "3", "--gradient-pairs", "2", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (
        made["beta"] == 0.5
        and made["pairs"] == 3
        and {row["cell"] for row in made["policies"][0]["cells"]} == {cell.name for cell in CELLS}
    )
    assert all(row["exact"] > 0 and row["gradient_variance"] > 0 for row in made["policies"][0]["cells"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"variance.json", "variance.md", "variance.png", "adaptive.yaml"}
    again = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "again")])
    assert json.loads(again.stdout)["policies"] == made["policies"]
    extended = tmp_path / "extended.yaml"
    extended.write_text(f"extends: [{recipe.name}, out/adaptive.yaml]\n")
    from rlhub.config.recipe import load_recipe

    assert load_recipe(extended).algorithm.views["name"] == "adaptive"


def test_gain_of_sharing_along_a_run():
    """At the first score of 0.02 or more; where it falls below 5, between policies in the logarithms."""
    policies = [
        {"policy": str(score), "mean_absolute_score": score, "cells": [{"cell": "8 x 1", "shared": True, "factor": factor}]}
        for score, factor in ((0.0, None), (0.01, 500.0), (0.04, 50.0), (0.4, 0.5))
    ]
    found = trajectory(policies)
    assert found["score"] == 0.04 and found["factor"] == 50.0
    assert found["below_5"] == pytest.approx(math.sqrt(0.04 * 0.4))
    assert trajectory(policies[:3])["below_5"] is None
    assert trajectory(policies[:2])["factor"] is None


def test_a_run_is_measured_against_what_its_last_phase_began_with(tmp_path):
    """Checkpoints of a run on text pairs; one unusable row is said and left out."""
    tokenizer = word_level(["0", "1", "2", "3"])
    config = Config(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=32, vocab_size=8, mask_token_id=4, eos_token_id=5, init_std=0.4)
    for number, name in enumerate(["sft_step_00004", "pairs_step_00001", "pairs_step_00002"]):
        network = LLaDA(config).initialize(torch.Generator().manual_seed(0))
        with torch.no_grad():
            network.model["transformer"]["ff_out"].weight *= 1 + 0.1 * number
        save_network(network, tmp_path / "run" / "checkpoints" / name / "hf", tokenizer)
        write_manifest(tmp_path / "run" / "checkpoints" / name, {"phase": "x", "step": 0, "wall_s": 0})
    pairs = [("0 1", "1 2 3", "3 2"), ("1", "0 0 0", "0 0 0"), ("2 2", "3", "1 1 1 1"), ("3", "2 1", "0 1 2")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) + "\n" for pair in pairs))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("about: x\n")
    arguments = ["bench", "variance", str(recipe), "--checkpoint", str(tmp_path / "run"), "--pairs", str(file), "--repeats", "4"]
    result = CliRunner().invoke(main, [*arguments, "--gradient-pairs", "0", "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["reference"] == "sft_step_00004" and made["pairs"] == 3 and "row 2" in result.stderr
    assert [policy["policy"] for policy in made["policies"]] == ["pairs_step_00001", "pairs_step_00002"]
    near, far = (policy["mean_absolute_score"] for policy in made["policies"])
    assert 0 < near < far
    factors = [next(row["factor"] for row in policy["cells"] if row["cell"] == "8 x 1") for policy in made["policies"]]
    assert factors[0] > factors[1] > 1 and made["trajectory"]["factor"] in factors


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--pairs", "missing.jsonl"], "add --checkpoint"), (["--checkpoint", "nowhere"], "--reference")],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, extra, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("about: x\n")
    result = CliRunner().invoke(main, ["bench", "variance", str(recipe), *extra])
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1
