"""What objectives report beside their loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhub.objectives import (
    dpo,
    ipo,
    kto,
    linear_bound,
    pair_metrics,
    ratio_metrics,
    self_normalized,
    sequence_clip,
    sft,
    simpo,
    token_clip,
)
from rlhub.types import Credit, LogLikelihood, Scores

RATIOS = [1.3, 1.1, 0.7, 0.9, 1.5, 0.5, 2.0]
ADVANTAGES = [1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0]
VALID = [True] * 6 + [False]


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def likelihood(values: Tensor, length: int = 2) -> LogLikelihood:
    return LogLikelihood(values, "lower", "sequence", torch.full((len(values),), length), draws=values[:, None])


def credit_of(advantages: list, valid: list, **fields: Tensor) -> Credit:
    return Credit(tensor(advantages), torch.tensor(valid), **fields)


def scores_of(ratios: list, length: int = 2) -> Scores:
    """Sequences whose length-normalised ratios are these."""
    value = tensor(ratios).log() * length
    return Scores(likelihood(value - 3, length), proximal=likelihood(torch.full_like(value, -3.0), length))


CUT_AT_20_PERCENT = {
    "ratio/mean": pytest.approx(1.0),
    "ratio/min": pytest.approx(0.5),
    "ratio/max": pytest.approx(1.5),
    "clip/low": pytest.approx(1 / 6),  # 0.7 with A < 0; 0.5 has A > 0
    "clip/high": pytest.approx(1 / 6),  # 1.3 with A > 0; 1.5 has A < 0
    "clip/fraction": pytest.approx(2 / 6),
}


def test_ratios_are_cut_where_they_lead_away_and_invalid_samples_do_not_count() -> None:
    log_ratio, credit = tensor(RATIOS).log(), credit_of(ADVANTAGES, VALID)
    assert ratio_metrics(log_ratio, credit.advantages, credit.valid, 0.2, 0.2) == CUT_AT_20_PERCENT
    wider = ratio_metrics(log_ratio, credit.advantages, credit.valid, 0.35, 0.05)
    assert (wider["clip/low"], wider["clip/high"]) == (0.0, pytest.approx(2 / 6)), "each side has its own width"
    zero = ratio_metrics(log_ratio, torch.zeros(7), credit.valid, 0.0, 0.0)
    assert zero["clip/fraction"] == 0.0, "without an advantage there is no gradient to cut"
    at_the_edge = ratio_metrics(torch.zeros(2), tensor([1.0, -1.0]), torch.ones(2, dtype=torch.bool), 0.0, 0.0)
    assert at_the_edge["clip/fraction"] == 0.0, "at the edge the gradient is whole"
    assert ratio_metrics(log_ratio, credit.advantages, torch.zeros(7, dtype=torch.bool), 0.2, 0.2) == {}


def test_a_sample_shares_its_advantage_and_validity_with_its_tokens() -> None:
    counted = torch.tensor([[True], [False]])
    metrics = ratio_metrics(tensor([[1.5, 1.0, 1.1], [9.0, 9.0, 9.0]]).log(), tensor([[1.0], [1.0]]), counted, 0.2, 0.2)
    assert metrics["ratio/max"] == pytest.approx(1.5) and metrics["clip/high"] == pytest.approx(1 / 3)


def test_clipped_objectives_tell_what_they_clip() -> None:
    credit = credit_of(ADVANTAGES, VALID)
    _, metrics = sequence_clip.loss(scores_of(RATIOS), credit, sequence_clip.Config(clip_low=0.2, clip_high=0.2))
    assert metrics == CUT_AT_20_PERCENT
    one = {"kind": "exact", "granularity": "token", "scored_length": torch.ones(7), "mask": torch.ones(7, 1, dtype=torch.bool)}
    tokens = Scores(LogLikelihood(tensor(RATIOS).log()[:, None], **one), proximal=LogLikelihood(torch.zeros(7, 1).double(), **one))
    _, metrics = token_clip.loss(tokens, credit, token_clip.Config(clip_low=0.2, clip_high=0.2))
    assert metrics == CUT_AT_20_PERCENT
    _, metrics = self_normalized.loss(scores_of(RATIOS), credit, self_normalized.Config(clip_low=0.6, clip_high=1.2))
    assert metrics["clip/low"] == 0 and metrics["clip/high"] == pytest.approx(1 / 6), "[0.6, 1.2]: of A > 0 only 1.3 is above"
    _, metrics = self_normalized.loss(scores_of(RATIOS), credit, self_normalized.Config(clip_low=0.8, clip_high=1.4))
    assert metrics["clip/low"] == pytest.approx(1 / 6) and metrics["clip/high"] == 0
    _, metrics = self_normalized.loss(scores_of(RATIOS), credit_of(ADVANTAGES, [False] * 7), self_normalized.Config())
    assert metrics == {}


def test_the_linear_bound_clips_nothing_and_tells_its_ratios() -> None:
    _, metrics = linear_bound.loss(scores_of(RATIOS), credit_of(ADVANTAGES, VALID), linear_bound.Config())
    assert metrics == {key: CUT_AT_20_PERCENT[key] for key in ("ratio/mean", "ratio/min", "ratio/max")}
    _, metrics = linear_bound.loss(scores_of(RATIOS), credit_of(ADVANTAGES, VALID), linear_bound.Config(normalize="none"))
    assert metrics["ratio/max"] == pytest.approx(1.5**2)


# ---------------------------------------------------------------------------------------------------------------- preferences


def test_pairs_are_ranked_by_their_rewards() -> None:
    metrics = pair_metrics("dpo", tensor([1.0, 2.0, 3.0, 0.0]), tensor([0.5, 3.0, 1.0, 0.0]))
    assert metrics == {"pairs": 4.0, "dpo/accuracy": 0.5, "dpo/margin": 1.5 / 4, "dpo/chosen": 1.5, "dpo/rejected": 4.5 / 4}
    assert pair_metrics("dpo", tensor([]), tensor([])) == {"pairs": 0.0}


def test_each_pair_objective_ranks_by_its_own_reward() -> None:
    policy, reference = tensor([-2.0, -6.0, -4.0, -3.0]), tensor([-3.0, -5.0, -4.0, -5.0])
    length = torch.tensor([2, 4, 2, 1])
    scores = Scores(LogLikelihood(policy, "lower", "sequence", length), reference=LogLikelihood(reference, "lower", "sequence", length))
    credit = credit_of([0.0] * 4, [True] * 4, pairs=torch.tensor([[0, 1], [2, 3]]))
    _, metrics = dpo.loss(scores, credit, dpo.Config(beta=0.5))
    assert metrics["dpo/chosen"] == pytest.approx(0.5 * (1 + 0) / 2) and metrics["dpo/rejected"] == pytest.approx(0.5 * (-1 + 2) / 2)
    assert metrics["dpo/accuracy"] == 0.5 and metrics["dpo/margin"] == pytest.approx(0.0)
    _, metrics = ipo.loss(scores, credit, ipo.Config())
    assert metrics["ipo/chosen"] == pytest.approx(0.5) and metrics["ipo/rejected"] == pytest.approx(0.5)
    _, metrics = ipo.loss(scores, credit, ipo.Config(normalize="length"))
    assert metrics["ipo/chosen"] == pytest.approx(0.25) and metrics["ipo/rejected"] == pytest.approx((-0.25 + 2) / 2)
    _, metrics = simpo.loss(scores, credit, simpo.Config(beta=2.0))
    assert metrics["simpo/chosen"] == pytest.approx((-2 - 4) / 2) and metrics["simpo/rejected"] == pytest.approx((-3 - 6) / 2)


def test_kto_counts_its_labels_and_how_many_are_on_their_side() -> None:
    gain = tensor([3.0, 2.0, -2.0, 1.0, 9.0, 5.0])
    labels, valid = tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0]), [True] * 5 + [False]
    scores = Scores(likelihood(gain - 7), reference=likelihood(torch.full_like(gain, -7.0)))
    _, metrics = kto.loss(scores, credit_of([0.0] * 6, valid, labels=labels), kto.Config())
    expected = {"kto/reference_point": 1.0, "kto/desirable": 2.0, "kto/labelled": 4.0, "kto/accuracy": 0.75}
    assert metrics == pytest.approx(expected), "(3 + 2 - 2 + 1) / 4; 3 and 2 are above and -2 below it, 1 is on neither side"
    _, metrics = kto.loss(scores, credit_of([0.0] * 6, valid, labels=torch.zeros(6)), kto.Config())
    assert metrics == {"kto/reference_point": 0.0, "kto/desirable": 0.0, "kto/labelled": 0.0}


def test_one_sample_that_counts_has_the_whole_mean() -> None:
    scores = Scores(likelihood(tensor([2.0, 5.0])), reference=likelihood(tensor([1.0, 5.0])))
    loss, metrics = kto.loss(scores, credit_of([0.0] * 2, [True] * 2, labels=tensor([1.0, 0.0])), kto.Config(beta=0.5))
    assert metrics["kto/reference_point"] == 1.0 and loss.item() == pytest.approx(0.5), "at the reference point"
    loss, _ = sft.loss(scores, credit_of([1.0] * 2, [True, False]), sft.Config())
    assert loss.item() == pytest.approx(-1.0)


def test_supervised_loss_is_told_per_token() -> None:
    scores = Scores(likelihood(tensor([-2.0, -4.0, -9.0])))
    loss, metrics = sft.loss(scores, credit_of([1.0] * 3, [True, True, False]), sft.Config())
    assert metrics == {"sft/per_token": loss.item()} and loss.item() == pytest.approx((1 + 2) / 2)
    with pytest.raises(ValueError, match="sft needs a sequence likelihood, got one per token"):
        token = LogLikelihood(torch.zeros(1, 2), "exact", "token", torch.ones(1))
        sft.loss(Scores(token), credit_of([1.0], [True]), sft.Config())
    assert math.isfinite(sft.loss(scores, credit_of([0.0] * 3, [False] * 3), sft.Config())[0].item())


def test_a_tie_is_no_pair_ranked_right() -> None:
    metrics = pair_metrics("dpo", tensor([2.0, 1.0, 1.0, 3.0, 3.0]), tensor([1.0, 2.0, 1.0, -1.0, 2.0]))
    assert metrics == {"pairs": 5.0, "dpo/accuracy": 0.6, "dpo/margin": 1.0, "dpo/chosen": 2.0, "dpo/rejected": 1.0}
