"""The preference family against closed forms written a second time in numpy: values, gradients, symmetries and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.config.schema import AlgorithmConfig
from rlhub.errors import RecipeError
from rlhub.networks.profile import Profile
from rlhub.types import Batch, Credit
from rlhub.views._rows import NoisyRow, build_views

SPANS = [3, 5, 4, 2, 6, 3]
PAIRS = [(0, 1), (2, 3), (4, 5)]
DRAWS = 2
PROFILE = Profile(mask_id=9, eos_id=8, stop_ids=(8,), pad_id=8, lora_targets="")


def make_batch() -> Batch:
    """Three pairs in groups of two, responses of different lengths."""
    length = np.array(SPANS)
    return Batch(
        uid=np.arange(6, dtype=np.uint64),
        group=np.repeat(np.arange(3), 2),
        prompts=[np.zeros(1, dtype=np.int32)] * 6,
        completions=[np.arange(span, dtype=np.int32) % 3 for span in SPANS],
        response_length=length,
        scored_length=length,
        rewards=np.array([[1.0, 0.0]] * 3),
        member=np.tile([0, 1], 3),
    )


@pytest.fixture
def problem():
    """(batch, views, policy log-probs, reference log-probs): random masks of random weights, two draws a sample."""
    random = np.random.default_rng(0)
    batch = make_batch()
    rows = []
    for sample, span in enumerate(SPANS):
        for draw in range(DRAWS):
            masked = random.random(span) < 0.7
            masked[0] = True
            rows.append(NoisyRow(sample, draw, masked, weight=random.uniform(0.5, 2)))
    views = build_views(batch, rows, DRAWS, PROFILE)
    policy, reference = -torch.from_numpy(random.uniform(0.1, 2, (2, len(views.score_row))))
    return batch, views, policy, reference


def compose(objective: dict, advantage: str = "best_worst") -> Algorithm:
    return Algorithm.compose(
        AlgorithmConfig(
            advantage={"name": advantage}, views={"name": "elbo", "draws": DRAWS}, objective=objective, length="response", behavior="none"
        )
    )


def elbos(log_prob, views) -> np.ndarray:
    """The mean over draws of weighted sums, one score at a time."""
    total = np.zeros(6)
    for index, (row, weight) in enumerate(zip(views.score_row.tolist(), views.score_weight.tolist(), strict=True)):
        total[int(views.sample[row])] += weight * float(log_prob[index]) / DRAWS
    return total


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(objective: dict, policy: np.ndarray, reference: np.ndarray) -> float:
    gain, losses = policy - reference, []
    if objective["name"] == "kto":
        origin = max(0.0, np.mean(gain))
        for sample, value in enumerate(gain):
            good = sample % 2 == 0
            weight = objective["desirable_weight"] if good else objective["undesirable_weight"]
            losses.append(weight * (1 - sigmoid((1 if good else -1) * objective["beta"] * (value - origin))))
    for chosen, rejected in PAIRS if objective["name"] != "kto" else []:
        if objective["name"] == "ipo":
            per = np.array(SPANS) if objective.get("normalize") == "length" else np.ones(6)
            losses.append((gain[chosen] / per[chosen] - gain[rejected] / per[rejected] - 1 / (2 * objective["tau"])) ** 2)
        elif objective["name"] == "simpo":
            margin = objective["beta"] * (policy[chosen] / SPANS[chosen] - policy[rejected] / SPANS[rejected]) - objective["gamma"]
            losses.append(-math.log(sigmoid(margin)))
        elif objective["name"] == "dpo":
            margin = objective["beta"] * (gain[chosen] - gain[rejected])
            smooth = objective["label_smoothing"]
            losses.append(-(1 - smooth) * math.log(sigmoid(margin)) - smooth * math.log(sigmoid(-margin)))
    return float(np.mean(losses))


OBJECTIVES = [
    {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    {"name": "ipo", "tau": 0.2},
    {"name": "ipo", "tau": 0.5, "normalize": "length"},
    {"name": "simpo", "beta": 2.5, "gamma": 0.7},
    {"name": "kto", "beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.8},
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "-".join(map(str, objective.values())))


@each_objective
def test_values_equal_the_closed_form(problem, objective):
    batch, views, policy, reference = problem
    algorithm = compose(objective)
    assert algorithm.needs_reference == (objective["name"] != "simpo")
    log_probs = LogProbs(policy, reference=reference if algorithm.needs_reference else None)
    loss, _ = algorithm.loss(algorithm.scores(log_probs, views, batch, algorithm.credit(batch)), algorithm.credit(batch))
    assert loss.item() == pytest.approx(by_hand(objective, elbos(policy, views), elbos(reference, views)), rel=1e-12)


@each_objective
def test_gradients_equal_finite_differences(problem, objective):
    """Of the formula by hand; KTO's reference point is held fixed, as it carries no gradient."""
    batch, views, policy, reference = problem
    algorithm = compose(objective)
    coefficient, *_ = algorithm.coefficients(LogProbs(policy, reference=reference), views, batch, algorithm.credit(batch))
    fixed = elbos(reference, views)
    if objective["name"] == "kto":
        origin = max(0.0, np.mean(elbos(policy, views) - fixed))

        def loss(log_prob):
            label = np.tile([1, -1], 3)
            weight = np.where(label > 0, objective["desirable_weight"], objective["undesirable_weight"])
            return np.mean(weight * (1 - sigmoid(label * objective["beta"] * (elbos(log_prob, views) - fixed - origin))))
    else:

        def loss(log_prob):
            return by_hand(objective, elbos(log_prob, views), fixed)

    step = 1e-6
    for index in range(0, len(policy), 3):
        nudge = torch.zeros_like(policy)
        nudge[index] = step
        slope = (loss(policy + nudge) - loss(policy - nudge)) / (2 * step)
        assert coefficient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def loss_and_metrics(problem, objective, credit=None):
    batch, views, policy, reference = problem
    algorithm = compose(objective)
    credit = algorithm.credit(batch) if credit is None else credit
    return algorithm.loss(algorithm.scores(LogProbs(policy, reference=reference), views, batch, credit), credit)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_swapping_chosen_and_rejected_negates_the_margin(problem, name):
    algorithm = compose({"name": name})
    credit = algorithm.credit(problem[0])
    swapped = Credit(credit.advantages, credit.valid, -credit.labels, credit.pairs.flip(1))
    first, second = (loss_and_metrics(problem, {"name": name}, one)[1] for one in (credit, swapped))
    assert first[f"{name}/margin"] == pytest.approx(-second[f"{name}/margin"]) and first[f"{name}/margin"] != 0
    assert first[f"{name}/accuracy"] + second[f"{name}/accuracy"] == 1
    if name == "ipo":  # (m - c)^2 - (-m - c)^2 = -4 m c
        difference = loss_and_metrics(problem, {"name": name}, credit)[0] - loss_and_metrics(problem, {"name": name}, swapped)[0]
        assert difference.item() == pytest.approx(-4 * first["ipo/margin"] / (2 * 0.1))


def test_kto_mirrors_good_and_bad(problem):
    """Gains and labels negated leave the loss, as long as the reference point is at its clamp."""
    batch, views, policy, reference = problem
    algorithm = compose({"name": "kto", "beta": 0.4})
    credit = algorithm.credit(batch)
    mirrored = Credit(-credit.advantages, credit.valid, -credit.labels, credit.pairs)
    same = policy - (policy - reference).mean()
    values = elbos(same, views) - elbos(reference, views)
    level = same.clone()
    level[0] -= float(values.sum()) * DRAWS / float(views.score_weight[0])  # the mean gain is 0, on either side of the mirror
    loss, metrics = algorithm.loss(algorithm.scores(LogProbs(level, reference=reference), views, batch, credit), credit)
    other = 2 * reference - level
    mirror, _ = algorithm.loss(algorithm.scores(LogProbs(other, reference=reference), views, batch, mirrored), mirrored)
    assert metrics["kto/reference_point"] == pytest.approx(0, abs=1e-12)
    assert loss.item() == pytest.approx(mirror.item())


def test_kto_needs_no_pairs_and_ignores_what_has_no_label(problem):
    batch, views, policy, reference = problem
    algorithm = compose({"name": "kto", "beta": 0.4, "desirable_weight": 2.0})
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    valid = torch.tensor([True, True, True, True, True, False])
    credit = Credit(labels, valid, labels)
    loss, metrics = algorithm.loss(algorithm.scores(LogProbs(policy, reference=reference), views, batch, credit), credit)
    gain = (elbos(policy, views) - elbos(reference, views))[[0, 2]]
    assert loss.item() == pytest.approx(np.mean(2 * (1 - sigmoid(0.4 * (gain - max(0.0, gain.mean()))))))
    assert metrics["kto/labelled"] == metrics["kto/desirable"] == 2
    none = Credit(labels * 0, valid, labels * 0)
    assert algorithm.loss(algorithm.scores(LogProbs(policy, reference=reference), views, batch, none), none)[0].item() == 0


@each_objective
def test_nothing_to_compare_is_said(problem, objective):
    batch, views, policy, reference = problem
    algorithm = compose(objective, advantage="group_mean")
    credit = algorithm.credit(batch)
    scores = algorithm.scores(LogProbs(policy, reference=reference), views, batch, credit)
    with pytest.raises(ValueError, match="labels" if objective["name"] == "kto" else "preference pairs"):
        algorithm.loss(scores, credit)
    empty = Credit(credit.advantages, credit.valid, credit.advantages * 0, torch.zeros(0, 2, dtype=torch.int64))
    assert algorithm.loss(scores, empty)[0].item() == 0


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("objective", {"name": "ipo", "tau": 0.0}, "tau must be positive, got 0.0"),
        ("objective", {"name": "ipo", "normalize": "tokens"}, "normalize must be none or length, got 'tokens'"),
        ("views", {"name": "elbo", "draws": 8, "masks_per_level": 3}, "draws must be a multiple of masks_per_level=3, got 8"),
        ("views", {"name": "time_form", "draws": 2, "masks_per_level": 4}, "draws must be a multiple of masks_per_level=4, got 2"),
        ("views", {"name": "elbo", "masks_per_level": 0}, "must be at least 1, got draws=2 and masks_per_level=0"),
        ("views", {"name": "adaptive", "draws": 2, "edges": [0.0, 0.5]}, "edges must be 3 numbers"),
        (
            "views",
            {"name": "adaptive", "draws": 2, "edges": [0.0, 0.0, 1.0]},
            "edges must be 3 numbers .draws . 1. that ascend from 0 to 1",
        ),
    ],
)
def test_wrong_options_are_refused(part, options, message):
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        Algorithm.compose(AlgorithmConfig(**{part: options}))
