"""The experiments of `rlhub lab`: the framework, each of them at its smallest, and verdicts that come out either way."""

import inspect
import itertools
import json
import math
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rewards import digit_class
from rlhub.commands.main import main
from rlhub.curves import MASK_RATIO
from rlhub.errors import RecipeError
from rlhub.noise import Noise
from rlhub.parts import load_part, part_names
from rlhub.records.metrics import student_interval
from rlhub.records.progress import RunProgress
from rlhub.studies.lab import run_lab
from rlhub.studies.lab_training import batch_of, tiny_llada
from rlhub.studies.labs import (
    Arm,
    Check,
    Verdict,
    above,
    digits,
    digits_rl,
    eq6_variance,
    guidance_without_pairs,
    nfe_cache,
    not_above,
    reversal,
    run_arms,
    vrpo_sharing,
)
from rlhub.studies.variance.estimates import Exact
from rlhub.tasks import digits as digits_data
from rlhub.tasks import load_task, task_tokenizer
from rlhub.views import mask_ratio

YES, NO, OPEN = (Check("condition", passed, "") for passed in (True, False, None))
RL_OVERRIDES = [
    *("sft.steps=1", "sft.batch_size=2", "run.steps=1", "task.eval.test_size=2", "task.eval_rows=2", "algorithm.prompts_per_step=2"),
    *("algorithm.completions_per_prompt=2", "sampler.steps=2", "model.config.d_model=16", "model.config.n_layers=1"),
]
SMALLEST = {
    "eq6_variance": ["seeds=[0]", "num_pairs=2", "longest=3", "draws=64"],
    "vrpo_sharing": ["seeds=[0]", "width=16", "layers=1", "reference_steps=20", "policy_steps=20", "num_pairs=2", "repeats=4"],
    "reversal": ["seeds=[0]", "width=16", "layers=1", "couplets=8", "steps=4", "eval_every=2", "batch_size=8"],
    "nfe_cache": ["seeds=[0]", "length=4", "rollouts=8", "compared=4"],
    "guidance_without_pairs": ["seeds=[0]", "width=16", "layers=1", "steps=50", "batch_size=8", "problems=16"],
    "digits_rl": ["seeds=[0]", "images=10", f"overrides={RL_OVERRIDES}"],
    "digits": ["seeds=[0]", "width=16", "layers=1", "steps=25", "batch_size=4", "sampling_steps=[16]", "images=24"],
}


@dataclass(frozen=True)
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel: int = 1
    factor: int = 2


def multiply(config: Config, tick, seed: int, log: str) -> dict:
    tick()
    if config.factor * seed > 100:
        raise ValueError(f"{seed} is too much")
    with Path(log).open("a") as handle:
        handle.write(f"{seed} {multiprocessing.parent_process() is not None}\n")
    return {"product": config.factor * seed}


def call(config: Config, tmp_path: Path) -> list[int]:
    arms = [Arm(f"seed{seed}", multiply, {"seed": seed, "log": str(tmp_path / "log")}, 1) for seed in config.seeds]
    results = run_arms(arms, config, RunProgress(enabled=False), tmp_path / "out")
    return [results[f"seed{seed}"]["product"] for seed in config.seeds]


# ------------------------------------------------------------------------------------------------------------- framework


@pytest.mark.parametrize(
    ("checks", "control", "outcome"),
    [
        ([YES, YES], YES, "holds"),
        ([YES, NO], YES, "does not hold"),
        ([OPEN, NO], YES, "does not hold"),
        ([YES, OPEN], YES, "undecided"),
        ([YES, YES], NO, "undecided"),
        ([YES, YES], OPEN, "undecided"),
    ],
)
def test_a_claim_holds_only_with_all_its_conditions_and_a_control_that_failed(checks, control, outcome):
    assert Verdict(tuple(checks), control, {}).outcome == outcome


def test_intervals_decide_only_when_they_leave_the_bound_out():
    low, high = student_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert [above("", values).passed for values in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [-1.0, 1.0, 0.1], [5.0])] == [
        True,
        False,
        None,
        None,
    ]
    assert [not_above("", values, 0.5).passed for values in ([0.1, 0.1], [0.9, 0.9], [0.0, 1.0])] == [True, False, None]


def test_finished_arms_are_kept_and_other_settings_are_other_arms(tmp_path: Path):
    assert call(Config(), tmp_path) == [0, 2, 4]
    assert call(Config(seeds=[1, 3]), tmp_path) == [2, 6]
    assert call(Config(seeds=[1], factor=5), tmp_path) == [5]
    assert (tmp_path / "log").read_text().split()[::2] == ["0", "1", "2", "3", "1"]


def test_arms_run_in_processes_and_the_error_of_one_loses_no_other(tmp_path: Path):
    with pytest.raises(ValueError, match="99 is too much"):
        call(Config(seeds=[3, 4, 99], parallel=2), tmp_path)
    assert set((tmp_path / "log").read_text().split()[1::2]) == {"True"}
    assert call(Config(seeds=[3, 4], parallel=2), tmp_path) == [6, 8]


def test_the_command_lists_experiments_and_explains_mistakes():
    listed = CliRunner().invoke(main, ["lab"]).output
    assert all(name in listed for name in SMALLEST)
    with pytest.raises(RecipeError, match="did you mean reversal"):
        run_lab("reversals")
    with pytest.raises(RecipeError, match="did you mean steps"):
        run_lab("reversal", ["step=3"])
    with pytest.raises(RecipeError, match="seeds: none are left"):
        run_lab("reversal", ["seeds=[]"])


@pytest.mark.parametrize("name", part_names("labs"))
def test_every_experiment_says_what_it_tests_before_it_does(name: str):
    module = load_part("labs", name)
    text = inspect.getdoc(module)
    assert all(f"\n{part}:" in text for part in ("Source", "Experiment", "Control", "Pass"))
    assert module.KIND in ("identity", "statistical")
    assert (Path(__file__).parents[2] / "recipes/labs" / f"{name}.yaml").exists()


@pytest.mark.parametrize("name", SMALLEST)
def test_every_experiment_runs_at_its_smallest_and_leaves_its_files(name: str, tmp_path: Path):
    result = run_lab(name, [*SMALLEST[name], "parallel=1"], tmp_path)
    assert json.loads((tmp_path / "verdict.json").read_text()) == result
    assert result["outcome"] in ("holds", "does not hold", "undecided")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert result["outcome"] in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------- eq6_variance


def test_means_over_masks_and_over_orders_agree_with_permutations():
    random = np.random.default_rng(0)
    masks = (np.arange(1, 8)[:, None] >> np.arange(3) & 1).astype(bool)
    log_prob = -random.random((7, 3)) * masks
    orders = []
    for order in itertools.permutations(range(3)):
        hidden, total = 7, 0.0
        for position in order:
            total += log_prob[hidden - 1, position]
            hidden &= ~(1 << position)
        orders.append(total)
    law = Exact(masks, log_prob.sum(1))
    assert eq6_variance.mean_over_orders(log_prob) == pytest.approx(np.mean(orders))
    assert eq6_variance.time_form_limit(law) == pytest.approx(np.mean(orders))
    times = np.linspace(1e-3, 1, 200_001)
    chance = np.stack([times**size * (1 - times) ** (3 - size) for size in masks.sum(1)])
    mean, variance = eq6_variance.time_form_moments(law)
    assert mean == pytest.approx((chance * law.sums[:, None] / times).sum(0).mean(), rel=1e-3)
    assert variance == pytest.approx((chance * (law.sums[:, None] / times) ** 2).sum(0).mean() - mean**2, rel=1e-2)


def eq6_result(time_form_variance: float = 4.0, control: float = -4.0) -> dict:
    def moments(mean: float, variance: float) -> dict:
        return {"mean": [mean, mean], "variance": [variance, variance]}

    exact = {
        "elbo": moments(-5, 1),
        "time_form": moments(-5, time_form_variance),
        "orders": moments(-5, 0),
        "time_form_limit": moments(-5, 0),
    }
    return {"exact": exact, "drawn": {"elbo": moments(-5, 1), "time_form": moments(-5, 4), "control": moments(control, 1)}}


def test_eq6_verdicts():
    assert eq6_variance.judge([eq6_result()], 100).outcome == "holds"
    assert eq6_variance.judge([eq6_result(time_form_variance=0.5)], 100).outcome == "does not hold"
    assert eq6_variance.judge([eq6_result(control=-5.0)], 100).outcome == "undecided"
    biased = eq6_result()
    biased["exact"]["orders"]["mean"] = [-5.0, -5.1]
    assert eq6_variance.judge([biased], 100).outcome == "does not hold"


# ---------------------------------------------------------------------------------------------------------- vrpo_sharing


def vrpo_result(independent: float, control: float, noise: float) -> dict:
    cells = {shape: {"shared": 1.0, "independent": independent + noise, "control": control} for shape in ("1 x 1", "8 x 1")}
    cells["1 x 8"] = {"shared": 2.0, "independent": 2 * independent + noise, "control": 2 * control}
    return {"score": 1.0, "variance": cells}


@pytest.mark.parametrize(("independent", "control", "outcome"), [(3.0, 3.0, "holds"), (0.5, 0.5, "does not hold"), (3.0, 1.0, "undecided")])
def test_vrpo_verdicts(independent, control, outcome):
    results = [vrpo_result(independent, control, noise) for noise in (0.0, 0.01, 0.02)]
    assert vrpo_sharing.judge(results).outcome == outcome


# -------------------------------------------------------------------------------------------------------------- reversal


@pytest.mark.parametrize(("masked", "causal", "outcome"), [(0.6, 0.0, "holds"), (0.01, 0.0, "does not hold"), (0.6, 0.3, "undecided")])
def test_reversal_verdicts(masked, causal, outcome):
    def curve(prev: float) -> list[dict]:
        return [{"step": [1, 2], "next": [0.5, 1.0], "prev": [0.0, prev + shift]} for shift in (0.0, 0.01, 0.02)]

    assert reversal.judge({"masked": curve(masked), "causal": curve(causal)}, 1 / 30).outcome == outcome


def test_reversal_rows_teach_questions_about_the_first_half_only():
    config = reversal.Config(couplets=10, batch_size=400)
    first, second = reversal.couplets(config, 0)
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 20
    rows, given = reversal.draw_rows(config, first, second, Noise(0), 1)
    asked = rows[rows[:, 0] != reversal.TEXT]
    taught = {tuple(line) for line in np.concatenate([first[:5], second[:5]]).tolist()}
    assert {tuple(row[1:4]) for row in asked.tolist()} <= taught
    before = asked[asked[:, 0] == reversal.PREV].tolist()
    partner = {tuple(b): tuple(a) for a, b in zip(first.tolist(), second.tolist(), strict=True)}
    assert all(partner[tuple(row[1:4])] == tuple(row[4:]) for row in before)
    assert set(rows[rows[:, 0] == reversal.TEXT][:, 1:4].flatten()) > set(first[:5].flatten())
    assert (given == np.where(rows[:, 0] == reversal.TEXT, 1, 4)).all()


@torch.no_grad()
def test_the_causal_control_does_not_see_what_follows():
    network = tiny_llada(8, 0, width=16, layers=2)
    rows = np.random.default_rng(0).integers(0, 8, (2, 5))
    changed = np.where(np.arange(5) < 3, rows, 7 - rows)
    logits, others = (reversal.causal_logits(network, one) for one in (rows, changed))
    torch.testing.assert_close(logits[:, :3], others[:, :3])
    assert not torch.allclose(logits[:, 3:], others[:, 3:])


# ------------------------------------------------------------------------------------------------------------- nfe_cache


def test_the_formula_counts_the_distinct_steps_of_all_tokens():
    for steps, length in ((1, 3), (2, 3), (3, 4)):
        counts = [len(set(choice)) for choice in itertools.product(range(steps), repeat=length)]
        assert nfe_cache.expected_forwards(steps, length) == pytest.approx(np.mean(counts))


@pytest.mark.parametrize(
    ("shift", "different", "every", "outcome"), [(0, 0, 4, "holds"), (1, 0, 4, "does not hold"), (0, 2, 4, "does not hold")]
)
def test_nfe_verdicts(shift, different, every, outcome):
    random = np.random.default_rng(0)
    drawn = {steps: [len(set(row)) + shift for row in random.integers(0, steps, (500, 4)).tolist()] for steps in (4, 8)}
    result = {
        "forwards": {str(steps): values for steps, values in drawn.items()},
        "all_steps": {"4": [4], "8": [8]},
        "different_tokens": different,
        "log_prob_error": 0.0,
        "control": [every] * 500,
    }
    assert nfe_cache.judge([result], 4).outcome == outcome


# ---------------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(("gain", "wrong", "outcome"), [(0.3, 0.0, "holds"), (-0.3, 0.0, "does not hold"), (0.3, 0.1, "undecided")])
def test_guidance_verdicts(gain, wrong, outcome):
    accuracy = [{"right": [0.4 + shift, 0.4 + gain], "wrong": [0.01, 0.01 + wrong]} for shift in (0.0, 0.01, 0.02)]
    assert guidance_without_pairs.judge([0.0, 1.0], accuracy).outcome == outcome


def test_guidance_rows_are_right_with_probability_q_and_hold_prompts_out():
    config = guidance_without_pairs.Config()
    sides = [guidance_without_pairs.whole_rows(config, np.random.default_rng(0), 2000, held_out) for held_out in (False, True)]
    right = (sides[0][:, :3] == sides[0][:, 3:]).all(1).mean()
    assert right == pytest.approx(config.correct + (1 - config.correct) / 6**3, abs=0.04)
    assert not {tuple(row) for row in sides[0][:, :3].tolist()} & {tuple(row) for row in sides[1][:, :3].tolist()}


# ------------------------------------------------------------------------------------------------------------------ digits


@pytest.mark.parametrize(
    ("linear", "full", "control", "outcome"), [(40, 30, 90, "holds"), (10, 30, 90, "does not hold"), (40, 30, 5, "undecided")]
)
def test_digits_verdicts(linear, full, control, outcome):
    def results(distance: float) -> list[dict]:
        return [{"distance": {"16": distance + shift}, "full": full + shift, "interval": 20.0} for shift in (0.0, 0.1, 0.2)]

    by_arm = {(curve, weight): results(20.0) for curve in digits.CURVES for weight in digits.WEIGHTS} | {
        ("linear", "elbo"): results(linear)
    }
    assert digits.judge(by_arm, [control] * 3, [1.0] * 3).outcome == outcome


@pytest.mark.parametrize(("espo", "shuffled", "outcome"), [(0.3, 0.0, "holds"), (-0.1, 0.0, "does not hold"), (0.3, 0.2, "undecided")])
def test_digits_rl_verdicts(espo, shuffled, outcome):
    def results(gain: float) -> list[dict]:
        before = {"reward": 0.5, "other": 0.5}
        return [{"before": before, "after": {"reward": 0.5, "other": 0.5 + gain + shift}} for shift in (0.0, 0.01, 0.02)]

    assert digits_rl.judge({"espo": results(espo), "shuffled": results(shuffled)}).outcome == outcome


def test_frechet_distance_of_known_laws():
    random = np.random.default_rng(0)
    one = random.normal(size=(20_000, 2))
    assert digits.frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert digits.frechet(one, one + np.array([3, 4])) == pytest.approx(25)
    assert digits.frechet(one, 3 * one) == pytest.approx((3 - 1) ** 2 * 2, rel=0.05)


def test_the_distance_sees_what_the_control_lacks():
    real, control = (digits.real_pixels(400, 0, together) for together in (True, False))
    np.testing.assert_allclose(real.mean(0), control.mean(0), atol=2)
    assert digits.distance(control) > 3 * digits.distance(real)


@pytest.mark.parametrize("curve", MASK_RATIO)
def test_weights_are_the_slopes_of_the_logarithm(curve: str):
    for time in (0.1, 0.5, 0.9):
        slope = (math.log(MASK_RATIO[curve](time + 1e-6)) - math.log(MASK_RATIO[curve](time - 1e-6))) / 2e-6
        assert mask_ratio.LOG_SLOPE[curve](time) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("curve", ["cosine", "exponential"])
def test_every_curve_weighted_by_its_slope_estimates_the_elbo(curve: str):
    """The expected number of masked tokens times their weight is L for every curve, as in the ELBO of a uniform model."""
    batch = batch_of([np.array([1])], [np.arange(8)])
    views = mask_ratio.make(batch, None, mask_ratio.Config(4000, curve, "elbo"), Noise(0).stream("views"), 0, tiny_llada(9, 0).profile)
    totals = torch.zeros(4000).index_add(0, views.score_draw, views.score_weight)
    assert totals.mean().item() == pytest.approx(8, abs=4 * totals.std().item() / 4000**0.5)


def test_the_class_is_hidden_as_often_as_asked():
    batch = batch_of([np.array([1])], [np.arange(8)])
    views = mask_ratio.make(batch, None, mask_ratio.Config(1000, drop_prompt=0.25), Noise(0).stream("views"), 0, tiny_llada(9, 0).profile)
    first = views.tokens[views.layout.row_offsets[:-1].long()]
    assert (first == 9).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert (views.score_position > 0).all()


def test_the_digits_task_and_its_reward_agree():
    task = load_task("digits", {}, "train", seed=0)
    tokenizer = task_tokenizer("digits", {})
    examples = [task.example(index) for index in range(40)]
    assert {len(tokenizer(example.demonstration)["input_ids"]) for example in examples} == {64}
    assert all(len(tokenizer(example.prompt)["input_ids"]) == 1 for example in examples)
    grade = [digit_class.grade(example.prompt, example.demonstration, example.columns, digit_class.Config()) for example in examples]
    assert sum(result.value for result in grade) >= 36
    wrong = digit_class.grade("", examples[0].demonstration, {"label": (examples[0].columns["label"] + 1) % 10}, digit_class.Config())
    assert (wrong.value, wrong.status) == (0.0, "ok")
    assert digit_class.grade("", "3 4", {"label": 1}, digit_class.Config()).status == "unparsed"
    epoch = {task.example(index).demonstration for index in range(len(digits_data.images("train")[0]))}
    held_out = {" ".join(map(str, row)) for row in digits_data.images("test")[0]}
    assert not epoch & held_out and len(load_task("digits", {"test_size": 20}, "test", seed=0).fingerprint()) == 64
